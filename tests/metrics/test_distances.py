import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from pipeline.metrics.distances import frechet_distance, kernel_distance


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


def test_kernel_distance_is_the_formula():
    # A subset as large as both sets is the sets themselves, whatever the order it is drawn in.
    real, fake = features(12, width=4), features(12, width=4, seed=1, mean=0.5)
    got = kernel_distance(real, fake, seed=0, num_subsets=3, subset_size=12)
    assert got.mean == pytest.approx(mmd_by_loops(real, fake), rel=1e-10)
    assert got.std == pytest.approx(0.0, abs=1e-12)


def test_kernel_distance_has_no_bias():
    got = kernel_distance(features(4000, width=4), features(300, width=4, seed=1), seed=0)
    assert abs(got.mean) < 0.1
    values = [kernel_distance(features(30, 4, 2 * s), features(30, 4, 2 * s + 1), 0, 4, 30).mean for s in range(200)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


def test_kernel_distance_is_a_function_of_the_seed():
    real, fake = features(60), features(50, seed=1)
    assert kernel_distance(real, fake, seed=3) == kernel_distance(real, fake, seed=3)
    assert kernel_distance(real, fake, seed=3) != kernel_distance(real, fake, seed=4)


def test_kernel_distance_leaves_the_global_random_state_alone():
    real, fake = features(20), features(20, seed=1)
    torch.manual_seed(1)
    first = kernel_distance(real, fake, seed=3)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(2)
    assert kernel_distance(real, fake, seed=3) == first


def test_both_grow_with_noise():
    real = features(500)
    noisy = [real + features(500, seed=2, std=std) for std in (0.0, 0.5, 1.0, 2.0)]
    frechet = [frechet_distance(real, x) for x in noisy]
    kernel = [kernel_distance(real, x, seed=0).mean for x in noisy]
    assert frechet == sorted(frechet)
    assert kernel == sorted(kernel)
    assert kernel[-1] > 0.5


@pytest.mark.parametrize("distance", [frechet_distance, lambda r, f: kernel_distance(r, f, seed=0)])
def test_what_has_no_distance_says_why(distance):
    x = features(10)
    with pytest.raises(ValueError, match="fake features: needs at least 2 samples, got 1"):
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


def test_a_subset_larger_than_a_set_says_why():
    with pytest.raises(ValueError, match=r"subset_size must be in 2\.\.7 .* got 8"):
        kernel_distance(features(10), features(7), seed=0, subset_size=8)
    with pytest.raises(ValueError, match=r"subset_size must be in 2\.\.7 .* got 1"):
        kernel_distance(features(10), features(7), seed=0, subset_size=1)
    with pytest.raises(ValueError, match="num_subsets must be at least 1"):
        kernel_distance(features(10), features(7), seed=0, num_subsets=0)


ONE_RANK_SCORES = """
import os, sys
import numpy as np, torch.distributed as dist
from pipeline.metrics.distances import frechet_distance, kernel_distance
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
if rank == 0:
    x = np.random.default_rng(0).standard_normal((20, 4))
    print(frechet_distance(x, x + 1), kernel_distance(x, x + 1, seed=0).mean, flush=True)
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
    assert kernel == pytest.approx(kernel_distance(x, x + 1, seed=0).mean)
