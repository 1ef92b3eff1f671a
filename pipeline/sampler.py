"""The trainer's own sampler: a pipeline put together from its parts, images that are functions of (seed, index)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils.constants import HF_MODULES_CACHE
from diffusers.utils.logging import disable_progress_bar
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm
from transformers.utils import logging

from pipeline import files
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.config import Config
from pipeline.config_diffusion import DiffusionConfig
from pipeline.data.dataset import read_told, spaced
from pipeline.data.draws import Purpose, integer_seed
from pipeline.data.images import to_pixels
from pipeline.data.index import ShardSet
from pipeline.denoiser import scheduler_of
from pipeline.errors import RunError, UsageError, blame
from pipeline.locks import Locks
from pipeline.text import TextEncoders
from vae import tiles
from vae.moments import LatentScale

PASSPORT = "training.json"  # in an export: which checkpoint it is of
OPENING = Locks(Path(HF_MODULES_CACHE) / "opening.lock")


class Asked(NamedTuple):
    """What an image is asked to show; None: what the model isn't told."""

    label: int | None = None
    prompt: str | None = None


def assemble(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    latent_scale: LatentScale,
    diffusion: DiffusionConfig,
    class_names: Sequence[str] | None,
    *,
    text: TextEncoders | None = None,
) -> ClassConditionalPipeline:
    """The pipeline that an export is: its scheduler says what the schedule means, its VAE how latents are scaled."""
    vae.register_to_config(scaling_factor=latent_scale.scale, shift_factor=latent_scale.shift or None)
    vae.register_to_config(latents_mean=None, latents_std=None)  # a scale for each channel, which was not used
    names, parts = list(class_names) if class_names else None, text.components if text else {}
    pipe = ClassConditionalPipeline(vae, unet, scheduler_of(diffusion), names, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frozen_unet(unet_config: Any, weights: dict[str, Tensor], device: torch.device) -> UNet2DConditionModel:
    """A U-Net of diffusers' config with these fp32 weights, frozen."""
    unet: Any = UNet2DConditionModel.from_config(unet_config)
    unet.load_state_dict(weights)
    unet.requires_grad_(False)
    Module.to(unet, device)
    return unet.eval()


def sample_seeds(seed: int, indices: Sequence[int]) -> list[int]:
    """The seed of each image of a run's samples: a function of (seed, index)."""
    return [integer_seed(seed, Purpose.SAMPLE, index) for index in indices]


def rows_of(config: Config, limit: int) -> list[tuple[str, Asked]]:
    """Titles and what they ask for, for pictures: the first classes, or captions of held-out images (else training's).

    Of captions no two are the same; they are of one shard, since each shard may have to come from afar.  Raises
    UsageError where there are none.
    """
    condition, data, with_class = config.conditioning, config.data, config.conditioning.has_class
    if condition.text is None:
        names = condition.class_names or [str(i) for i in range(condition.num_classes)]
        return [(names[label], Asked(label)) for label in range(min(limit, condition.num_classes))]
    for location in filter(None, (data.validation_images, *data.train_images)):
        shards = ShardSet(location, open_shards=1, remote=data.remote)
        shard = max(range(len(shards.counts)), key=shards.counts.__getitem__)
        places = [(shard, row) for row in spaced(shards.counts[shard], 8 * limit)]
        told = read_told(shards, places)
        found = {text: Asked(label, text) for label, text in told if text and (label is not None or not with_class)}
        if found:
            return list(found.items())[:: max(1, len(found) // limit)][:limit]
    raise UsageError(f"data: no image has a caption{' and a label' * with_class}, which conditioning.kind wants")


def told_of(pipe: ClassConditionalPipeline, asked: Sequence[Asked]) -> dict[str, Any]:
    """What a model is asked for B images, as arguments of the pipeline: those of them that it knows."""
    given: dict[str, Any] = {}
    if pipe.num_classes:
        given["class_labels"] = [one.label for one in asked]
    if pipe.text_encoders:
        given["prompt"] = [one.prompt for one in asked]
    return given


def passport_of(export: Path) -> dict[str, Any]:
    """Which checkpoint and average an export is of.  Raises UsageError where it doesn't say."""
    try:
        said = files.read_json(export / PASSPORT)
        return {name: str(said[name]) for name in ("checkpoint", "ema")}
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{export / PASSPORT}: the checkpoint and average of the export were wanted "
            f"({type(error).__name__}: {error}); export again"
        ) from error


def open_export(
    folder: Path, device: torch.device | str, *, tile_pixels: int | None = None
) -> ClassConditionalPipeline:
    """An export, opened as any user of diffusers would.  Raises UsageError where none is there.

    A text model's is a stock pipeline; its parts are taken over, so that it is asked in the same way as any other.
    `tile_pixels`: as vae.tile_pixels; UsageError too where they don't fit its autoencoder.
    """
    if not (folder / "model_index.json").exists():
        raise UsageError(f"{folder}: no export here; run: python -m pipeline export with this config")
    pipe = open_folder(folder)
    if type(pipe).__name__ != ClassConditionalPipeline.__name__:
        parts = ("vae", "unet", "scheduler", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
        taken: dict[str, Any] = {name: getattr(pipe, name, None) for name in parts}
        pipe = ClassConditionalPipeline(**taken)
    with blame("vae.tile_pixels"):
        tiles.in_tiles(pipe.vae, tile_pixels)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def image_size_of(pipe: ClassConditionalPipeline) -> int:
    """The side of the images that it draws, pixels."""
    return int(pipe.unet.config["sample_size"] * pipe.image_processor.config["vae_scale_factor"])


def tile_of(pipe: ClassConditionalPipeline) -> int | None:
    """The side of the tiles that its images are decoded in, pixels; None: whole."""
    return tiles.tile_of(image_size_of(pipe), pipe.vae.tile_sample_min_size if pipe.vae.use_tiling else None)


def open_folder(folder: Path) -> Any:
    """A diffusers pipeline, opened without progress bars.  Raises UsageError where the folder is broken."""
    disable_progress_bar()  # of loading a few small files
    logging.disable_progress_bar()
    try:
        named: dict[str, Any] = files.read_json(folder / "model_index.json")
        for part, kind in named.items():  # transformers would make a tokenizer of two words where there is none
            is_model = isinstance(kind, list) and kind[:1] in (["diffusers"], ["transformers"])
            if is_model and not (folder / part).is_dir():
                raise FileNotFoundError(f"no folder {part}/")
        with quiet_imports(), one_at_a_time(folder):
            pipe: Any = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:  # whatever diffusers, transformers and safetensors stumble over
        told = " ".join(str(error).split())[:300]
        raise UsageError(f"{folder}: can't be opened ({type(error).__name__}: {told}); export it anew") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cast(pipe: Any, dtype: torch.dtype) -> None:
    """Give all networks of a pipeline this dtype, all their layers."""
    for model in pipe.components.values():
        if isinstance(model, Module):
            Module.to(model, dtype)


@contextmanager
def quiet_imports() -> Generator[None]:
    """transformers doesn't say that torchvision is missing, which nothing here wants."""
    was = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(was)


def one_at_a_time(folder: Path) -> AbstractContextManager[object]:
    """For opening a folder that has code: diffusers copies it to a place that all processes share, and reads it there.

    Without this a rank may read what another has only begun to write.
    """
    if not (folder / "pipeline.py").exists():
        return nullcontext()
    OPENING.path.parent.mkdir(parents=True, exist_ok=True)
    return OPENING.alone(0, wait=True)


def draw(
    pipe: ClassConditionalPipeline,
    asked: Sequence[Asked],
    indices: Sequence[int],
    *,
    seed: int,
    guidance_scale: float,
    num_inference_steps: int,
    batch_images: int,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guide: UNet2DConditionModel | None = None,
    bar: tqdm[Any] | None = None,
) -> NDArray[np.uint8]:
    """uint8 [N,H,W,3]: image i shows asked[i] and starts from the noise of (seed, indices[i])."""
    images: list[NDArray[np.uint8]] = []
    seeds = sample_seeds(seed, indices)
    for first in range(0, len(asked), batch_images):
        part = slice(first, first + batch_images)
        how: dict[str, Any] = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
        how |= {"guidance_interval": guidance_interval, "guide": guide}
        images.append(draw_batch(pipe, asked[part], seeds[part], **how))
        if bar is not None:
            bar.update(len(images[-1]))
    return np.concatenate(images)


def draw_rows(
    pipe: ClassConditionalPipeline, rows: Sequence[tuple[str, Asked]], columns: int, config: Config
) -> list[tuple[str, list[NDArray[np.uint8]]]]:
    """`columns` images uint8 [H,W,3] of each row, the same noise each time, at the last guidance scale."""
    settings = config.evaluation
    asked = [ask for _, ask in rows for _ in range(columns)]
    pixels = draw(
        pipe,
        asked,
        range(len(asked)),
        seed=config.seed,
        guidance_scale=settings.guidance_scales[-1],
        num_inference_steps=settings.num_inference_steps,
        batch_images=settings.batch_images,
    )
    return [(title, list(pixels[i * columns : (i + 1) * columns])) for i, (title, _) in enumerate(rows)]


def draw_batch(
    pipe: ClassConditionalPipeline, asked: Sequence[Asked], seeds: Sequence[int], **how: Any
) -> NDArray[np.uint8]:
    """uint8 [B,H,W,3] in one call of the pipeline; `how`: its other arguments.

    Raises ValueError as it does, and RunError for an image that is not finite.
    """
    x = pipe(**told_of(pipe, asked), seeds=seeds, output_type="pt", **how)
    pixels = x.images if not isinstance(x, tuple) else x[0]
    assert isinstance(pixels, torch.Tensor)
    if broken := (~pixels.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist():
        raise RunError(
            f"{len(broken)} of {len(pixels)} drawn images hold a NaN or an infinity, first number {broken[0]} from 0; "
            "the weights or the autoencoder are broken, or compute in too few bits"
        )
    return to_pixels(pixels.cpu() * 2 - 1)
