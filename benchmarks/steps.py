"""One training step, ours and a plain one, of the same U-Net on the same data: what the speed benchmarks take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm
from webdataset.writer import TarWriter

from pipeline.conditioning import Conditioning
from pipeline.config import Config
from pipeline.data import latents
from pipeline.data.dataset import Samples, load_batches
from pipeline.data.index import build_index
from pipeline.data.order import rank_batches
from pipeline.data.pieces import ClassLabel, Diffusion, Dropout, Moments, Piece, PosteriorNoise
from pipeline.denoiser import objective_of
from pipeline.denoising import DenoisingLoss
from pipeline.ema import profiles
from pipeline.engine import Engine
from pipeline.optim import UpdateRule
from pipeline.pace import Work
from pipeline.training import Course, Training
from pipeline.unet import build_unet
from vae.moments import LatentScale

SHAPE = (4, 8, 8)  # C, h, w: the demo's latents
SHARDS, SAMPLES_PER_SHARD = 4, 512
SEED, CLASSES, MANY_STEPS = 0, 10, 10**6
LEARNING_RATE = 1e-4


def write_set(folder: Path, shape: tuple[int, int, int] = SHAPE, *, per_shard: int = SAMPLES_PER_SHARD) -> None:
    """Latent shards as encode writes them, and their index."""
    rng = np.random.default_rng(SEED)
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        with (folder / f"{shard:06d}.tar").open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
            for row in range(per_shard):
                moments = latents.moments_to_bytes(rng.normal(size=(2 * shape[0], *shape[1:])))
                number = shard * per_shard + row
                writer.write({"__key__": f"{number:08d}", latents.PART: moments, "cls": str(number % CLASSES).encode()})
    build_index(folder)


def config_of(folder: Path, name: str, **sections: dict[str, Any]) -> Config:
    """The demo's config with a U-Net of 987 k parameters, and what `sections` change of it."""
    given: dict[str, dict[str, Any]] = {
        "diffusion": {},
        "data": {"train_images": str(folder / "set"), "image_size": 32, "lanes": 16, "workers": 1},
        "vae": {},
        "unet": {
            "block_out_channels": [32, 64],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 2,
            "cross_attention_dim": 32,
        },
        "conditioning": {"num_classes": CLASSES},
        "train": {"steps": MANY_STEPS, "global_batch_images": 64, "hang_timeout_s": None},
        "engine": {"device": "cpu"},
        "ema": {"decays": [0.9999]},
        "checkpoint": {"every_steps": MANY_STEPS},
        "tracking": {"tensorboard": False},
    }
    if "preset" in sections.get("unet", {}):
        given["unet"] = {}  # the preset's shape, whole
    for key, values in sections.items():
        given[key] |= values
    return Config.model_validate({"run_dir": str(folder / name), "seed": SEED, **given})


class Captions:
    """Condition tokens as cached embeddings bring them: the same ones for every image, on the device already."""

    def __init__(self, num_tokens: int, width: int, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(SEED)
        self.tokens = torch.randn(1, num_tokens, width, generator=draw).to(device)

    def arguments(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """As Conditioning gives them."""
        count = len(batch["eps"])
        return {"encoder_hidden_states": self.tokens.expand(count, -1, -1)}


def network(config: Config, shape: tuple[int, int, int], num_tokens: int | None = None) -> UNet2DConditionModel:
    """The U-Net, the same weights each time; with `num_tokens` it reads captions and knows no class."""
    return build_unet(config.unet, config.conditioning if num_tokens is None else None, shape, SEED)


def samples_of(config: Config, *pieces: Piece) -> Samples:
    """The set in the order of training."""
    return Samples.of(config.data.train_images, pieces, seed=SEED, data=config.data)


def our_training(
    config: Config,
    shape: tuple[int, int, int] = SHAPE,
    *,
    num_tokens: int | None = None,
    flops_per_image: int | None = None,
) -> tuple[Training, DenoisingLoss]:
    """All of `train` but its pictures: the loader's processes, the journal, the run folder."""
    engine = Engine(config.engine)
    batch = config.train.global_batch_images
    pieces = (
        Moments(SEED, shape),
        PosteriorNoise(SEED, shape),
        Diffusion(SEED, shape, batch, "stratified"),
        Dropout(SEED, config.conditioning.dropout),
        ClassLabel(CLASSES),
    )
    unet = network(config, shape, num_tokens)
    run = Path(config.run_dir)
    run.mkdir(parents=True)
    rule = UpdateRule(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, clip_norm=1.0)
    work = None if flops_per_image is None else Work.on(engine.device, config.engine.precision, flops_per_image)
    training = Training(
        engine,
        run,
        models={"unet": unet},
        module=unet,
        profiles=profiles(config.ema),
        samples=samples_of(config, *pieces),
        course=Course(config.train.steps, batch, config.train.micro_batch_images, lambda step: LEARNING_RATE, rule),
        config=config,
        record={},
        work=work,
    )
    if num_tokens is None:
        conditioning = Conditioning(config.conditioning, None, unet.config)
    else:
        conditioning = cast(Conditioning, Captions(num_tokens, config.unet.cross_attention_dim, engine.device))
    objective = objective_of(config.diffusion, engine.device)
    return training, DenoisingLoss(objective, LatentScale(1.0), conditioning, nullcontext, lambda x: x)


class PlainStep:
    """A step as diffusers' example scripts take it: Accelerate, AdamW, EMAModel, clip_grad_norm_, a loss that is read.

    Noise and timesteps are drawn in the step, there is no condition dropout, and nothing is written down.
    """

    def __init__(self, config: Config, shape: tuple[int, int, int] = SHAPE, *, num_tokens: int | None = None) -> None:
        self.accelerator = Accelerator(cpu=config.engine.device == "cpu", mixed_precision=_mixed(config))
        unet: Any = network(config, shape, num_tokens)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        schedule = get_scheduler("constant", optimizer)
        self.ema = EMAModel(unet.parameters(), decay=0.9999, model_cls=UNet2DConditionModel, model_config=unet.config)
        self.unet, self.optimizer, self.schedule = self.accelerator.prepare(unet.train(), optimizer, schedule)
        self.ema.to(self.accelerator.device)
        self.noise = DDPMScheduler(num_train_timesteps=1000)
        self.bar = tqdm(total=MANY_STEPS)
        batch = config.train.global_batch_images
        positions = rank_batches(0, None, global_batch=batch, micro_batch=batch, rank=0, num_ranks=1)
        cuda = self.accelerator.device.type == "cuda"
        samples = samples_of(config, Moments(SEED, shape), ClassLabel(CLASSES))
        self.batches = load_batches(samples, positions, workers=config.data.workers, pin_memory=cuda)
        size = (1, num_tokens or 1, config.unet.cross_attention_dim)
        make = torch.zeros if num_tokens is None else torch.randn
        self.tokens = make(size, device=self.accelerator.device)
        self.has_class = num_tokens is None

    def __call__(self) -> None:
        """Take it."""
        batch, _ = next(self.batches)
        device = self.accelerator.device
        with self.accelerator.accumulate(self.unet):
            z_0 = DiagonalGaussianDistribution(batch["moments"].to(device).float()).sample()
            labels = batch["class_label"].to(device)
            eps = torch.randn_like(z_0)
            t = torch.randint(0, 1000, (len(z_0),), device=device).long()
            z_t = self.noise.add_noise(z_0, eps, t)
            told: dict[str, Any] = {"encoder_hidden_states": self.tokens.expand(len(z_0), -1, -1)}
            if self.has_class:
                told["class_labels"] = labels
            said = self.unet(z_t, t, **told, return_dict=False)[0]
            loss = F.mse_loss(said.float(), eps.float(), reduction="mean")
            mean: Any = self.accelerator.gather(loss.repeat(len(z_0)))
            train_loss = mean.mean().item()
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.ema.step(self.unet.parameters())
            self.bar.update(1)
            self.accelerator.log({"train_loss": train_loss})
        self.bar.set_postfix(step_loss=loss.detach().item(), lr=self.schedule.get_last_lr()[0])


class PassesAlone:
    """Forward and backward of the same U-Net on one batch, and nothing else."""

    def __init__(self, config: Config, shape: tuple[int, int, int] = SHAPE) -> None:
        self.unet = network(config, shape).train()
        draw = torch.Generator().manual_seed(SEED)
        count = config.train.global_batch_images
        self.z, self.eps = (torch.randn(count, *shape, generator=draw) for _ in "ab")
        self.t = torch.randint(0, 1000, (count,), generator=draw)
        self.labels = torch.randint(0, CLASSES, (count,), generator=draw)
        self.tokens = torch.zeros(count, 1, config.unet.cross_attention_dim)

    def __call__(self) -> None:
        """Take them."""
        said: Tensor = self.unet(self.z, self.t, encoder_hidden_states=self.tokens, class_labels=self.labels).sample
        F.mse_loss(said, self.eps).backward()
        for parameter in self.unet.parameters():
            parameter.grad = None


def our_steps(config: Config, shape: tuple[int, int, int] = SHAPE) -> Iterator[int]:
    """Each `next` of it is a whole step."""
    training, loss_of = our_training(config, shape)
    return training.steps(loss_of)


def _mixed(config: Config) -> str:
    return {"fp32": "no"}.get(config.engine.precision, "bf16")
