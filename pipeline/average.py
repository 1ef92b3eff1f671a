"""Averaged weights in a run: which ones, by name, and the pipeline that they make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from pipeline import checkpoint, program, sampler
from pipeline.checkpoint import BrokenError, Checkpoint, weights_stem
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.config import Config
from pipeline.ema import profiles
from pipeline.errors import RunError, UsageError, blame
from pipeline.learner import TRANSFORMERS_WEIGHTS
from pipeline.text import TextEncoders, open_text
from vae.model import encoder_sha256, load
from vae.moments import LatentScale


@dataclass(frozen=True)
class Average:
    """Averaged weights: their name, where they lie, and the state that says what they were trained on."""

    name: str
    found: Checkpoint
    folder: str  # in `found`: with the U-Net's config.json and the weights

    def __str__(self) -> str:
        """For a person."""
        return self.name if self.found.path.name == self.name else f"{self.name} of {self.found.path.name}"


def find_average(config: Config, name: str | None = None, step: int | None = None) -> Average:
    """The average of this name: one of a checkpoint, or one that was reconstructed.

    None: the config's first; the newest whole checkpoint.  Raises UsageError, naming what there is, where there is
    none; RunError for one that is broken.
    """
    run = Path(config.run_dir)
    made = run / "ema" / "reconstructed"
    if name is not None and (made / name / "manifest.json").is_file():
        if step is not None:
            raise UsageError(f"--step: {step} came with --ema {name}, which is of a step already; leave --step out")
        try:
            return Average(name, checkpoint.verify(made / name), ".")
        except BrokenError as error:
            raise RunError(f"{error}; make it again: python -m pipeline ema with this config") from None
    found = newest_checkpoint(run) if step is None else checkpoint_of(run, step)
    name = profiles(config.ema)[0].name if name is None else name
    if name not in found.profiles():
        known = [*found.profiles(), *sorted(path.name for path in made.glob("power-*"))]
        raise UsageError(f"--ema: {name!r} came; known: {', '.join(known)}")
    return Average(name, found, f"ema/{name}")


def checkpoint_of(run: Path, step: int) -> Checkpoint:
    """The checkpoint of a step.  Raises UsageError where it is not there, RunError where it is broken."""
    path = run / "checkpoints" / f"step-{step:09d}"
    if not path.is_dir():
        known = [str(int(each.name.removeprefix("step-"))) for each in checkpoint.list_steps(path.parent)]
        raise UsageError(f"--step: {step} came; there are checkpoints of step {', '.join(known) or 'none'}")
    try:
        return checkpoint.verify(path)
    except BrokenError as error:
        raise RunError(str(error)) from None


def newest_checkpoint(run: Path) -> Checkpoint:
    """The newest whole checkpoint of a run.  Raises UsageError where there is none."""
    found, wrong = checkpoint.newest(run / "checkpoints")
    for reason in wrong:
        program.say(f"warning: passing over a broken checkpoint: {reason}")
    if found is None:
        raise UsageError(f"{run / 'checkpoints'}: no whole checkpoint; train with this config first")
    return found


def open_vae(config: Config, found: Checkpoint) -> AutoencoderKL:
    """The autoencoder that decodes.  Raises UsageError where its encoder is not that of the checkpoint's latents."""
    with blame("vae.path"):
        vae = load(config.vae.path)
    digest, said = encoder_sha256(vae), found.state["latents"]["origin"]["encoder_sha256"]
    if said != digest:
        raise UsageError(
            f"vae.path: an autoencoder with the encoder {digest[:12]} came; {found.path} was trained on latents of the "
            f"encoder {said[:12]}"
        )
    return vae


def checkpoint_pipeline(config: Config, average: Average, vae: AutoencoderKL | None = None) -> ClassConditionalPipeline:
    """The trainer's own sampler with averaged weights.  `vae`: see `open_vae`, which opens it where none is given."""
    found = average.found
    vae = vae or open_vae(config, found)
    said = found.state["latents"]
    weights = found.tensors(weights_stem(average.folder))
    unet_config = UNet2DConditionModel.load_config(found.path / average.folder)
    averaged = sampler.frozen_unet(unet_config, weights, torch.device("cpu"))
    scale = LatentScale(said["scale"], said["shift"])
    names, text = config.conditioning.class_names, checkpoint_text(config, average)
    return sampler.assemble(averaged, vae, scale, config.diffusion, names, text=text)


def checkpoint_text(config: Config, average: Average) -> TextEncoders | None:
    """The text encoders: averaged ones where they learned, else those that the config names.

    Raises UsageError where they are not those that the U-Net was trained with.
    """
    settings = config.conditioning.text
    if settings is None:
        return None
    with blame("conditioning.text"):
        text = open_text(settings, Path(config.run_dir) / "text", config.seed)
    now, said = text.description(settings.train), average.found.state["text"]
    if now != said:
        raise UsageError(f"conditioning.text: {now} came; {average.found.path} was trained with {said}")
    if not settings.train:
        return text
    stems = {name: f"{average.folder}/{name}/{TRANSFORMERS_WEIGHTS}" for name in text.named}
    return text.with_weights({name: average.found.tensors(stem) for name, stem in stems.items()})
