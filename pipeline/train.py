"""Train the latent diffusion model: DDPM's Algorithm 1 (Ho et al. 2020) on latents, class-conditional.

To resume, run the same command again.
"""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module

from pipeline import files, program, sampler
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.conditioning import unet_arguments
from pipeline.config import Config
from pipeline.data import latents
from pipeline.data.dataset import LatentSamples
from pipeline.diffusion.objectives import simple_loss, target, timesteps
from pipeline.diffusion.process import q_sample
from pipeline.diffusion.schedule import make_schedule
from pipeline.ema import profile_name
from pipeline.engine import Engine
from pipeline.errors import UsageError, blame
from pipeline.metrics.pictures import labelled_grid
from pipeline.optim import build_adamw, learning_rate_at
from pipeline.run_folder import claim, write_status
from pipeline.training import Course, Training
from pipeline.unet import build_unet
from vae.model import load, weights_sha256
from vae.moments import LatentScale, sample_posterior

IDENTITY = ("seed", "data", "unet", "conditioning", "diffusion", "optimizer", "train", "engine", "ema")
PICTURE_COLUMNS = 4  # images of each class in a picture while training


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("train", __doc__ or "")
    return program.run_config(made, argv, train, lambda raw: raw.get("run_dir"))


def train(config: Config, args: argparse.Namespace) -> None:
    """config → engine → data → frozen VAE → U-Net, optimizer, EMA → resume → steps → pictures on the way."""
    del args
    run = Path(config.run_dir)
    engine = Engine(config.engine)
    engine.main_does(lambda: claim(run, config, IDENTITY))

    # frozen parts and data: latents know which VAE made them, and at what scale
    with blame("vae.path"):
        vae = load(config.vae.path)
    with blame("data.train_latents"):
        described = latents.open_latents(Path(config.data.train_latents), weights_sha256(vae), config.data.image_size)
        check_labels(config, described)
    Module.to(vae, engine.device)
    latent_scale = LatentScale(described["scale"], described["shift"])
    side = config.data.image_size // 2 ** (len(vae.config["block_out_channels"]) - 1)
    with blame("data.train_latents"):
        samples = LatentSamples(
            Path(config.data.train_latents),
            seed=config.seed,
            lanes=config.data.lanes,
            block=config.data.shuffle_block,
            global_batch=config.train.global_batch_images,
            num_classes=config.conditioning.num_classes,
            dropout=config.conditioning.dropout,
        )

    # U-Net, optimizer, EMA; resume
    schedule = make_schedule(
        config.diffusion.schedule,
        config.diffusion.num_timesteps,
        config.diffusion.beta_start,
        config.diffusion.beta_end,
    ).to(engine.device)
    latent_shape = (int(vae.config["latent_channels"]), side, side)
    unet = build_unet(config.unet, config.conditioning, latent_shape, config.seed)
    settings = config.optimizer
    training = Training(
        engine,
        run,
        name="unet",
        core=unet,
        module=unet,
        optimizer=build_adamw(
            unet,
            learning_rate=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        ),
        ema_decays=config.ema.decays,
        samples=samples,
        course=Course(
            steps=config.train.steps,
            global_batch_images=config.train.global_batch_images,
            micro_batch_images=config.train.micro_batch_images,
            learning_rate=lambda step: learning_rate_at(
                step,
                peak=settings.learning_rate,
                schedule=settings.schedule,
                warmup_steps=settings.warmup_steps,
                total_steps=config.train.steps,
            ),
            clip_norm=settings.gradient_clip_norm,
        ),
        record={"latents": {name: described[name] for name in ("scale", "shift", "origin")}},
    )

    def loss_of(model: Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Algorithm 1: z_0 ~ q(z|x), t uniform, eps normal; the gradient of ‖eps - eps_θ(z_t, t)‖²."""
        z_0 = latent_scale.normalise(sample_posterior(batch["moments"], batch["posterior_noise"]))  # [B,C,h,w]
        t = timesteps(batch["u"], schedule.num_timesteps).to(engine.device)  # [B]
        z_t = q_sample(z_0, t, batch["eps"], schedule)
        condition = unet_arguments(
            batch["class_label"],
            batch["dropped"],
            num_classes=config.conditioning.num_classes,
            width=config.unet.cross_attention_dim,
        )
        prediction = model(z_t, t, **condition).sample
        wanted = target(config.diffusion.prediction_type, z_0, batch["eps"], t, schedule)
        return simple_loss(prediction, wanted).mean(), {}

    for step in training.steps(loss_of, data=config.data, saving=config.checkpoint, tracking=config.tracking):
        if engine.is_main and step % config.evaluation.every_steps == 0:
            averaged = training.ema.state()[profile_name(config.ema.decays[0])]
            unet_now = sampler.frozen_unet(unet.config, averaged, engine.device)
            names = config.conditioning.class_names
            pipe = sampler.assemble(unet_now, vae, latent_scale, config.diffusion, names)
            save_picture(run, step, config, pipe)
    engine.main_does(lambda: write_status(run, "done", step=config.train.steps))
    if engine.is_main:
        program.say(f"trained {config.train.steps} steps; the checkpoints are in {run / 'checkpoints'}")


def check_labels(config: Config, described: dict[str, Any]) -> None:
    """Raise UsageError where the set has a label that num_classes doesn't, or lacks labels."""
    known = sorted(int(label) for label in described["label_counts"])
    num_classes = config.conditioning.num_classes
    if not known or sum(described["label_counts"].values()) < described["num_samples"]:
        raise UsageError(
            f"{config.data.train_latents}: not every sample has a .cls label, which conditioning.kind wants"
        )
    if known[-1] >= num_classes:
        raise UsageError(
            f"{config.data.train_latents}: class id {known[-1]} came, 0 to {num_classes - 1} was wanted "
            f"(conditioning.num_classes={num_classes})"
        )


def save_picture(run: Path, step: int, config: Config, pipe: ClassConditionalPipeline) -> None:
    """RUN/samples/step-N.png: some images of the first classes from the averaged weights, the same noise each time."""
    names = config.conditioning.class_names or [str(i) for i in range(config.conditioning.num_classes)]
    classes = range(min(10, config.conditioning.num_classes))
    labels = [label for label in classes for _ in range(PICTURE_COLUMNS)]
    pixels = sampler.draw(
        pipe,
        labels,
        range(len(labels)),
        seed=config.seed,
        guidance_scale=config.evaluation.guidance_scales[-1],
        num_inference_steps=config.evaluation.num_inference_steps,
        batch_images=config.evaluation.batch_images,
    )
    rows = [(names[c], list(pixels[i * PICTURE_COLUMNS : (i + 1) * PICTURE_COLUMNS])) for i, c in enumerate(classes)]
    with files.whole(run / "samples" / f"step-{step:09d}.png") as aside:
        labelled_grid(rows, scale=2, title=f"step {step}").save(aside, format="PNG")


if __name__ == "__main__":
    program.end(main())
