"""How far apart two sets of features are: one number for two sets, about 0 when they share a source."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from pipeline.metrics.arrays import Features, check_features


class KernelDistance(NamedTuple):
    """Mean and standard deviation of the squared MMD over random subsets."""

    mean: float
    std: float


def frechet_distance(real: Features, fake: Features) -> float:
    """Fréchet distance of the Gaussians with the two sets' moments (Heusel et al. 2017, eq. 6).

    |μ_r - μ_f|² + tr(Σ_r + Σ_f - 2 (Σ_r Σ_f)^½), in float64; on Inception features this is the FID.

    real [N, D], fake [M, D], floating point. The estimate is biased upwards by an amount that falls as 1/N
    (Chong & Forsyth 2020), the more so where N or M ≤ D and a covariance has not its full rank: compare only
    numbers taken with the same N and M.
    Raises ValueError for fewer than two samples, different widths, a NaN or an infinity.
    """
    real, fake = check_features(real, fake, min_samples=2)
    # sync_on_compute=False: scores are taken by one rank, and must not wait in a collective for the others.
    metric = FrechetInceptionDistance(_GivenFeatures(real.shape[1]), sync_on_compute=False)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    # A Fréchet distance can't be negative, but for equal sets the rounding of the trace can (-2e-6 was seen).
    return max(0.0, float(metric.compute()))


def kernel_distance(
    real: Features, fake: Features, seed: int, num_subsets: int = 100, subset_size: int | None = None
) -> KernelDistance:
    """Unbiased squared MMD with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018, section 4).

    real [N, D], fake [M, D], floating point; on Inception features this is the KID. Without bias, so its mean
    may be compared between different N, and may be slightly negative. Subsets are drawn without replacement,
    a pure function of the seed; the global random state is left as it was. `subset_size` None: half the
    smaller set but at most 1,000, so that subsets differ from one another.
    Raises ValueError where a set holds fewer samples than a subset, or a subset fewer than two, and for
    different widths, a NaN or an infinity.
    """
    real, fake = check_features(real, fake, min_samples=2)
    smaller = min(len(real), len(fake))
    size = max(2, min(1000, smaller // 2)) if subset_size is None else subset_size
    if not 2 <= size <= smaller:
        raise ValueError(f"subset_size must be in 2..{smaller} (the smaller set), got {size}")
    if num_subsets < 1:
        raise ValueError(f"num_subsets must be at least 1, got {num_subsets}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        metric = KernelInceptionDistance(
            _GivenFeatures(real.shape[1]), subsets=num_subsets, subset_size=size, sync_on_compute=False
        )
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the accelerators too: their state isn't forked here.
        torch.random.default_generator.manual_seed(seed)
        mean, std = metric.compute()
    return KernelDistance(float(mean), float(std))


class _GivenFeatures(torch.nn.Module):
    """What torchmetrics takes for a feature network, where the features are already there."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features  # torchmetrics asks for it; else it would try a random image

    def forward(self, features: Tensor) -> Tensor:
        return features
