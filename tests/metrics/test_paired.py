"""Paired differences: what a resample is, how wide an interval gets, and that it holds what it promises."""

import tracemalloc

import numpy as np
import pytest

from pipeline.metrics.answers import inception_score
from pipeline.metrics.distances import frechet_distance
from pipeline.metrics.paired import FrechetScore, InceptionScore, KernelScore, Mean, paired_differences


def features(num, width=3, seed=0, mean=0.0):
    return mean + np.random.default_rng(seed).standard_normal((num, width))


def test_a_resample_without_doubles_is_the_set_itself():
    real, fake = features(40), features(25, seed=1, mean=0.4)
    ones = np.ones(25)
    for score in (Mean(fake[:, 0]), KernelScore(real, fake), FrechetScore(real, fake)):
        assert score.of(ones) == pytest.approx(score.value, rel=1e-5, abs=1e-6)
    assert FrechetScore(real, fake).value == frechet_distance(real, fake)


def test_counts_are_repeats():
    real, fake = features(40), features(25, seed=1, mean=0.4)
    chosen = np.random.default_rng(2).integers(0, 25, 25)
    counts = np.bincount(chosen, minlength=25).astype(float)
    assert Mean(fake[:, 0]).of(counts) == pytest.approx(fake[chosen, 0].mean())
    assert FrechetScore(real, fake).of(counts) == pytest.approx(frechet_distance(real, fake[chosen]), rel=1e-6)
    wide, narrow = features(80, width=40), features(25, width=40, seed=1)  # fewer images than features
    assert FrechetScore(wide, narrow).of(counts) == pytest.approx(frechet_distance(wide, narrow[chosen]), rel=1e-5)


def test_doubles_put_no_bias_into_the_kernel_distance():
    real, fake = features(200), features(60, seed=1, mean=0.5)
    score, rng = KernelScore(real, fake), np.random.default_rng(0)
    drawn = [score.of(np.bincount(rng.integers(0, 60, 60), minlength=60).astype(float)) for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(score.value, abs=4 * np.std(drawn) / np.sqrt(2000))


def test_equal_models_differ_by_nothing():
    real, fake = features(40), features(25, seed=1)
    side = {"fid": FrechetScore(real, fake), "kid": KernelScore(real, fake), "mean": Mean(fake[:, 0])}
    for found in paired_differences(side, side, 25, seed=0, num_resamples=50).values():
        assert (found.difference, found.low, found.high) == (0, 0, 0)


def test_what_twins_share_does_not_widen_the_interval():
    rng = np.random.default_rng(0)
    shared, own = rng.standard_normal(400) * 10, rng.standard_normal(400) * 0.1
    a, b = {"x": Mean(shared + 0.5 + own)}, {"x": Mean(shared)}
    found = paired_differences(a, b, 400, seed=0, num_resamples=500)["x"]
    assert 0.45 < found.low < found.difference < found.high < 0.55
    apart = paired_differences(a, {"x": Mean(rng.permutation(shared))}, 400, seed=0, num_resamples=500)["x"]
    assert apart.high - apart.low > 20 * (found.high - found.low)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    within = 0
    for seed in range(300):
        a, b = rng.random(200) < 0.8, rng.random(200) < 0.7
        found = paired_differences({"x": Mean(a)}, {"x": Mean(b)}, 200, seed=seed, num_resamples=200)["x"]
        within += found.low <= 0.1 <= found.high
    assert 0.90 <= within / 300 <= 0.985


def test_an_interval_is_a_function_of_the_seed_and_a_better_model_is_seen():
    real, better, worse = features(300), features(300, seed=1, mean=0.1), features(300, seed=1, mean=0.6)
    sides = [{"kid": KernelScore(real, x), "fid": FrechetScore(real, x)} for x in (better, worse)]
    found = paired_differences(*sides, 300, seed=3, num_resamples=100)
    assert found == paired_differences(*sides, 300, seed=3, num_resamples=100)
    assert found != paired_differences(*sides, 300, seed=4, num_resamples=100)
    assert all(each.high < 0 for each in found.values())
    with pytest.raises(ValueError, match="300 images and 5 resamples came"):
        paired_differences(*sides, 300, seed=3, num_resamples=5)


def test_an_inception_score_of_a_resample_is_that_of_the_repeated_images():
    probabilities = np.random.default_rng(0).dirichlet([0.2, 0.5, 1.0], 30)
    probabilities[0] = [1, 0, 0]
    score = InceptionScore(probabilities)
    assert score.value == inception_score(probabilities) == pytest.approx(score.of(np.ones(30)))
    chosen = np.random.default_rng(1).integers(0, 30, 30)
    counts = np.bincount(chosen, minlength=30).astype(float)
    assert score.of(counts) == pytest.approx(inception_score(probabilities[chosen]))


def test_the_kernel_of_all_pairs_takes_four_bytes_for_each():
    real, fake = features(40, width=8), features(3000, width=8, seed=1)
    tracemalloc.start()
    KernelScore(real, fake, rows_at_once=128)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 4 * 3000**2 <= most < 1.5 * 4 * 3000**2
