"""What each latent channel holds over a whole set of images: spread, shape, and how much it tells of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vae.losses import kl_of_elements
from vae.moments import MomentStatistics

DEAD_NATS = 0.01  # of KL per element, below which a channel says nothing of an image


@dataclass
class ChannelStatistics:
    """Exact sums of z ~ q(z|x) and of its KL from N(0, I), per channel, over all the images seen.

    Nothing is sampled: under N(m, v) E[z³] = m³ + 3 m v and E[z⁴] = m⁴ + 6 m² v + 3 v².  Sums are float64 on the CPU,
    so parts measured apart merge to the whole in any order, up to rounding.
    """

    num_channels: int
    moments: MomentStatistics = field(init=False)  # count, Σ E[z], Σ E[z²]
    sum_z_cubed: Tensor = field(init=False)  # float64 [C]
    sum_z_fourth: Tensor = field(init=False)  # float64 [C]
    sum_kl: Tensor = field(init=False)  # float64 [C], nats

    def __post_init__(self) -> None:
        self.moments = MomentStatistics(self.num_channels)
        for name in ("sum_z_cubed", "sum_z_fourth", "sum_kl"):
            setattr(self, name, torch.zeros(self.num_channels, dtype=torch.float64))

    def update(self, moments: Tensor) -> None:
        """Add a batch of moments [B,2C,h,w].  ValueError: another shape, or values that are not finite."""
        self.moments.update(moments)
        mean, logvar = moments.detach().double().chunk(2, dim=1)
        variance, square = logvar.exp(), mean.square()
        self.sum_z_cubed += (mean * (square + 3 * variance)).sum(dim=(0, 2, 3)).cpu()
        self.sum_z_fourth += (square.square() + 6 * square * variance + 3 * variance.square()).sum(dim=(0, 2, 3)).cpu()
        self.sum_kl += kl_of_elements(moments.detach().double()).sum(dim=(0, 2, 3)).cpu()

    def merge(self, other: ChannelStatistics) -> None:
        """Add what another part of the images gave.  ValueError: another number of channels."""
        self.moments.merge(other.moments)
        self.sum_z_cubed += other.sum_z_cubed
        self.sum_z_fourth += other.sum_z_fourth
        self.sum_kl += other.sum_kl

    def to_dict(self) -> dict[str, Any]:
        """The sums, for JSON; `from_dict` gives the same bits back."""
        sums = {"sum_z_cubed": self.sum_z_cubed, "sum_z_fourth": self.sum_z_fourth, "sum_kl": self.sum_kl}
        return {"moments": self.moments.to_dict(), **{name: total.tolist() for name, total in sums.items()}}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> ChannelStatistics:
        """What `to_dict` gave."""
        moments = MomentStatistics.from_dict(record["moments"])
        made = cls(moments.num_channels)
        made.moments = moments
        for name in ("sum_z_cubed", "sum_z_fourth", "sum_kl"):
            setattr(made, name, torch.tensor(record[name], dtype=torch.float64))
        return made

    @property
    def expectations(self) -> Tensor:
        """E[z], E[z²], E[z³], E[z⁴] and E[KL] of each channel.  Float64 [5,C].  ValueError: nothing was measured."""
        self.moments.refuse_empty()
        both = self.moments.sum_z, self.moments.sum_z_squared
        return torch.stack([*both, self.sum_z_cubed, self.sum_z_fourth, self.sum_kl]) / self.moments.count


@dataclass(frozen=True)
class Channels:
    """The channels of z over a set of images, or over several that are mixed.  One number for each channel."""

    mean: list[float]
    std: list[float]  # the posteriors' own included
    skewness: list[float]  # E[(z - mean)³] / std³: 0 where z is normal
    excess_kurtosis: list[float]  # E[(z - mean)⁴] / std⁴ - 3: 0 where z is normal, -2 or more
    kl_nats: list[float]  # KL(q(z|x) ‖ N(0, 1)) per latent element

    @property
    def information_share(self) -> list[float]:
        """Each channel's share in [0,1] of the KL of all; 0 of nothing."""
        total = sum(self.kl_nats)
        return [kl / total if total > 0 else 0.0 for kl in self.kl_nats]

    def dead(self, least: float = DEAD_NATS) -> list[int]:
        """Channels whose KL is below `least` nats per element: the prior, whatever the image."""
        return [channel for channel, kl in enumerate(self.kl_nats) if kl < least]


def mixed_channels(statistics: Sequence[ChannelStatistics], weights: Sequence[float]) -> Channels:
    """The channels of latents drawn from several sets, from each with a probability in proportion to its weight.

    Expectations of a mixture are the weighted means of its parts', as in `vae.moments.mixed_scale`; central moments
    follow from them.  A channel of no variance, as far as float64 tells, has neither skewness nor kurtosis: 0.

    Raises ValueError: not as many sets as weights, sets of several numbers of channels, or of no images.
    """
    if len(statistics) != len(weights) or not statistics:
        raise ValueError(f"{len(statistics)} sets and {len(weights)} weights came, as many of each are wanted")
    if len({each.num_channels for each in statistics}) != 1:
        raise ValueError(f"latents of {[each.num_channels for each in statistics]} channels came, one number is wanted")
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    parts = torch.stack([each.expectations for each in statistics])  # [S,5,C]
    mean, second, third, fourth, kl = (shares[:, None, None] * parts).sum(dim=0)
    variance = (second - mean.square()).clamp(min=0)
    flat = variance <= 1e-12 * second  # what cancellation leaves of a constant is no variance
    safe = torch.where(flat, 1.0, variance)
    cubed = third - 3 * mean * second + 2 * mean**3
    to_fourth = fourth - 4 * mean * third + 6 * mean.square() * second - 3 * mean**4
    return Channels(
        mean=mean.tolist(),
        std=variance.sqrt().tolist(),
        skewness=torch.where(flat, 0.0, cubed / safe**1.5).tolist(),
        excess_kurtosis=torch.where(flat, 0.0, to_fourth / safe.square() - 3).tolist(),
        kl_nats=kl.tolist(),
    )
