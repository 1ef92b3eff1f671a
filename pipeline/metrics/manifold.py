"""Fidelity and variety apart: where two sets of features cover each other.

A set's manifold is estimated by balls: one around each sample, as wide as the distance to its k-th nearest
neighbour in the same set.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors

from pipeline.metrics.arrays import Features, check_features


class Manifold(NamedTuple):
    """Shares in [0, 1], but density, which has no upper bound and is about 1 for sets from one source."""

    precision: float  # of fakes inside some real ball: do the fakes look real?
    recall: float  # of reals inside some fake ball: is everything real also made?
    density: float  # real balls that a fake lies in, over k: unlike precision not won by one outlier's ball
    coverage: float  # of real balls with a fake inside
    num_real: int
    num_fake: int
    k_precision_recall: int
    k_density_coverage: int


def manifold(
    real: Features,
    fake: Features,
    k_precision_recall: int = 3,
    k_density_coverage: int = 5,
    chunk_mib: int = 512,
) -> Manifold:
    """All four from one pass over the distances.  real [N, D], fake [M, D], floating point.

    Precision and recall: Kynkäänniemi et al. 2019, section 2. Density and coverage: Naeem et al. 2020,
    section 3. A ball includes its surface. Recall and coverage grow with M, all four with k: compare numbers
    taken with the same N, M and k only. The N×M float64 distances are held `chunk_mib` MiB at a time (for
    50,000² they are 20 GB); that doesn't change the result.
    Raises ValueError where a set has no more than k samples, and for different widths, a NaN or an infinity.
    """
    if min(k_precision_recall, k_density_coverage) < 1:
        raise ValueError(f"k must be at least 1, got {k_precision_recall} and {k_density_coverage}")
    k_max = max(k_precision_recall, k_density_coverage)
    real, fake = check_features(real, fake, min_samples=k_max + 1)
    real_radii_sq, fake_radii_sq = _radii_squared(real, k_max), _radii_squared(fake, k_max)  # [N, k], [M, k]
    # Distances come out of a matrix product, |x|² + |y|² - 2 x·y, rounded to about 1e-15 of the norms: with
    # this slack a point on a ball's surface (a k-th neighbour, a duplicate) is inside however that went.
    slack = 1e-12 * max(float(np.square(real).sum(1).max()), float(np.square(fake).sum(1).max()))
    real_pr = real_radii_sq[:, k_precision_recall - 1] + slack  # [N]
    fake_pr = fake_radii_sq[:, k_precision_recall - 1] + slack  # [M]
    real_dc = real_radii_sq[:, k_density_coverage - 1] + slack  # [N]

    fake_is_precise = np.zeros(len(fake), dtype=bool)
    num_recalled = num_covered = num_inside = start = 0
    for distances_sq in pairwise_distances_chunked(real, fake, working_memory=chunk_mib, squared=True):
        rows = slice(start, start + len(distances_sq))  # of real; distances_sq [n, M]
        fake_is_precise |= (distances_sq <= real_pr[rows, None]).any(axis=0)
        num_recalled += int((distances_sq <= fake_pr[None, :]).any(axis=1).sum())
        inside = distances_sq <= real_dc[rows, None]
        num_inside += int(inside.sum())
        num_covered += int(inside.any(axis=1).sum())
        start = rows.stop
    return Manifold(
        precision=float(fake_is_precise.mean()),
        recall=num_recalled / len(real),
        density=num_inside / (k_density_coverage * len(fake)),
        coverage=num_covered / len(real),
        num_real=len(real),
        num_fake=len(fake),
        k_precision_recall=k_precision_recall,
        k_density_coverage=k_density_coverage,
    )


def fidelity_by_image(
    real: Features, fake: Features, k_precision: int = 3, k_density: int = 5, chunk_mib: int = 512
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """What precision and density are the means of: for each fake, bool [M] and float64 [M]; see `manifold`."""
    k_max = max(k_precision, k_density)
    real, fake = check_features(real, fake, min_samples=1)
    check_features(real, real, min_samples=k_max + 1)
    radii_sq = _radii_squared(real, k_max)
    slack = 1e-12 * max(float(np.square(real).sum(1).max()), float(np.square(fake).sum(1).max()))
    is_precise, num_balls = np.zeros(len(fake), dtype=bool), np.zeros(len(fake))
    start = 0
    for distances_sq in pairwise_distances_chunked(real, fake, working_memory=chunk_mib, squared=True):
        rows = slice(start, start + len(distances_sq))  # of real
        is_precise |= (distances_sq <= radii_sq[rows, k_precision - 1, None] + slack).any(axis=0)
        num_balls += (distances_sq <= radii_sq[rows, k_density - 1, None] + slack).sum(axis=0)
        start = rows.stop
    return is_precise, num_balls / k_density


def precision_recall(real: Features, fake: Features, k: int = 3) -> tuple[float, float]:
    """(precision, recall) alone; see `manifold`."""
    both = manifold(real, fake, k_precision_recall=k, k_density_coverage=k)
    return both.precision, both.recall


def density_coverage(real: Features, fake: Features, k: int = 5) -> tuple[float, float]:
    """(density, coverage) alone; see `manifold`."""
    both = manifold(real, fake, k_precision_recall=k, k_density_coverage=k)
    return both.density, both.coverage


def _radii_squared(features: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Squared distances to the k nearest other samples, nearest first, [N, k]."""
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(features)
    distances, _ = search.kneighbors()  # without an argument: neighbours of the fitted samples, self left out
    return distances**2
