"""Train the autoencoder on images: pixels → posterior moments → a sample of them → pixels.

It begins with random weights or with an autoencoder that is there, all of it or its decoder alone, and may play against
a discriminator.  The result, in vae.run_dir/autoencoder, is a diffusers AutoencoderKL; measured/ beside it tells how
good it is.  To resume, run the same command again.
"""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from pipeline import files, program
from pipeline.autoencoder import normalised, open_eyes, refuse_misfit, refuse_missing, refuse_small
from pipeline.config import Config
from pipeline.data.dataset import Samples, read_images
from pipeline.data.draws import Purpose, integer_seed
from pipeline.data.images import to_unit
from pipeline.data.pieces import ClassLabel, Piece, Pixels, PosteriorNoise, Transform
from pipeline.engine import Engine
from pipeline.errors import UsageError, blame
from pipeline.health import Health, thumbnails
from pipeline.measuring import measure, show
from pipeline.optim import UpdateRule, learning_rate_at
from pipeline.run_folder import claim, write_status
from pipeline.training import Adversary, Course, Training
from vae.config import AdversaryConfig
from vae.discriminator import PatchDiscriminator, build_discriminator
from vae.model import build, freeze_encoder, load, open_trainable, weights_sha256
from vae.moments import downsampling_factor
from vae.objective import Objective
from vae.steps import AutoencoderStep

IDENTITY = ("seed", "data", "vae", "engine")
HEALTH_IMAGES = 256  # whose reconstructions are looked at while training
NEIGHBOURS = 5  # k of coverage: of no more images than that there is none
SHOWN = ("reconstruction", "discriminator/accuracy_real", "discriminator/accuracy_fake")  # on the progress bar


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("train-vae", __doc__ or "")
    return program.run_config(made, argv, train_vae, lambda raw: raw.get("vae", {}).get("run_dir"))


def train_vae(config: Config, args: argparse.Namespace) -> None:
    """config → engine → autoencoder → data → losses, adversary → resume → steps → the diffusers folder → figures."""
    del args
    run, settings = Path(config.vae.run_dir), config.vae.train
    engine = Engine(config.engine)
    engine.main_does(lambda: claim(run, config, IDENTITY))

    # autoencoder
    if settings.start_from is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer_seed(config.seed, Purpose.INITIAL_WEIGHTS, 1))
            autoencoder = build(config.vae.model)
    else:
        with blame("vae.train.start_from"):
            autoencoder = open_trainable(settings.start_from)
    started_from = None if settings.start_from is None else weights_sha256(autoencoder)
    if settings.trained == "decoder":
        freeze_encoder(autoencoder)
    if config.engine.compile and settings.equivariance_share:
        raise UsageError(
            "engine.compile: true with vae.train.equivariance_share came, which gives the decoder another size in each "
            "step, to be compiled anew; compile: false was wanted"
        )
    refuse_misfit(autoencoder, config.data.image_size, "vae.train.start_from" if settings.start_from else "vae.model")
    if config.engine.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()

    # data
    refuse_missing(config)
    side = config.data.image_size // downsampling_factor(autoencoder)
    pieces: list[Piece] = [
        Pixels(config.seed, config.data.image_size, config.data.crop, config.data.flip),
        PosteriorNoise(config.seed, (int(autoencoder.config["latent_channels"]), side, side)),
    ]
    if settings.equivariance_share:
        pieces.append(Transform(config.seed, settings.global_batch_images, settings.equivariance_share))
    if settings.adversary is not None and settings.adversary.class_conditional:
        pieces.append(ClassLabel(config.conditioning.num_classes))
    with blame("data.train_images"):
        samples = Samples.of(config.data.train_images, tuple(pieces), seed=config.seed, data=config.data)

    # losses, adversary
    eyes = open_eyes(config, engine)
    discriminator = adversary = None
    if settings.adversary is not None:
        check_game(config, settings.adversary, engine)
        discriminator = build_discriminator(
            settings.adversary.discriminator,
            int(autoencoder.config["in_channels"]),
            integer_seed(config.seed, Purpose.INITIAL_WEIGHTS, 2),
            num_classes=config.conditioning.num_classes if settings.adversary.class_conditional else None,
        )
    objective = Objective(
        settings,
        autoencoder,
        discriminator=discriminator,
        perceptual=eyes.distance if eyes else None,
        autocast=engine.autocast,
        mean_over_ranks=engine.mean,
        device=engine.device,
    )
    if settings.adversary is not None and discriminator is not None:
        adversary = adversary_of(settings.adversary, discriminator, objective)
    looked_at: list[NDArray[np.float32]] = []
    if discriminator is not None:  # coverage is what the game can lose
        engine.main_does(lambda: looked_at.append(images_to_look_at(config)))
    health = Health(
        run,
        looked_at[0] if looked_at and len(looked_at[0]) > NEIGHBOURS else None,
        eyes.features if eyes else thumbnails,
        batch_images=config.evaluation.batch_images,
    )

    training = Training(
        engine,
        run,
        models={"autoencoder": autoencoder},
        module=AutoencoderStep(autoencoder),
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
        record={"started_from": started_from},
        adversary=adversary,
        carried=objective.carried | {"best_coverage": health.best_coverage},
        shown=SHOWN,
    )

    def loss_of(model: Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return objective.autoencoder_loss(model, batch, training.step)

    if engine.is_main:
        health.begin(training.step)
    for step in training.steps(loss_of):
        objective.settle()
        if step % settings.check_every_steps == 0 and engine.is_main:
            training.journal.note(step, health.look(step, autoencoder, training.journal.newest))

    # the diffusers folder, and figures
    normalisation = settings.latent_normalisation
    trained = run / ("autoencoder" if normalisation == "none" else "unnormalised")
    weights = training.learner.whole("autoencoder")
    engine.main_does(lambda: save(with_weights(autoencoder, weights), trained))
    finished = load(trained)
    if normalisation != "none":
        with blame(f"vae.train.latent_normalisation={normalisation}"):
            finished = normalised(engine, finished, config, normalisation)
        engine.main_does(lambda: save(finished, run / "autoencoder"))
    scores = measure(
        engine,
        finished,
        config,
        run / "measured",
        perceptual=eyes.distance if eyes else None,
        bound_images=config.evaluation.likelihood.num_images,
    )
    engine.main_does(lambda: write_status(run, "done", step=settings.steps))
    if engine.is_main:
        show(scores, run / "measured")
        program.say(f"the autoencoder {weights_sha256(finished)[:12]} is in {run / 'autoencoder'}")


def check_game(config: Config, rules: AdversaryConfig, engine: Engine) -> None:
    """Raise UsageError where the discriminator can't play."""
    if engine.strategy != "ddp":
        raise UsageError(
            f"vae.train.adversary: engine.strategy={engine.strategy} came, ddp was wanted: two networks learn in "
            "turns, each through the other, which weights in parts don't allow; an autoencoder fits a GPU whole"
        )
    with blame(f"vae.train.adversary.discriminator.num_downsamplings={rules.discriminator.num_downsamplings}"):
        refuse_small(config, rules.discriminator.smallest_side)
    if rules.class_conditional and not config.conditioning.has_class:
        raise UsageError("vae.train.adversary.class_conditional wants classes; conditioning.kind=text has none")


def adversary_of(rules: AdversaryConfig, discriminator: PatchDiscriminator, objective: Objective) -> Adversary:
    """The discriminator as the training's second player."""
    return Adversary(
        name="discriminator",
        model=discriminator,
        rule=UpdateRule(
            betas=(rules.beta1, rules.beta2), eps=1e-8, weight_decay=0.0, clip_norm=rules.gradient_clip_norm
        ),
        learning_rate=rules.learning_rate,
        loss_of=objective.discriminator_loss,
        plays=objective.plays,
    )


def images_to_look_at(config: Config) -> NDArray[np.float32]:
    """Some held-out images, or else some to train on: float32 [N,3,H,W] in [-1,1]."""
    data = config.data
    key = "data.train_images" if data.validation_images is None else "data.validation_images"
    with blame(key):
        where = data.validation_images or data.train_images[0]
        return to_unit(read_images(where, size=data.image_size, limit=HEALTH_IMAGES, remote=data.remote).pixels)


def with_weights(like: AutoencoderKL, weights: dict[str, Tensor]) -> AutoencoderKL:
    """An autoencoder of this shape and these fp32 weights, apart from what a wrapper may have done to the other."""
    made = cast(AutoencoderKL, AutoencoderKL.from_config(like.config))
    made.load_state_dict(weights)
    return made


def save(autoencoder: AutoencoderKL, folder: Path) -> None:
    """Write the diffusers folder, whole."""
    with files.whole_folder(folder) as aside:
        autoencoder.save_pretrained(aside)


if __name__ == "__main__":
    program.end(main())
