import json
from itertools import pairwise

import numpy as np
import pytest

from pipeline.metrics.distances import frechet_distance, kernel_distance
from pipeline.metrics.manifold import manifold
from pipeline.metrics.neighbours import near_copy_share
from pipeline.metrics.scores import feature_scores, pixel_scores

EQUAL_N = {"fid_equal_n", "recall_equal_n", "coverage_equal_n", "num_images_equal_n"}
NAMES = {
    *("fid", "kid", "kid_standard_error", "precision", "recall", "density", "coverage"),
    *("near_copy_share", "num_reference_images"),
}


@pytest.fixture(scope="module")
def score(classifier, digits):
    train = classifier.features(digits.train)
    return lambda images, num_equal=360: feature_scores(train, classifier.features(images), num_equal)


def test_is_what_the_single_measures_say(score, classifier, digits):
    scores = score(digits.held_out, 100)
    assert set(scores) == NAMES | EQUAL_N
    assert json.loads(json.dumps(scores)) == scores
    real, fake = classifier.features(digits.train), classifier.features(digits.held_out)
    whole, prefix = manifold(real, fake), manifold(real, fake[:100])
    assert scores["fid"] == frechet_distance(real, fake)
    assert (scores["kid"], scores["kid_standard_error"]) == kernel_distance(real, fake)
    assert [scores[x] for x in ("precision", "recall", "density", "coverage")] == list(whole[:4])
    assert (scores["recall_equal_n"], scores["coverage_equal_n"]) == (prefix.recall, prefix.coverage)
    assert scores["fid_equal_n"] == frechet_distance(real, fake[:100]) > scores["fid"]
    assert (scores["num_reference_images"], scores["num_images_equal_n"]) == (1437, 100)


def test_the_yardstick_is_at_equal_n_with_itself(score, digits):
    scores = score(digits.held_out)
    assert [scores[f"{name}_equal_n"] for name in ("fid", "recall", "coverage")] == [
        scores[name] for name in ("fid", "recall", "coverage")
    ]
    assert scores["near_copy_share"] == pytest.approx(0.01, abs=0.02)


def test_without_enough_images_there_is_no_equal_n(score, digits):
    assert set(score(digits.held_out[:50])) == set(score(digits.held_out, None)) == NAMES


def test_sets_are_ordered_as_they_must_be(score, digits):
    """At one N, against the training set: held-out images, the same without classes, the same with noise."""
    real, labels = digits.held_out, digits.held_out_labels
    noise = np.random.default_rng(0).normal(0, 1, real.shape)
    whole = score(real)
    noisy = [score(np.clip(real + std * noise, 0, 255).astype(np.uint8)) for std in (30, 60)]
    removed = [score(np.resize(real[~np.isin(labels, range(count))], real.shape)) for count in range(1, 8)]
    for name in ("fid", "kid"):
        assert whole[name] < removed[0][name] < removed[3][name]
        assert whole[name] < noisy[0][name] < noisy[1][name]
    assert whole["kid"] < removed[0]["kid"] - 2 * removed[0]["kid_standard_error"]
    coverage = [whole["coverage"], *(each["coverage"] for each in removed)]
    assert all(more > fewer for more, fewer in pairwise(coverage))
    assert noisy[0]["precision"] > noisy[1]["precision"] and whole["precision"] > noisy[1]["precision"]
    assert removed[0]["precision"] == pytest.approx(whole["precision"], abs=0.05)


def test_copies_of_training_images_are_found_where_every_other_score_likes_them(score, digits):
    copies, real = score(digits.train[:360]), score(digits.held_out)
    assert copies["fid"] < 2 * real["fid"] and copies["precision"] >= real["precision"]
    assert copies["near_copy_share"] == 1.0


def test_in_pixels_too(digits):
    found = pixel_scores(digits.train, digits.train[:100], digits.held_out)
    copies = near_copy_share(digits.train, digits.held_out, digits.train[:100])
    assert found["near_copy_share"] == 1.0 and found["near_copy_threshold_levels"] == copies.threshold_levels
    assert pixel_scores(digits.train, digits.held_out, digits.held_out)["near_copy_share"] == 0.0
    with pytest.raises(ValueError, match=r"images holds images of shape \[16, 32, 3\]"):
        pixel_scores(digits.train, digits.held_out[:, :16], digits.held_out)
    with pytest.raises(ValueError, match="validation_images is empty"):
        pixel_scores(digits.train, digits.held_out, digits.held_out[:0])


def test_what_cannot_be_scored_says_why():
    x = np.random.default_rng(0).standard_normal((20, 3))
    with pytest.raises(ValueError, match="fake features: needs at least 6 samples, got 5"):
        feature_scores(x, x[:5], None)
    with pytest.raises(ValueError, match="fake features hold a NaN"):
        feature_scores(x, np.where(x > 1, np.nan, x), None)
