"""How far apart two sets of features are: one number for two sets, about 0 when they share a source."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from pipeline.metrics.arrays import Features, check_features


class KernelDistance(NamedTuple):
    """A squared MMD and how far chance moves it."""

    value: float
    standard_error: float


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


def kernel_distance(real: Features, fake: Features, *, rows_at_once: int = 1024) -> KernelDistance:
    """Unbiased squared MMD with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018, section 4), in float64.

    Σ_{i≠j} k(x_i, x_j) / N(N-1) + Σ_{i≠j} k(y_i, y_j) / M(M-1) - 2 Σ k(x_i, y_j) / NM (Gretton et al. 2012, eq. 3), of
    all pairs instead of random subsets, so that nothing is drawn and none is left out.  Without bias: its value may be
    compared between different N, and may be slightly negative.  Its standard error is the jackknife's: of leaving out
    each sample of each set once.

    real [N, D], fake [M, D], floating point; on Inception features this is the KID.  Kernel values are held
    `rows_at_once` rows at a time.
    Raises ValueError for fewer than three samples, different widths, a NaN or an infinity.
    """
    real, fake = check_features(real, fake, min_samples=3)
    sums = KernelSums.of(real, fake, rows_at_once)
    n, m = len(real), len(fake)
    whole = sums.value()
    # Of the sums over all pairs, leaving a sample out takes its own row away: no kernel value is computed again.
    without_real = _mmd(
        sums.real.sum() - 2 * sums.real, sums.fake.sum(), sums.real_fake.sum() - sums.real_fake, n - 1, m
    )
    without_fake = _mmd(
        sums.real.sum(), sums.fake.sum() - 2 * sums.fake, sums.real_fake.sum() - sums.fake_real, n, m - 1
    )
    variance = (n - 1) * without_real.var() + (m - 1) * without_fake.var()
    return KernelDistance(whole, float(np.sqrt(variance)))


def cubic_kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """(x·y / D + 1)³ of every pair: x [N, D], y [M, D] → [N, M]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


class KernelSums(NamedTuple):
    """For each sample, the sum of its kernel values with the others of its set, and with all of the other set."""

    real: NDArray[np.float64]  # [N], without itself
    fake: NDArray[np.float64]  # [M], without itself
    real_fake: NDArray[np.float64]  # [N]
    fake_real: NDArray[np.float64]  # [M]

    @classmethod
    def of(cls, real: NDArray[np.float64], fake: NDArray[np.float64], rows_at_once: int) -> "KernelSums":
        """real [N, D], fake [M, D]."""
        of_fake = np.zeros(len(fake))
        of_real: list[NDArray[np.float64]] = []
        for start in range(0, len(real), rows_at_once):
            values = cubic_kernel(real[start : start + rows_at_once], fake)
            of_real.append(values.sum(axis=1))
            of_fake += values.sum(axis=0)
        within = [_sums_within(each, rows_at_once) for each in (real, fake)]
        return cls(within[0], within[1], np.concatenate(of_real), of_fake)

    def value(self) -> float:
        """The squared MMD."""
        return float(_mmd(self.real.sum(), self.fake.sum(), self.real_fake.sum(), len(self.real), len(self.fake)))


def _sums_within(x: NDArray[np.float64], rows_at_once: int) -> NDArray[np.float64]:
    starts = range(0, len(x), rows_at_once)
    rows = [cubic_kernel(x[start : start + rows_at_once], x).sum(axis=1) for start in starts]
    return np.concatenate(rows) - (np.square(x).sum(axis=1) / x.shape[1] + 1) ** 3


def _mmd(real: Any, fake: Any, both: Any, n: int, m: int) -> Any:
    """From sums of kernel values: over ordered pairs within each set, and over all pairs of one of each."""
    return real / (n * (n - 1)) + fake / (m * (m - 1)) - 2 * both / (n * m)


class _GivenFeatures(torch.nn.Module):
    """What torchmetrics takes for a feature network, where the features are already there."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features  # torchmetrics asks for it; else it would try a random image

    def forward(self, features: Tensor) -> Tensor:
        return features
