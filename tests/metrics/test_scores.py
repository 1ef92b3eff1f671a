import json
from itertools import pairwise

import numpy as np
import pytest

from pipeline.metrics.classifier import ImageClassifier
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


def noisy(images, std, rng):
    return np.clip(images + std * rng.normal(0, 1, images.shape), 0, 255).astype(np.uint8)


def test_sets_are_ordered_as_they_must_be(score, digits):
    """320 distinct images each, against the training set: held out, without one of the classes, with noise."""
    rng = np.random.default_rng(0)

    def some(rows):
        return digits.held_out[rng.choice(rows, 320, replace=False)]

    images = some(len(digits.held_out))
    whole, noise = score(images, None), [score(noisy(images, std, rng), None) for std in (30, 60)]
    removed = [score(some(np.flatnonzero(digits.held_out_labels != each)), None) for each in range(10)]
    for name in ("fid", "kid"):
        assert whole[name] < min(each[name] for each in removed)
        assert max(each[name] for each in removed) < noise[1][name]
        assert whole[name] < noise[0][name] < noise[1][name]
    assert whole["kid"] < removed[0]["kid"] - 2 * removed[0]["kid_standard_error"]
    assert noise[0]["precision"] > noise[1]["precision"] and whole["precision"] > noise[1]["precision"]
    for each in removed:
        assert each["precision"] == pytest.approx(whole["precision"], abs=0.05)


def test_coverage_falls_with_each_class_removed(digits):
    """By the share of the class, where it stays for as many images drawn of all: 360 distinct ones each time."""
    real, real_labels = digits.train[:360], digits.train_labels[:360]
    rest = np.concatenate([digits.train[360:], digits.held_out])
    labels = np.concatenate([digits.train_labels[360:], digits.held_out_labels])
    classifier, rng = ImageClassifier().fit(real, real_labels), np.random.default_rng(0)
    of_real, of_rest = classifier.features(real), classifier.features(rest)

    def score(rows):
        return feature_scores(of_real, of_rest[rng.choice(rows, 360, replace=False)], None)

    of_all = [score(len(rest)) for _ in range(8)]
    left = [score(np.flatnonzero(~np.isin(labels, range(count)))) for count in range(8)]
    assert min(each["coverage"] for each in of_all) > 0.93
    for count, (more, fewer) in enumerate(pairwise(left)):
        share = np.mean(real_labels == count)
        assert 0.5 * share < more["coverage"] - fewer["coverage"] < 1.5 * share
    for name in ("fid", "kid"):
        assert max(each[name] for each in of_all) < left[3][name] < left[4][name] < left[7][name]


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
