"""The autoencoder of a run and its images: whether they fit, the statistics of its latents, what looks at it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from diffusers import AutoencoderKL
from torch.nn import Module
from tqdm import tqdm

from pipeline.config import Config
from pipeline.data.images import to_unit
from pipeline.data.index import ShardSet
from pipeline.data.quarantine import BadSample
from pipeline.engine import Engine
from pipeline.errors import SampleError, UsageError, blame
from pipeline.real_images import stream_images, tell_bad
from vae.channels import ChannelStatistics, mixed_channels
from vae.folding import fold_normalisation
from vae.moments import downsampling_factor, encode_moments, mixed_scale

if TYPE_CHECKING:
    from vae.perceptual import Perceptual


def refuse_misfit(vae: AutoencoderKL, image_size: int, key: str = "vae.path") -> None:
    """Raise UsageError where images of this size, in RGB, are none that the autoencoder of `key` takes and gives."""
    for name in ("in_channels", "out_channels"):
        if vae.config[name] != 3:
            raise UsageError(
                f"{key}: an autoencoder with {name}: {vae.config[name]} came, 3 was wanted: images are read as RGB"
            )
    factor = downsampling_factor(vae)
    if image_size % factor:
        raise UsageError(f"data.image_size: {image_size} came, a multiple of the VAE's factor {factor} was wanted")
    if image_size < 3:
        raise UsageError(f"data.image_size: {image_size} came, images of at least 3 pixels a side were wanted")


def refuse_missing(config: Config) -> None:
    """Raise UsageError where held-out images are named and not there: now, not after a training."""
    if config.data.validation_images is not None:
        with blame("data.validation_images"):
            ShardSet(config.data.validation_images, open_shards=1, remote=config.data.remote)


def open_eyes(config: Config, engine: Engine) -> Perceptual | None:
    """The frozen network whose features `vae.train.perceptual` compares, on the engine's device; None where it is null.

    Raises UsageError: it is not there, or sees no images of this size.
    """
    settings = config.vae.train
    if settings.perceptual is None:
        return None
    from vae.perceptual import open_perceptual

    with blame("vae.train.perceptual.backbone"):
        eyes = open_perceptual(settings.perceptual.backbone).to(engine.device)
        refuse_small(config, eyes.smallest_side)
    return eyes


def refuse_small(config: Config, smallest_side: int) -> None:
    """Raise UsageError where the smallest image of the training has a side below this, in pixels."""
    size, shrunk = config.data.image_size, config.vae.train.equivariance_share > 0
    smallest = size // 4 if shrunk else size
    if smallest < smallest_side:
        how = f"{smallest} came, a quarter of data.image_size (equivariance_share)" if shrunk else f"{size} came"
        raise UsageError(f"it wants images of at least {smallest_side} pixels, {how}; one with fewer strides sees them")


def stream_statistics(engine: Engine, vae: AutoencoderKL, config: Config) -> list[ChannelStatistics]:
    """Of the latents of each training set, over all its images and all ranks.  In memory: a batch."""
    data = config.data
    found: list[ChannelStatistics] = []
    for folder in data.train_images:
        with blame("data.train_images"):
            shards = ShardSet(folder, open_shards=1, remote=data.remote)
        own = range(engine.rank, len(shards.names), engine.num_ranks)
        bad: list[BadSample] = []
        statistics = ChannelStatistics(int(vae.config["latent_channels"]))
        with tqdm(
            total=sum(shards.counts[shard] for shard in own),
            desc=f"latents of {folder}" + (f" (rank 0 of {engine.num_ranks})" if engine.num_ranks > 1 else ""),
            unit=" images",
            dynamic_ncols=True,
            disable=not engine.is_main,
        ) as bar:
            for pixels in stream_images(shards, own, data, batch_images=config.evaluation.batch_images, bad=bad):
                x = torch.from_numpy(to_unit(pixels)).to(engine.device)
                with torch.no_grad():
                    moments = encode_moments(vae, x)
                try:
                    statistics.update(moments)
                except ValueError as error:
                    raise SampleError(
                        f"vae.path: {folder}: {error}; name an autoencoder that does not overflow"
                    ) from None
                bar.update(len(x))
        tell_bad(f"latents of data.train_images (rank {engine.rank})", bad, sum(shards.counts[shard] for shard in own))
        parts = [ChannelStatistics.from_dict(part) for part in engine.gather(statistics.to_dict())]
        for part in parts[1:]:
            parts[0].merge(part)
        if parts[0].moments.count == 0:
            raise engine.common(UsageError(f"data.train_images: {folder}: none of its samples can be read"))
        found.append(parts[0])
    return found


def normalised(engine: Engine, vae: AutoencoderKL, config: Config, kind: Literal["scalar", "channel"]) -> AutoencoderKL:
    """The autoencoder whose latents have mean 0 and standard deviation 1 over the training set."""
    Module.to(vae, engine.device)
    statistics, weights = stream_statistics(engine, vae, config), config.data.weights or (1.0,)
    channels = mixed_channels(statistics, weights)
    mean, std = channels.mean, channels.std
    if kind == "scalar":
        scale = mixed_scale([each.moments for each in statistics], weights).scale
        return fold_normalisation(vae, sum(mean) / len(mean), 1 / scale)
    return fold_normalisation(vae, mean, std)
