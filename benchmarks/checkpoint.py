"""How long does the training stand still while a checkpoint is saved?

python benchmarks/checkpoint.py      (two cores that are otherwise idle; a minute)

A U-Net of 21 M parameters takes steps on one core, in 16 of them a checkpoint (weights, an average, two moments:
fp32) is begun.  The stall is what those 16 steps take longer than 16 steps without a save; it is held against writing
the same bytes synchronously, files flushed and hashed.  Wall time, in turns; medians.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pipeline import checkpoint
from pipeline.checkpoint import moment_stem, weights_stem
from pipeline.ema import Decay, Ema
from pipeline.optim import UpdateRule
from pipeline.saving import Saver
from pipeline.strategies import wrap

STEPS, TURNS = 16, 7


def main() -> None:
    """Steps alone, steps with a save beside them, a save alone."""
    torch.set_num_threads(1)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
    )
    rule = UpdateRule(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    wrapped = wrap(unet, "ddp", precision="fp32", device=torch.device("cpu"), rule=rule)
    ema = Ema(wrapped.weights(), (Decay(0.999),))
    z, tokens = torch.randn(4, 4, 16, 16), torch.zeros(4, 1, 64)

    def take_steps() -> None:
        for step in range(STEPS):
            with wrapped.micro_batch(last=True):
                output = wrapped.model(z, torch.arange(4), encoder_hidden_states=tokens).sample
                wrapped.backward(output.square().mean())
            wrapped.step(1e-4)
            ema.update(wrapped.weights(), step)

    take_steps()
    lists = {weights_stem("unet"): wrapped.weights()}
    lists |= {weights_stem(f"ema/{name}"): shadow for name, shadow in ema.shadows.items()}
    lists |= {moment_stem("unet", name): local for name, local in wrapped.moments().items()}
    shapes = {name: p.shape for name, p in unet.named_parameters()}
    num_bytes = len(lists) * sum(4 * shape.numel() for shape in shapes.values())

    def tensors() -> Iterator[tuple[str, str, Tensor]]:
        for stem, local in lists.items():
            yield from ((stem, name, tensor) for name, tensor in wrapped.full(local))

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        saver = Saver(Path(name), rank=0, num_ranks=1)

        def begin(step: int) -> None:
            documents = {"state.json": checkpoint.state_document(step, {})}
            whole = dict.fromkeys(lists, shapes)
            saver.begin(step, whole, tensors(), documents, on_main=lambda work: work(), done=lambda folder: None)

        stalls: list[float] = []
        alone: list[float] = []
        for turn in range(TURNS):
            start = time.perf_counter()
            take_steps()
            undisturbed = time.perf_counter() - start
            start = time.perf_counter()
            begin(2 * turn + 1)
            take_steps()
            stalls.append(time.perf_counter() - start - undisturbed)
            saver.finish()
            start = time.perf_counter()
            begin(2 * turn + 2)
            saver.finish()
            alone.append(time.perf_counter() - start)
    stall, synchronous = statistics.median(stalls), statistics.median(alone)
    say(f"a save of {num_bytes / 1e6:.0f} MB, synchronously", synchronous, "none", True, "s")
    say("stall of the steps beside a save", stall, "none", True, "s")
    say("stall over the synchronous save", stall / synchronous, "<= 0.2", stall <= 0.2 * synchronous, "ratio")


def say(figure: str, value: float, bound: str, holds: bool, unit: str) -> None:
    """One line of the result."""
    print(json.dumps({"figure": figure, "value": round(value, 3), "bound": bound, "holds": holds, "unit": unit}))


if __name__ == "__main__":
    main()
