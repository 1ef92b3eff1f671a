"""Two models on the same wishes and the same noise: the difference of a score, and how far chance moves it.

Image i of one model is the twin of image i of the other: same wish, same noise.  The paired bootstrap (Efron &
Tibshirani 1993, sections 6 and 13.3) draws indices i with replacement, the same ones for both, so that what the twins
share does not widen the interval.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics.answers import inception_score
from pipeline.metrics.arrays import Features, check_features
from pipeline.metrics.distances import KernelSums, cubic_kernel, frechet_distance, kernel_distance

LEVEL = 0.95
Counts = NDArray[np.float64]  # [N], how often each image is in a resample


class Difference(NamedTuple):
    """A score of model A, of model B, and A less B with its interval."""

    a: float
    b: float
    difference: float
    low: float
    high: float


class Score(Protocol):
    """A score of one model's images."""

    @property
    def value(self) -> float:
        """Of the images as they are."""
        ...

    def of(self, counts: Counts) -> float:
        """Of a resample."""
        ...


def paired_differences(
    a: Mapping[str, Score], b: Mapping[str, Score], num_images: int, *, seed: int, num_resamples: int
) -> dict[str, Difference]:
    """A less B of the scores that both have, with 95% percentile intervals; a function of its arguments.

    Raises ValueError for fewer than two images or 20 resamples, of which no interval can be read.
    """
    if num_images < 2 or num_resamples < 20:
        raise ValueError(f"{num_images} images and {num_resamples} resamples came, 2 and 20 or more were wanted")
    generator = np.random.default_rng(seed)
    names = [name for name in a if name in b]
    drawn = np.empty((num_resamples, len(names)))
    for row in drawn:
        chosen = generator.integers(0, num_images, num_images)
        counts = np.bincount(chosen, minlength=num_images).astype(np.float64)
        row[:] = [a[name].of(counts) - b[name].of(counts) for name in names]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {
        name: Difference(a[name].value, b[name].value, a[name].value - b[name].value, float(low[i]), float(high[i]))
        for i, name in enumerate(names)
    }


class Mean:
    """The mean of one number for each image."""

    def __init__(self, values: NDArray[np.generic]) -> None:
        self.values = np.asarray(values, dtype=np.float64)
        self.value = float(self.values.mean())

    def of(self, counts: Counts) -> float:
        """See Score."""
        return float(counts @ self.values / counts.sum())


class InceptionScore:
    """The Inception Score (`inception_score`): exp(E Σ_k p_k ln p_k - Σ_k m_k ln m_k), m the mean of the p."""

    def __init__(self, probabilities: NDArray[np.floating]) -> None:
        """probabilities [N,K]."""
        self.value = inception_score(probabilities)
        self.probabilities = np.asarray(probabilities, dtype=np.float64)
        self.certainty = _p_ln_p(self.probabilities).sum(axis=1)  # [N]

    def of(self, counts: Counts) -> float:
        """See Score."""
        share = counts / counts.sum()
        return float(np.exp(share @ self.certainty - _p_ln_p(share @ self.probabilities).sum()))


class KernelScore:
    """The squared MMD from real images (`kernel_distance`), of pairs of different images in a resample too.

    An image that is drawn twice is no pair with itself: its kernel value would add a bias of 1/N.
    """

    def __init__(self, real: Features, fake: Features, *, rows_at_once: int = 1024) -> None:
        x, y = check_features(real, fake, min_samples=3)
        self.value = kernel_distance(x, y).value
        sums = KernelSums.of(x, y, rows_at_once)
        self.of_real = float(sums.real.sum()) / (len(x) * (len(x) - 1))
        self.with_real = sums.fake_real / len(x)  # [N]
        self.pairs = np.empty((len(y), len(y)), np.float32)  # [N,N]: half the memory, right to 1e-7
        for start in range(0, len(y), rows_at_once):
            self.pairs[start : start + rows_at_once] = cubic_kernel(y[start : start + rows_at_once], y)
        np.fill_diagonal(self.pairs, 0)

    def of(self, counts: Counts) -> float:
        """See Score."""
        total = counts.sum()
        narrow = counts.astype(np.float32)
        pairs = float(narrow @ (self.pairs @ narrow)) / float(total**2 - counts @ counts)
        return self.of_real + pairs - 2 * float(counts @ self.with_real) / float(total)


class FrechetScore:
    """The Fréchet distance from real images (`frechet_distance`)."""

    def __init__(self, real: Features, fake: Features) -> None:
        x, self.fake = check_features(real, fake, min_samples=2)
        self.value = frechet_distance(x, self.fake)
        self.mean, covariance = x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False))
        self.trace = float(np.trace(covariance))
        eigenvalues, vectors = np.linalg.eigh(covariance)
        self.root = (vectors * np.sqrt(np.maximum(eigenvalues, 0))) @ vectors.T  # Σ_r^½
        self.rooted = self.fake @ self.root  # [N,D]

    def of(self, counts: Counts) -> float:
        """|μ_r - μ_f|² + tr Σ_r + tr Σ_f - 2 tr (Σ_r^½ Σ_f Σ_r^½)^½.

        With Σ_f = YᵀY the last root is of ZᵀZ, Z = Y Σ_r^½, whose eigenvalues other than 0 are those of ZZᵀ: the
        smaller of the two is taken.
        """
        drawn = counts > 0
        often, less_one = counts[drawn], counts.sum() - 1
        mean = often @ self.fake[drawn] / counts.sum()
        trace = float(often @ np.square(self.fake[drawn] - mean).sum(axis=1)) / less_one
        z = np.sqrt(often / less_one)[:, None] * (self.rooted[drawn] - mean @ self.root)
        eigenvalues = np.linalg.eigvalsh(z @ z.T if len(z) < z.shape[1] else z.T @ z)
        shared = 2 * np.sqrt(np.maximum(eigenvalues, 0)).sum()
        return float(np.square(self.mean - mean).sum() + self.trace + trace - shared)


def _p_ln_p(p: NDArray[np.float64]) -> NDArray[np.float64]:
    return p * np.log(p, out=np.zeros_like(p), where=p > 0)  # 0 ln 0 = 0
