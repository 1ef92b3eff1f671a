import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from pipeline.metrics.distances import frechet_distance, kernel_distance


class GivenFeatures(torch.nn.Module):
    num_features = 8

    def forward(self, x):
        return x


def features(num, width=8, seed=0, mean=0.0, std=1.0):
    return mean + std * np.random.default_rng(seed).standard_normal((num, width))


def frechet_by_scipy(real, fake):
    """Heusel et al. 2017, eq. 6, by a matrix square root."""
    cov_r, cov_f = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    root = scipy.linalg.sqrtm(cov_r @ cov_f)
    return np.sum((real.mean(0) - fake.mean(0)) ** 2) + np.trace(cov_r + cov_f - 2 * root.real)


def mmd_by_loops(x, y):
    """The unbiased estimate (Bińkowski et al. 2018, section 2), a kernel value at a time."""

    def kernel(a, b):
        return (np.dot(a, b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    k_xx = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    k_yy = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    k_xy = sum(kernel(x[i], y[j]) for i in range(m) for j in range(n)) / (m * n)
    return k_xx + k_yy - 2 * k_xy


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_frechet_is_the_formula(dtype, mean):
    mixing = features(8, seed=7)
    real = (mean + features(300) @ mixing).astype(dtype)
    fake = (mean + features(200, seed=1, mean=0.3, std=1.2) @ mixing).astype(dtype)
    wanted = frechet_by_scipy(real.astype(np.float64), fake.astype(np.float64))
    assert frechet_distance(real, fake) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(fake, real) == pytest.approx(wanted, rel=1e-6)


def test_frechet_of_known_gaussians():
    # Diagonal Gaussians: the squared differences of means and of standard deviations add up.
    real, fake = features(400_000, 2), features(400_000, 2, seed=1, mean=2.0, std=3.0)
    assert frechet_distance(real, fake) == pytest.approx(2 * (2.0**2 + (3 - 1) ** 2), rel=0.01)


def test_frechet_of_equal_sets_is_zero():
    real = features(100)
    assert 0 <= frechet_distance(real, real) < 1e-9
    few = features(10, width=30)  # fewer samples than widths: singular covariances, allowed
    assert 0 <= frechet_distance(few, few) < 1e-4
    assert 0 <= frechet_distance(np.ones((5, 3)), np.ones((5, 3))) < 1e-9


def test_frechet_bias_falls_with_the_number_of_samples():
    few, many = (frechet_distance(features(n), features(n, seed=1)) for n in (50, 5000))
    assert few > 10 * many > 0


@pytest.mark.parametrize("rows_at_once", [5, 1024])
def test_kernel_distance_is_the_formula(rows_at_once):
    real, fake = features(31, width=4), features(12, width=4, seed=1, mean=0.5)
    got = kernel_distance(real, fake, rows_at_once=rows_at_once)
    assert got.value == pytest.approx(mmd_by_loops(real, fake), rel=1e-10)


def test_its_standard_error_is_the_jackknife():
    real, fake = features(9, width=3), features(7, width=3, seed=1, mean=0.5)
    without_real = [mmd_by_loops(np.delete(real, i, 0), fake) for i in range(9)]
    without_fake = [mmd_by_loops(real, np.delete(fake, i, 0)) for i in range(7)]
    variance = 8 * np.var(without_real) + 6 * np.var(without_fake)
    assert kernel_distance(real, fake).standard_error == pytest.approx(np.sqrt(variance), rel=1e-9)


def test_kernel_distance_has_no_bias():
    values = [kernel_distance(features(30, 4, 2 * s), features(30, 4, 2 * s + 1)).value for s in range(400)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


@pytest.mark.parametrize(("mean", "low", "high"), [(0.5, 0.85, 1.2), (0.0, 1.0, 2.0)])
def test_its_standard_error_says_how_far_chance_moves_it(mean, low, high):
    """Between different sources; of equal ones, where the first order of the variance vanishes, it says too much."""
    found = [kernel_distance(features(60, 4, 2 * s), features(80, 4, 2 * s + 1, mean=mean)) for s in range(300)]
    spread = np.std([each.value for each in found])
    assert low * spread < np.sqrt(np.mean([each.standard_error**2 for each in found])) < high * spread


def test_kernel_distance_agrees_with_torchmetrics():
    """Its subsets, when they are the sets themselves."""
    real, fake = (torch.from_numpy(features(40, 8, seed)) for seed in (0, 1))
    theirs = KernelInceptionDistance(GivenFeatures(), subsets=2, subset_size=40)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert kernel_distance(real.numpy(), fake.numpy()).value == pytest.approx(float(theirs.compute()[0]), rel=1e-6)


def test_both_grow_with_noise():
    real = features(500)
    noisy = [real + features(500, seed=2, std=std) for std in (0.0, 0.5, 1.0, 2.0)]
    frechet = [frechet_distance(real, x) for x in noisy]
    kernel = [kernel_distance(real, x).value for x in noisy]
    assert frechet == sorted(frechet)
    assert kernel == sorted(kernel)
    assert kernel[-1] > 0.5


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_what_has_no_distance_says_why(distance):
    x = features(10)
    with pytest.raises(ValueError, match=r"fake features: needs at least [23] samples, got 1"):
        distance(x, x[:1])
    with pytest.raises(ValueError, match="differ in width: 8 and 5"):
        distance(x, x[:, :5])
    with pytest.raises(ValueError, match=r"real features must have shape \[N, D\], got \[10\]"):
        distance(x[:, 0], x)
    with pytest.raises(ValueError, match="fake features must be floating point, got int64"):
        distance(x, x.astype(np.int64))
    bad = x.copy()
    bad[4, 2] = np.nan
    with pytest.raises(ValueError, match="fake features hold a NaN or an infinity, first in row 4"):
        distance(x, bad)


ONE_RANK_SCORES = """
import os, sys
import numpy as np, torch.distributed as dist
from pipeline.metrics.distances import frechet_distance, kernel_distance
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
if rank == 0:
    x = np.random.default_rng(0).standard_normal((20, 4))
    print(frechet_distance(x, x + 1), kernel_distance(x, x + 1).value, flush=True)
    open(sys.argv[2] + ".done", "w").close()
else:  # alive, but in no collective
    import time
    while not os.path.exists(sys.argv[2] + ".done"):
        time.sleep(0.05)
os._exit(0)
"""


def test_one_rank_of_several_can_score_alone(tmp_path):
    command = [sys.executable, "-c", ONE_RANK_SCORES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(2)
    ]
    try:
        output, _ = ranks[0].communicate(timeout=300)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    frechet, kernel = map(float, output.split())
    x = np.random.default_rng(0).standard_normal((20, 4))
    assert frechet == pytest.approx(frechet_distance(x, x + 1))
    assert kernel == pytest.approx(kernel_distance(x, x + 1).value)
