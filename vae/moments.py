"""Latent moments: from pixels to q(z|x), from q(z|x) to z, and the one scale that z is used in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor


def upcast(vae: AutoencoderKL, device_type: str) -> AbstractContextManager[object]:
    """Where an autoencoder computes in fp32 though fp16 was asked for: its config's `force_upcast`.

    SDXL's overflows in fp16.  bf16 has fp32's range, and is left alone.
    """
    in_fp16 = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16
    return torch.autocast(device_type, enabled=False) if in_fp16 and vae.config["force_upcast"] else nullcontext()


def encode_moments(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """q(z|x) = N(mean, diag exp(logvar)) of images.

    x [B,3,H,W] in [-1,1] → [B,2C,h,w], mean ‖ logvar, with logvar clipped to [-30, 20] as diffusers does.
    At least fp32, also where autocast computes in less; in fp16 only where the autoencoder can (`upcast`).
    """
    with upcast(vae, x.device.type):
        posterior = vae.encode(x).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
    return moments.to(torch.promote_types(moments.dtype, torch.float32))


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """z = mean + std · noise, the reparameterised draw (Kingma & Welling 2014, section 2.4, eq. 10).

    moments [B,2C,h,w]; noise [B,C,h,w] from N(0, I) → z [B,C,h,w], not yet scaled.
    """
    mean, logvar = moments.chunk(2, dim=1)
    if noise.shape != mean.shape:  # broadcasting would share one draw between images
        raise ValueError(f"posterior noise {list(noise.shape)} came, {list(mean.shape)} is wanted")
    return mean + (0.5 * logvar).exp() * noise


def downsampling_factor(vae: AutoencoderKL) -> int:
    """f = H/h: image pixels per latent position along one side."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


@dataclass(frozen=True)
class LatentScale:
    """The affine map between the autoencoder's z and the diffusion model's z_0."""

    scale: float
    shift: float = 0.0  # stock StableDiffusionPipeline knows a scalar scaling_factor and no shift

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0 and math.isfinite(self.shift)):
            raise ValueError(f"{self} came, a finite scale > 0 and a finite shift are wanted")

    def normalise(self, z: Tensor) -> Tensor:
        """z of the autoencoder → z_0 of the diffusion model.  Any shape."""
        return (z - self.shift) * self.scale

    def denormalise(self, z_0: Tensor) -> Tensor:
        """z_0 of the diffusion model → z for the decoder.  Any shape."""
        return z_0 / self.scale + self.shift


def published_scale(vae: AutoencoderKL) -> LatentScale:
    """The scale in the autoencoder's config.json, which diffusion models that were made for it expect.

    ValueError: it says none, as one opened from a single file, or one for each channel.
    """
    said = vae.config
    if said.get("latents_mean") is not None or said.get("latents_std") is not None:
        raise ValueError(
            "the autoencoder's config.json has latents_mean and latents_std, a scale for each channel; one "
            "scaling_factor was wanted"
        )
    if said["scaling_factor"] is None:
        raise ValueError(
            "the autoencoder says no scaling_factor (a single file can't); its diffusers folder, whose config.json "
            "does, was wanted"
        )
    return LatentScale(float(said["scaling_factor"]), float(said.get("shift_factor") or 0))


@dataclass
class MomentStatistics:
    """Exact first and second moments of z ~ q(z|x), per channel, over all the images seen.

    Nothing is sampled: E[z] = mean and E[z²] = mean² + exp(logvar) under each posterior. Sums are float64 on
    the CPU, so parts measured apart merge to the whole in any order, up to rounding.
    """

    num_channels: int
    count: int = 0  # latent positions per channel: images · h · w
    sum_z: Tensor = field(init=False)  # float64 [C]
    sum_z_squared: Tensor = field(init=False)  # float64 [C]

    def __post_init__(self) -> None:
        self.sum_z = torch.zeros(self.num_channels, dtype=torch.float64)
        self.sum_z_squared = torch.zeros(self.num_channels, dtype=torch.float64)

    def update(self, moments: Tensor) -> None:
        """Add a batch of moments [B,2C,h,w].  ValueError: another shape, or values that are not finite."""
        num_moments = 2 * self.num_channels
        if moments.ndim != 4 or moments.shape[1] != num_moments:
            raise ValueError(f"moments {list(moments.shape)} came, [B,{num_moments},h,w] are wanted")
        mean, logvar = moments.detach().double().chunk(2, dim=1)
        z_squared = mean.square() + logvar.exp()
        finite = (torch.isfinite(moments) & torch.isfinite(z_squared).repeat(1, 2, 1, 1)).all(dim=(1, 2, 3))
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise ValueError(
                f"latent moments of {len(bad)} of {len(moments)} images are not finite (first: number {bad[0]} "
                "of the batch, from 0)"
            )
        self.count += mean.shape[0] * mean.shape[2] * mean.shape[3]
        self.sum_z += mean.sum(dim=(0, 2, 3)).cpu()
        self.sum_z_squared += z_squared.sum(dim=(0, 2, 3)).cpu()

    def merge(self, other: MomentStatistics) -> None:
        """Add what another part of the images gave.  ValueError: another number of channels."""
        if other.num_channels != self.num_channels:
            raise ValueError(f"statistics of {other.num_channels} channels came, of {self.num_channels} wanted")
        self.count += other.count
        self.sum_z += other.sum_z
        self.sum_z_squared += other.sum_z_squared

    @property
    def channel_mean(self) -> list[float]:
        """Mean of z in each channel.  ValueError: nothing was measured."""
        self.refuse_empty()
        return (self.sum_z / self.count).tolist()

    @property
    def channel_std(self) -> list[float]:
        """Standard deviation of z in each channel, the posterior's own included.  ValueError: nothing was measured."""
        self.refuse_empty()
        variance = self.sum_z_squared / self.count - (self.sum_z / self.count).square()
        return variance.clamp(min=0).sqrt().tolist()

    @property
    def latent_scale(self) -> LatentScale:
        """1 / standard deviation over all elements of z (Rombach et al. 2022, appendix G).

        The deviation is about the common mean, which the record keeps and no one subtracts.  ValueError: nothing
        was measured, or z does not vary.
        """
        self.refuse_empty()
        num_elements = self.count * self.num_channels
        return _scale_of(float(self.sum_z.sum()) / num_elements, float(self.sum_z_squared.sum()) / num_elements)

    def to_dict(self) -> dict[str, Any]:
        """The sums, for JSON; `from_dict` gives the same bits back."""
        sums = {"sum_z": self.sum_z, "sum_z_squared": self.sum_z_squared}
        return {"count": self.count, **{name: total.tolist() for name, total in sums.items()}}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> MomentStatistics:
        """What `to_dict` gave.  ValueError: other keys, or values that no measurement gives."""
        wanted = {"count", "sum_z", "sum_z_squared"}
        if record.keys() != wanted:
            raise ValueError(f"latent statistics with {sorted(record)} came, {sorted(wanted)} are wanted")
        statistics = cls(num_channels=len(record["sum_z"]), count=int(record["count"]))
        statistics.sum_z = torch.tensor(record["sum_z"], dtype=torch.float64)
        statistics.sum_z_squared = torch.tensor(record["sum_z_squared"], dtype=torch.float64)
        same_length = statistics.sum_z.shape == statistics.sum_z_squared.shape
        finite = statistics.sum_z.isfinite().all() and statistics.sum_z_squared.isfinite().all()
        if statistics.count < 0 or not same_length or not finite:
            raise ValueError(f"latent statistics that are no finite sums per channel came: {record}")
        return statistics

    def refuse_empty(self) -> None:
        """ValueError: nothing was measured."""
        if self.count == 0:
            raise ValueError("the latent statistics are empty: no moments were measured")


def mixed_scale(statistics: Sequence[MomentStatistics], weights: Sequence[float]) -> LatentScale:
    """The scale of latents drawn from several sets, from each with a probability in proportion to its weight.

    The moments of a mixture are the weighted means of its parts': E[z] = Σ wᵢ Eᵢ[z] / Σ wᵢ, and so E[z²].  One set
    keeps its own scale, to the last digit.  ValueError: as `latent_scale`, or the sets don't fit one another.
    """
    if len(statistics) != len(weights) or not statistics:
        raise ValueError(f"{len(statistics)} sets and {len(weights)} weights came, as many of each are wanted")
    if len(statistics) == 1:
        return statistics[0].latent_scale
    if len({each.num_channels for each in statistics}) != 1:
        raise ValueError(f"latents of {[each.num_channels for each in statistics]} channels came, one number is wanted")
    mean = mean_square = 0.0
    for each, weight in zip(statistics, weights, strict=True):
        each.refuse_empty()
        share = weight / sum(weights) / (each.count * each.num_channels)
        mean += share * float(each.sum_z.sum())
        mean_square += share * float(each.sum_z_squared.sum())
    return _scale_of(mean, mean_square)


def _scale_of(mean: float, mean_square: float) -> LatentScale:
    """1 / standard deviation, from E[z] and E[z²] over all elements."""
    variance = mean_square - mean**2
    if variance <= 1e-12 * mean_square:  # what cancellation leaves of a constant is no variance
        raise ValueError(f"the latents have no variance (all elements are {mean:g})")
    return LatentScale(scale=variance**-0.5)
