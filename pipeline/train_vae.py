"""Train the autoencoder on images: pixels → posterior moments → a sample of them → pixels.

The result, in vae.run_dir/autoencoder, is a diffusers AutoencoderKL.  To resume, run the same command again.
"""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

from pipeline import files, program
from pipeline.config import Config
from pipeline.data.dataset import Samples
from pipeline.data.draws import Purpose, integer_seed
from pipeline.data.pieces import Pixels, PosteriorNoise
from pipeline.engine import Engine
from pipeline.errors import UsageError, blame
from pipeline.optim import UpdateRule, learning_rate_at
from pipeline.run_folder import claim, write_status
from pipeline.training import Course, Training
from vae.model import build, weights_sha256
from vae.steps import AutoencoderStep, autoencoder_loss

IDENTITY = ("seed", "data", "vae", "engine")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("train-vae", __doc__ or "")
    return program.run_config(made, argv, train_vae, lambda raw: raw.get("vae", {}).get("run_dir"))


def train_vae(config: Config, args: argparse.Namespace) -> None:
    """config → engine → data → autoencoder, optimizer → resume → steps → the diffusers folder."""
    del args
    run, settings, shape = Path(config.vae.run_dir), config.vae.train, config.vae.model
    engine = Engine(config.engine)
    engine.main_does(lambda: claim(run, config, IDENTITY))

    if config.data.image_size % shape.downsampling_factor:
        raise UsageError(
            f"data.image_size: {config.data.image_size} came, a multiple of the VAE's factor "
            f"{shape.downsampling_factor} was wanted"
        )
    side = config.data.image_size // shape.downsampling_factor
    with blame("data.train_images"):
        samples = Samples.of(
            config.data.train_images,
            (
                Pixels(config.seed, config.data.image_size, config.data.crop, config.data.flip),
                PosteriorNoise(config.seed, (shape.latent_channels, side, side)),
            ),
            seed=config.seed,
            data=config.data,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer_seed(config.seed, Purpose.INITIAL_WEIGHTS, 1))
        autoencoder = build(shape)
    module = AutoencoderStep(autoencoder)

    training = Training(
        engine,
        run,
        models={"autoencoder": autoencoder},
        module=module,
        profiles=(),
        samples=samples,
        course=Course(
            steps=settings.steps,
            global_batch_images=settings.global_batch_images,
            micro_batch_images=settings.micro_batch_images,
            learning_rate=lambda step: learning_rate_at(
                step,
                peak=settings.learning_rate,
                schedule=settings.schedule,
                warmup_steps=settings.warmup_steps,
                total_steps=settings.steps,
            ),
            rule=UpdateRule(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip_norm=settings.gradient_clip_norm),
        ),
        config=config,
        record={},
    )

    def loss_of(model: Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        output = model(batch["x"], batch["posterior_noise"])
        return autoencoder_loss(output, batch["x"], settings)

    for _ in training.steps(loss_of):
        pass

    def finish() -> str:
        with files.whole_folder(run / "autoencoder") as aside:
            autoencoder.save_pretrained(aside)
        write_status(run, "done", step=settings.steps)
        return weights_sha256(autoencoder)

    digest = engine.main_does(finish)
    if engine.is_main:
        program.say(f"the autoencoder {digest[:12]} is in {run / 'autoencoder'}")


if __name__ == "__main__":
    program.end(main())
