"""A small U-Net that trains and is saved, as one rank of a run has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pipeline import checkpoint
from pipeline.checkpoint import MOMENTS, moment_stem, weights_stem
from pipeline.ema import Decay, Ema
from pipeline.optim import UpdateRule
from pipeline.saving import Saver
from pipeline.strategies import Wrapped, wrap

PROFILES = (Decay(0.9), Decay(0.99))
RULE = UpdateRule(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, clip_norm=1.0)


def small_unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        num_class_embeds=3,
    )


class Run:
    """A model, its optimizer and averages, as one rank has them."""

    def __init__(self, seed: int = 0) -> None:
        self.unet = small_unet(seed)
        self.wrapped: Wrapped = wrap(self.unet, "ddp", precision="fp32", device=torch.device("cpu"), rule=RULE)
        self.ema = Ema(self.wrapped.weights(), PROFILES)
        self.shapes = {name: p.shape for name, p in self.unet.named_parameters()}

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        z = torch.randn(2, 4, 4, 4, generator=generator)
        condition = {"class_labels": torch.tensor([0, 2]), "encoder_hidden_states": torch.zeros(2, 1, 8)}
        with self.wrapped.micro_batch(last=True):
            self.wrapped.backward(self.wrapped.model(z, torch.tensor([1, 7]), **condition).sample.square().mean())
        self.wrapped.step(1e-3)
        self.ema.update(self.wrapped.weights(), number - 1)

    def lists(self) -> dict[str, list[Tensor]]:
        """Stem → local tensors, of all that a checkpoint holds."""
        found = {weights_stem("unet"): self.wrapped.weights()}
        found |= {weights_stem(f"ema/{name}"): shadow for name, shadow in self.ema.shadows.items()}
        return found | {moment_stem("unet", name): local for name, local in self.wrapped.moments().items()}

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for stem, local in self.lists().items():
            yield from ((stem, name, tensor) for name, tensor in self.wrapped.full(local))

    def begin(self, saver: Saver, step: int) -> None:
        config = json.loads(self.unet.to_json_string())
        folders = ["unet", *(f"ema/{name}" for name in self.ema.shadows)]
        documents: dict[str, Any] = {f"{folder}/config.json": config for folder in folders}
        documents["state.json"] = checkpoint.state_document(step, {"data": {"position": 10 * step}})
        saver.begin(
            step,
            dict.fromkeys(self.lists(), self.shapes),
            self.tensors(),
            documents,
            on_main=lambda work: work(),
            done=lambda folder: None,
        )

    def save(self, folder: Path, step: int, max_file_bytes: int = 1 << 30) -> None:
        saver = Saver(folder, rank=0, num_ranks=1, max_file_bytes=max_file_bytes)
        self.begin(saver, step)
        saver.finish()

    def take_up(self, found: checkpoint.Checkpoint) -> None:
        read = {stem: found.tensors(stem) for stem in (weights_stem("unet"), *map(moments_of_unet, MOMENTS))}
        moments = {name: read[moments_of_unet(name)].__getitem__ for name in MOMENTS}
        self.wrapped.load(read[weights_stem("unet")].__getitem__, moments, found.step)
        for name, shadow in self.ema.shadows.items():
            self.wrapped.fill(shadow, found.tensors(weights_stem(f"ema/{name}")).__getitem__)


def moments_of_unet(moment: str) -> str:
    return moment_stem("unet", moment)
