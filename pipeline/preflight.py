"""What a config names, and what of it would fail, found before a run begins and without a network.

Networks are looked at by their shape; a hub id is named, not asked; what lies at a URL is left to the run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch.nn import Module
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pipeline.config import Config
from pipeline.config_data import DataConfig
from pipeline.config_network import TextModelConfig, UnetConfig
from pipeline.data.index import ShardSet
from pipeline.data.latents import view_parts
from pipeline.data.order import check_ranks
from pipeline.data.store import is_url
from pipeline.errors import UsageError, blame
from pipeline.features import Backbone
from pipeline.heads import LogVariance, Projection
from pipeline.optim import hidden_weights
from pipeline.planning.work import (
    Build,
    Shape,
    count_beside,
    count_muon,
    count_projection,
    largest_block,
    num_parameters,
)
from pipeline.pretrained import resolved
from pipeline.provenance import open_latent_sets
from pipeline.run_folder import TRAINING, check_same
from vae.model import build as build_autoencoder
from vae.model import encoder_sha256
from vae.model import load as load_autoencoder
from vae.pretrained import HUB_ID
from vae.single_file import is_single_file

CLIP_TOKENS = 77  # of every CLIP text encoder that Stable Diffusion has
USUAL_CHANNELS, USUAL_FACTOR = 4, 8  # of Stable Diffusion's autoencoders
TAR_BLOCK_BYTES, NPY_HEADER_BYTES = 512, 128


@dataclass(frozen=True)
class Found:
    """What a config's names stand for, as far as can be seen from here."""

    shape: Shape
    num_unet: int  # parameters
    num_largest_block: int  # of one level of the U-Net
    num_autoencoder: int | None  # None: not looked at
    num_text: int | None  # None: not looked at; 0: there is none
    num_heads: int  # of heads that learn beside the U-Net
    operations_beside: int  # for each image, of heads, and of the autoencoder and text encoders that run in each step
    operations_of_update: int  # for each step on each rank: Muon's
    num_samples: int | None
    shard_bytes: int | None
    sample_bytes: int  # of latents as encode writes them
    notes: tuple[str, ...]  # what was not looked at, or assumed
    failures: tuple[str, ...]


def look(config: Config, num_ranks: int) -> Found:
    """Everything that the config names.  Raises UsageError where the U-Net's own shape can't be had."""
    notes: list[str] = []
    failures: list[str] = []
    channels, factor, autoencoder = _autoencoder(config, notes, failures)
    if config.data.image_size % factor:
        failures.append(
            f"data.image_size: {config.data.image_size} came, a multiple of the VAE's factor {factor} was wanted"
        )
    num_tokens, width, pooled, encoders = _text(config, notes, failures)
    unet = config.unet
    if unet.start_from is not None and _on_hub(unet.start_from):
        notes.append(f"unet.start_from: {unet.start_from} lies on the hub, not looked at; counted by the keys here")
    else:
        with blame("unet.start_from"):
            unet = resolved(unet)
    if width is not None and width != unet.cross_attention_dim:
        failures.append(f"unet.cross_attention_dim: {unet.cross_attention_dim} came, the captions' {width} was wanted")
    side = max(1, config.data.image_size // factor)
    shape = Shape(
        unet,
        config.conditioning,
        (channels, side, side),
        num_tokens,
        learned_variance=config.diffusion.variance_type == "learned_range",
        pooled_width=pooled,
    )
    try:
        num_unet, num_block = num_parameters(shape.build), largest_block(shape)
    except (ValueError, TypeError) as error:
        raise UsageError(f"unet: {str(error).partition(chr(10))[0]}") from error
    before = len(failures)
    num_samples, shard_bytes = _shards(config, notes, failures)
    features = _patch_features(config, notes, failures)
    if len(failures) == before:
        _provenance(config, pooled is not None, features, failures)
    _run_folder(config, unet, failures)
    failures += of_batch(config, num_ranks)
    failures += [
        f"evaluation.features: {each.title}: path {each.path!r} came, and nothing is there"
        for each in config.evaluation.features
        if each.path is not None and not _on_hub(each.path) and not Path(each.path).expanduser().exists()
    ]
    num_heads, operations_of_heads, head = _heads(config, shape, features)
    learns = config.conditioning.text is not None and config.conditioning.text.train
    builds = [shape.build, *(encoders or [] if learns else []), *([head] if head else [])]
    return Found(
        shape,
        num_unet,
        num_block,
        num_autoencoder=num_parameters(autoencoder) if autoencoder else None,
        num_text=None if encoders is None else sum(map(num_parameters, encoders)),
        num_heads=num_heads,
        operations_beside=_operations_beside(config, autoencoder, encoders, num_tokens, notes) + operations_of_heads,
        operations_of_update=sum(map(_update, builds)) if config.optimizer.kind == "muon" else 0,
        num_samples=num_samples,
        shard_bytes=shard_bytes,
        sample_bytes=sample_bytes(config.data, shape, features),
        notes=tuple(notes),
        failures=tuple(failures),
    )


def of_batch(config: Config, num_ranks: int) -> list[str]:
    """What is wrong with the number of ranks, the batch and its parts."""
    batch, micro = config.train.global_batch_images, config.train.micro_batch_images
    asked, found = config.engine.num_processes, list[str]()
    if asked not in (None, num_ranks):
        found.append(f"engine.num_processes: {asked} came, the check is for {num_ranks} ranks; say the same")
    try:
        check_ranks(num_ranks, lanes=config.data.lanes, global_batch=batch)
    except UsageError as error:
        return [*found, str(error)]
    if isinstance(micro, int) and (batch // num_ranks) % micro:
        found.append(
            f"train.micro_batch_images: {micro} came, but it must divide a rank's share of the batch, "
            f"{batch} / {num_ranks} = {batch // num_ranks}"
        )
    return found


def sample_bytes(data: DataConfig, shape: Shape, features: dict[str, Any] | None) -> int:
    """Of a sample of latents in its tar as encode writes it: a label or a short caption, then the parts of all views.

    Each view is fp16: mean and log-variance [2C,h,w]; features [P,D] of its patches, if they are asked for.
    """
    channels, height, width = shape.latent
    arrays = [2 * channels * height * width]
    if features is not None:
        arrays.append(features["side"] ** 2 * features["width"])
    views = len(view_parts(data.encode_crops, data.flip))
    return _in_tar(1) + views * sum(_in_tar(NPY_HEADER_BYTES + 2 * size) for size in arrays)


def _in_tar(num_bytes: int) -> int:
    """A header, and the content in whole blocks."""
    return TAR_BLOCK_BYTES * (1 + -(-num_bytes // TAR_BLOCK_BYTES))


def _shards(config: Config, notes: list[str], failures: list[str]) -> tuple[int | None, int | None]:
    """Samples and bytes of the sets that train reads; None where one can't be seen."""
    data = config.data
    key = "train_images" if data.train_latents is None else "train_latents"
    counts: list[tuple[int, int] | None] = [
        _shard_set(f"data.{key}", folder, notes, failures) for folder in data.train_latents or data.train_images
    ]
    for name in ("validation_images", "validation_latents"):
        folder = getattr(data, name)
        if folder is not None:
            _shard_set(f"data.{name}", folder, notes, failures)
    if None in counts:
        return None, None
    known = cast(list[tuple[int, int]], counts)
    return sum(samples for samples, _ in known), sum(size for _, size in known)


def _shard_set(key: str, folder: str, notes: list[str], failures: list[str]) -> tuple[int, int] | None:
    if is_url(folder):
        notes.append(f"{key}: {folder} lies at a URL, not looked at")
        return None
    try:
        with blame(key):
            shards = ShardSet(folder, open_shards=1)
    except UsageError as error:
        failures.append(str(error))
        return None
    if not len(shards):
        failures.append(f"{key}: {folder} holds no sample")
        return None
    return len(shards), sum(Path(shards.path(shard)).stat().st_size for shard in range(len(shards.names)))


def _patch_features(config: Config, notes: list[str], failures: list[str]) -> dict[str, Any] | None:
    """What train.alignment aligns with, where it lies in a folder."""
    alignment = config.train.alignment
    if alignment is None:
        return None
    if _on_hub(path := str(alignment.features.path)):
        notes.append(f"train.alignment.features: {path} lies on the hub, not looked at; its head is not counted")
        return None
    try:
        with blame("train.alignment.features"):
            return Backbone(alignment.features, torch.device("cpu")).describe_patches(config.data.image_size)
    except UsageError as error:
        failures.append(str(error))
        return None


def _provenance(config: Config, image_sizes: bool, features: dict[str, Any] | None, failures: list[str]) -> None:
    """Whether latents in folders are of the networks in folders; embeddings of captions are left to the run."""
    folders = config.data.train_latents
    if not folders or any(map(is_url, folders)) or not _config_json(Path(config.vae.path).expanduser(), "vae"):
        return
    try:
        with blame("vae.path"):
            sha256 = encoder_sha256(load_autoencoder(config.vae.path))
        open_latent_sets(config, sha256, text_encoder_sha256=None, image_sizes=image_sizes, features=features)
    except UsageError as error:
        failures.append(str(error))


def _run_folder(config: Config, unet: UnetConfig, failures: list[str]) -> None:
    """Whether the run's folder has checkpoints of another config."""
    folder = Path(config.run_dir)
    if any((folder / "checkpoints").glob("step-*")):
        try:
            check_same(folder, config.model_copy(update={"unet": unet}), TRAINING)
        except UsageError as error:
            failures.append(str(error))


def _operations_beside(
    config: Config, autoencoder: Build | None, encoders: list[Build] | None, num_tokens: int, notes: list[str]
) -> int:
    """Of an image that is encoded in each step, and of a caption."""
    text = config.conditioning.text
    if config.data.train_latents is None and autoencoder is None:
        notes.append("data.train_latents: null; what the autoencoder computes in each step is not counted")
    if text is not None and text.embeddings == "online" and encoders is None:
        notes.append("conditioning.text: online; what the text encoders compute in each step is not counted")
    return count_beside(config.data, text, autoencoder, encoders or [], num_tokens)


def _update(build: Build) -> int:
    """Muon's operations for a network."""
    with torch.device("meta"):
        return count_muon(hidden_weights(build()))


def _heads(config: Config, shape: Shape, features: dict[str, Any] | None) -> tuple[int, int, Build | None]:
    """Parameters of the heads, their operations for each image, forward and backward, and what builds U-REPA's."""
    count, operations, projection = 0, 0, None
    if config.diffusion.learned_weighting:
        count += num_parameters(LogVariance)
    if (alignment := config.train.alignment) is not None and features is not None:
        channels = shape.unet.block_out_channels

        def build() -> Projection:
            width = features["width"]
            return Projection(channels=channels[-1], hidden_width=alignment.hidden_width, width=width)

        count += num_parameters(build)
        operations += count_projection(build, channels, shape.latent[1])
        projection = build
    return count, operations, projection


def _autoencoder(config: Config, notes: list[str], failures: list[str]) -> tuple[int, int, Build | None]:
    """Latent channels, factor, what builds it."""
    path = config.vae.path
    place = Path(path).expanduser()
    if said := _config_json(place, "vae"):
        levels = len(said["block_out_channels"])
        return int(said["latent_channels"]), 2 ** (levels - 1), _of_config(AutoencoderKL, said)
    if _on_hub(path):
        notes.append(
            f"vae.path: {path} lies on the hub, not looked at; {USUAL_CHANNELS} channels and f={USUAL_FACTOR} are "
            "assumed, its memory is left out"
        )
        return USUAL_CHANNELS, USUAL_FACTOR, None
    if is_single_file(path) and place.is_file():
        notes.append(f"vae.path: {path} is a single file, not looked at; {USUAL_CHANNELS} channels, f={USUAL_FACTOR}")
        return USUAL_CHANNELS, USUAL_FACTOR, None
    model = config.vae.model
    failures.append(f"vae.path: {path} came, and there is no autoencoder; train one (train-vae), or correct the path")
    notes.append("vae.path: nothing there; counted by vae.model")
    factor = 2 ** (len(model.block_out_channels) - 1)
    return model.latent_channels, factor, lambda: build_autoencoder(model)


def _text(
    config: Config, notes: list[str], failures: list[str]
) -> tuple[int, int | None, int | None, list[Build] | None]:
    """Tokens L, their width, what is pooled, what builds the encoders; None where nothing says it."""
    text = config.conditioning.text
    if text is None:
        return 1, None, None, []
    if text.path is None:
        two = len(text.models) == 2
        pooled = text.models[1].width if two else None
        builds = [_from_scratch(model, two and i == 1) for i, model in enumerate(text.models)]
        return text.models[0].num_tokens, sum(model.width for model in text.models), pooled, builds
    folder = Path(text.path).expanduser()
    said = [_config_json(folder / name, None) for name in ("text_encoder", "text_encoder_2")]
    there = [each for each in said if each]
    if there:
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        builds = [_clip(kind, each) for kind, each in zip(kinds, there, strict=False)]
        pooled = int(there[1].get("projection_dim", 512)) if len(there) > 1 else None
        width = sum(int(each["hidden_size"]) for each in there)
        return int(there[0].get("max_position_embeddings", CLIP_TOKENS)), width, pooled, builds
    if _on_hub(text.path):
        notes.append(
            f"conditioning.text.path: {text.path} lies on the hub, not looked at; {CLIP_TOKENS} tokens are assumed, "
            "its memory is left out"
        )
    else:
        failures.append(f"conditioning.text.path: {text.path} came, and there is no text_encoder/ in it")
    return CLIP_TOKENS, None, None, None


def _config_json(folder: Path, inner: str | None) -> dict[str, Any] | None:
    for place in (folder, folder / inner) if inner else (folder,):
        if (place / "config.json").is_file():
            try:
                return json.loads((place / "config.json").read_text(encoding="utf-8"))
            except ValueError as error:
                raise UsageError(f"{place / 'config.json'}: not readable as JSON ({error}); restore it") from None
    return None


def _of_config(kind: type[ModelMixin], said: dict[str, Any]) -> Build:
    arguments = {key: value for key, value in said.items() if not key.startswith("_")}
    return lambda: cast(Module, cast(Any, kind).from_config(arguments))


def _clip(kind: Any, said: dict[str, Any]) -> Build:
    return lambda: kind(CLIPTextConfig(**said))


def _from_scratch(model: TextModelConfig, projected: bool) -> Build:
    settings = CLIPTextConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.width,
        intermediate_size=4 * model.width,
        projection_dim=model.width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        max_position_embeddings=model.num_tokens,
    )
    return lambda: (CLIPTextModelWithProjection if projected else CLIPTextModel)(settings)


def _on_hub(name: str) -> bool:
    place = Path(name).expanduser()
    return bool(HUB_ID.fullmatch(name)) and not place.exists() and not place.parent.exists()
