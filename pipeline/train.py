"""Train the latent diffusion model: DDPM's Algorithm 1 (Ho et al. 2020) on latents, told classes, captions or both.

To resume, run the same command again.
"""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import Module

from pipeline import files, program, sampler
from pipeline.attention import use_xformers
from pipeline.autoencoder import refuse_misfit
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.conditioning import Conditioning, Joint
from pipeline.config import Config
from pipeline.config_network import UnetConfig
from pipeline.data import latents, online
from pipeline.data.dataset import Samples, read_captions
from pipeline.data.pieces import (
    Caption,
    CaptionEmbedding,
    ClassLabel,
    Diffusion,
    Dropout,
    Moments,
    Piece,
    Pixels,
    PosteriorNoise,
    Sizes,
)
from pipeline.denoiser import objective_of
from pipeline.denoising import DenoisingLoss
from pipeline.denoising_strip import DENOISING, save_denoising
from pipeline.ema import profiles
from pipeline.engine import Engine
from pipeline.errors import UsageError, blame
from pipeline.evaluation import Evaluation
from pipeline.features import Backbone
from pipeline.heads import Heads, Projection, WithHeads, build_heads
from pipeline.metrics.pictures import labelled_grid
from pipeline.optim import UpdateRule, hidden_weights, learning_rate_at
from pipeline.pace import Work
from pipeline.planning.work import Shape, count_beside, count_muon, count_operations, count_projection
from pipeline.pretrained import open_pretrained, resolved
from pipeline.provenance import open_latent_sets
from pipeline.reporting.page import keep_report
from pipeline.run_folder import TRAINING, claim, write_status
from pipeline.sampler import Asked
from pipeline.strategies.choice import misfit
from pipeline.text import TextEncoders, Tokenizers, learn_tokenizer, open_text
from pipeline.training import Course, Training
from pipeline.unet import build_unet
from vae.model import encoder_sha256, load
from vae.moments import LatentScale, downsampling_factor, encode_moments, published_scale
from vae.preview import load_preview
from vae.tiles import in_tiles, tile_of

PICTURE_ROWS, PICTURE_COLUMNS = 10, 4  # of a picture while training: classes or captions, images of each


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("train", __doc__ or "")
    return program.run_config(made, argv, train, lambda raw: raw.get("run_dir"))


def train(config: Config, args: argparse.Namespace) -> None:
    """config → engine → frozen networks, captions' words → data → U-Net, heads, optimizer, EMA → resume → steps."""
    del args
    run = Path(config.run_dir)
    engine = Engine(config.engine)
    if wrong := misfit(config.optimizer, engine.strategy):
        raise UsageError(wrong)
    with blame("unet.start_from"):
        config = config.model_copy(update={"unet": resolved(config.unet)})
    engine.main_does(lambda: claim(run, config, TRAINING))

    # frozen VAE, text encoders
    with blame("vae.path"):
        vae = load(config.vae.path)
    refuse_misfit(vae, config.data.image_size)
    with blame("vae.tile_pixels"):
        in_tiles(vae, config.vae.tile_pixels)
    Module.to(vae, engine.device)
    side = config.data.image_size // downsampling_factor(vae)
    latent_shape = (int(vae.config["latent_channels"]), side, side)

    condition = config.conditioning
    text = None
    if condition.text is not None:
        with blame("conditioning.text"):
            if condition.text.models:
                engine.main_does(lambda: learn_words(run, config))
            text = open_text(condition.text, run / "text", config.seed).to(engine.device)
            check_width(config.unet, text)

    # data: latents know which VAE made them, and at what scale
    def moments_of(x: Tensor) -> Tensor:
        """x [B,3,H,W] on any device → moments [B,2C,h,w]."""
        with torch.no_grad(), engine.autocast():
            return encode_moments(vae, x.to(engine.device))

    alignment, features = config.train.alignment, None
    if alignment is not None:
        with blame("train.alignment.features"):
            features = Backbone(alignment.features, torch.device("cpu")).describe_patches(config.data.image_size)
    if config.data.train_latents is None:
        folders, described = config.data.train_images, describe_online(config, engine, vae, moments_of)
        read: Piece = Pixels(config.seed, config.data.image_size, config.data.crop, config.data.flip)
    else:
        folders = config.data.train_latents
        cached = condition.text is not None and condition.text.embeddings == "cached"
        described = open_latent_sets(
            config,
            encoder_sha256(vae),
            text_encoder_sha256=text.sha256() if text and cached else None,
            image_sizes=text is not None and text.pooled_width is not None,
            features=features,
        )
        num_crops = config.data.encode_crops if config.data.crop == "random" else 1
        grid = (features["side"] ** 2, features["width"]) if features else None
        read = Moments(config.seed, latent_shape, num_crops, config.data.flip, grid)
    latent_scale = LatentScale(described["scale"], described["shift"])
    if config.vae.latent_scale == "own":
        with blame("vae.latent_scale: own"):
            latent_scale = published_scale(vae)
    preview = None
    if config.vae.preview is not None:
        with blame("vae.preview"):
            preview = load_preview(config.vae.preview, vae, latent_scale)
    pieces = (
        read,
        PosteriorNoise(config.seed, latent_shape),
        Diffusion(config.seed, latent_shape, config.train.global_batch_images, config.diffusion.timestep_draw),
        Dropout(config.seed, condition.dropout),
        *told_pieces(config, text),
    )
    with blame("data"):
        samples = Samples.of(folders, pieces, seed=config.seed, data=config.data)

    # U-Net, optimizer, EMA; resume
    objective = objective_of(config.diffusion, engine.device)
    with blame("unet.start_from" if config.unet.start_from else "unet"):
        start = open_pretrained(config.unet)
        unet = build_unet(
            config.unet,
            config.conditioning,
            latent_shape,
            config.seed,
            learned_variance=config.diffusion.variance_type == "learned_range",
            pooled_width=text.pooled_width if text else None,
            start=start,
        )
    shape = Shape(
        config.unet,
        condition,
        latent_shape,
        text.words.num_tokens if text else 1,
        learned_variance=config.diffusion.variance_type == "learned_range",
        pooled_width=text.pooled_width if text else None,
    )
    started_from = start.record if start else None
    del start  # its weights, when the network's own have gone to the device
    if config.engine.attention == "xformers":
        use_xformers(unet)
    if config.engine.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    conditioning = Conditioning(condition, text, unet.config)
    if text is not None and conditioning.is_cached:
        text.to(torch.device("cpu"))  # it is asked for pictures only
    learners = text if conditioning.learns else None  # the text encoders, where they learn
    network = Joint(unet, learners) if learners else unet
    learned_weighting = config.diffusion.learned_weighting
    with blame("unet"):
        width = features["width"] if features else 0
        heads = build_heads(alignment, learned_weighting, unet, width=width, seed=config.seed)
    settings = config.optimizer
    module = WithHeads(network, heads) if heads else network
    of_update = count_muon(hidden_weights(module)) if settings.kind == "muon" else 0
    training = Training(
        engine,
        run,
        models={"unet": unet} | (learners.named if learners else {}) | heads,
        module=module,
        profiles=profiles(config.ema),
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
                decay_start_steps=settings.decay_start_steps,
            ),
            rule=UpdateRule(
                betas=(settings.beta1, settings.beta2),
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                clip_norm=settings.gradient_clip_norm,
                muon_momentum=settings.muon_momentum if settings.kind == "muon" else None,
            ),
        ),
        config=config,
        record={
            "latents": {"scale": latent_scale.scale, "shift": latent_scale.shift, "origin": described["origin"]},
            "started_from": started_from,
            "text": text.description(conditioning.learns) if text else None,
        },
        work=Work.on(
            engine.device,
            config.engine.precision,
            count_operations(shape, checkpointing=False).training
            + operations_beside(config, vae, text, heads)
            + of_update * engine.num_ranks // config.train.global_batch_images,
        ),
    )

    loss_of = DenoisingLoss(
        objective,
        latent_scale,
        conditioning,
        engine.autocast,
        moments_of,
        learned_weighting=learned_weighting,
        alignment=alignment,
    )

    def averaged(*, everywhere: bool) -> ClassConditionalPipeline | None:
        """The trainer's own sampler with the first average, on rank 0 or on all ranks.  A collective."""
        drawing = [model for model in training.learner.models if model not in heads]
        weights = {model: training.learner.averaged(model, everywhere=everywhere) for model in drawing}
        if not (everywhere or engine.is_main):
            return None
        unet_now = sampler.frozen_unet(unet.config, weights.pop("unet"), engine.device)
        text_now = text.with_weights(weights) if text else None
        pipe = sampler.assemble(unet_now, vae, latent_scale, config.diffusion, condition.class_names, text=text_now)
        return pipe.to(engine.device)

    titled: Any = engine.main_does(lambda: sampler.rows_of(config, PICTURE_ROWS))
    rows = [(title, Asked(*ask)) for title, ask in titled]
    evaluation = Evaluation(engine, config) if config.evaluation.scores_every_steps else None
    if evaluation is not None:
        evaluation.make_light()
    average, taken_up = profiles(config.ema)[0].name, training.step
    for step in training.steps(loss_of, long_after=evaluation.is_due if evaluation else None):
        is_shown = step % config.evaluation.every_steps == 0
        if is_shown and step == taken_up:  # drawn before, unless it was killed between the checkpoint and the picture
            is_shown = not engine.main_does(lambda step=step: picture_of(run, step).exists())
        is_scored = evaluation is not None and evaluation.is_due(step) and not evaluation.is_recorded(step, average)
        if not (is_shown or is_scored):
            continue
        pipe = averaged(everywhere=is_scored)
        if is_shown and engine.is_main and pipe is not None:
            pipe.register_modules(vae=preview or vae)
            save_picture(run, step, config, pipe, rows)
            save_denoising(run / "evaluation" / DENOISING, pipe, rows, config, title=f"step {step}")
            pipe.register_modules(vae=vae)
        if is_scored and evaluation is not None and pipe is not None:
            evaluation.in_training(
                pipe, step, average, training.go_on, unwatched=training.unwatched, note=training.journal.note
            )
        if engine.is_main:
            keep_report(run)
        if text is not None and conditioning.is_cached:
            text.to(torch.device("cpu"))
    engine.main_does(lambda: write_status(run, "done", step=config.train.steps))
    if engine.is_main:
        keep_report(run)
        program.say(f"trained {config.train.steps} steps; the checkpoints are in {run / 'checkpoints'}")


def learn_words(run: Path, config: Config) -> None:
    """RUN/text: the tokenizers of text encoders from scratch, learned once from the captions of the training set."""
    assert config.conditioning.text is not None
    if not (run / "text").exists():
        captions = read_captions(config.data.train_latents or config.data.train_images, config.data.remote)
        each = tuple(learn_tokenizer(captions, shape) for shape in config.conditioning.text.models)
        with files.whole_folder(run / "text") as aside:
            Tokenizers(each).save(aside)


def check_width(unet: UnetConfig, text: TextEncoders) -> None:
    """Raise UsageError where the U-Net reads tokens of another width than the text encoders give."""
    if unet.cross_attention_dim != text.width:
        raise UsageError(
            f"its tokens are {text.width} wide, unet.cross_attention_dim={unet.cross_attention_dim} came; the same was "
            "wanted"
        )


def told_pieces(config: Config, text: TextEncoders | None) -> list[Piece]:
    """What each sample brings of its condition."""
    condition, data = config.conditioning, config.data
    found: list[Piece] = [ClassLabel(condition.num_classes)] if condition.has_class else []
    if text is not None and condition.text is not None:
        cached = condition.text.embeddings == "cached"
        shapes = latents.text_parts(text.words.num_tokens, text.width, text.pooled_width)
        found.append(CaptionEmbedding(tuple(shapes)) if cached else Caption(text.words))
        if text.pooled_width is not None:
            num_crops = None if data.train_latents is None else data.encode_crops
            found.append(Sizes(config.seed, data.image_size, data.crop, data.flip, num_crops))
    return found


def operations_beside(config: Config, vae: AutoencoderKL, text: TextEncoders | None, heads: Heads) -> int:
    """For one image, of heads, and of the autoencoder and the text encoders that run in each step."""
    projection, total = heads.get("projection"), 0
    if projection is not None:
        side = config.data.image_size // downsampling_factor(vae)
        build = partial(cast(Any, Projection.from_config), projection.config)
        total += count_projection(build, config.unet.block_out_channels, side)
    return total + count_beside(
        config.data,
        config.conditioning.text,
        lambda: cast(Module, AutoencoderKL.from_config(vae.config)),
        [partial(type(model), model.config) for model in text.models] if text else [],
        text.words.num_tokens if text else 1,
    )


def describe_online(
    config: Config, engine: Engine, vae: AutoencoderKL, moments_of: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """The scale and origin of latents that are made in the steps, of images cut in the centre."""
    data = config.data
    with blame("data.train_images"):
        samples = Samples.of(data.train_images, (Pixels(config.seed, data.image_size),), seed=config.seed, data=data)
    origin = {
        "encoder_sha256": encoder_sha256(vae),
        "image_size": data.image_size,
        "tile_pixels": tile_of(data.image_size, config.vae.tile_pixels),
        "precision": config.engine.precision,
        "source_fingerprint": samples.fingerprint,
    }
    return engine.main_does(
        lambda: online.describe(
            Path(config.run_dir),
            samples,
            moments_of,
            origin=origin,
            num_images=data.online_scale_images,
            batch_images=data.encode_batch_images,
            workers=data.workers,
        )
    )


def picture_of(run: Path, step: int) -> Path:
    """RUN/samples/step-N.png."""
    return run / "samples" / f"step-{step:09d}.png"


def save_picture(
    run: Path, step: int, config: Config, pipe: ClassConditionalPipeline, rows: Sequence[tuple[str, Asked]]
) -> None:
    """A row of images of each title and what it asks for, from the same noise each time."""
    drawn = sampler.draw_rows(pipe, rows, PICTURE_COLUMNS, config)
    with files.whole(picture_of(run, step)) as aside:
        labelled_grid(drawn, scale=2, title=f"step {step}").save(aside, format="PNG")


if __name__ == "__main__":
    program.end(main())
