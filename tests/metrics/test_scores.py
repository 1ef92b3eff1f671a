import json

import numpy as np
import pytest
import torch

from pipeline.metrics.distances import frechet_distance, kernel_distance
from pipeline.metrics.manifold import manifold
from pipeline.metrics.scores import image_scores

NAMES = {
    *("num_images", "num_train_images", "class_accuracy", "frechet_distance"),
    *("kernel_distance", "kernel_distance_std", "precision", "recall", "density", "coverage"),
    *("recall_equal_n", "coverage_equal_n", "num_images_equal_n", "near_copy_share"),
    *("near_copy_threshold_levels", "nearest_train_median_levels"),
}


@pytest.fixture(scope="module")
def score(classifier, digits):
    def score(images, labels=None, validation=digits.held_out, seed=0):
        return image_scores(classifier, digits.train, images, labels, validation_images=validation, seed=seed)

    return score


def test_is_what_the_single_measures_say(score, classifier, digits):
    validation = digits.held_out[:100]
    scores = score(digits.held_out, digits.held_out_labels, validation)
    assert set(scores) == NAMES
    assert json.loads(json.dumps(scores)) == scores
    real, fake = classifier.features(digits.train), classifier.features(digits.held_out)
    whole, prefix = manifold(real, fake), manifold(real, fake[:100])
    assert scores["frechet_distance"] == frechet_distance(real, fake)
    assert (scores["kernel_distance"], scores["kernel_distance_std"]) == kernel_distance(real, fake, seed=0)
    assert [scores[x] for x in ("precision", "recall", "density", "coverage")] == list(whole[:4])
    assert (scores["recall_equal_n"], scores["coverage_equal_n"]) == (prefix.recall, prefix.coverage)
    assert (scores["num_images"], scores["num_train_images"], scores["num_images_equal_n"]) == (360, 1437, 100)
    assert scores["class_accuracy"] >= 0.98


def test_the_yardstick_is_at_equal_n_with_itself(score, digits):
    scores = score(digits.held_out, digits.held_out_labels)
    assert scores["recall_equal_n"] == scores["recall"]
    assert scores["coverage_equal_n"] == scores["coverage"]
    assert scores["near_copy_share"] == 0.0


def test_without_labels_or_enough_images_the_scores_are_left_out(score, digits):
    few = score(digits.held_out[:50])
    assert set(few) == NAMES - {"class_accuracy", "recall_equal_n", "coverage_equal_n", "num_images_equal_n"}


def test_ranks_sets_as_a_person_would(score, digits):
    rng = np.random.default_rng(0)
    real = digits.held_out
    noisy = np.clip(real + rng.normal(0, 60, real.shape), 0, 255).astype(np.uint8)
    without_3_and_7 = np.resize(real[~np.isin(digits.held_out_labels, (3, 7))], real.shape)
    wrong_labels = (digits.held_out_labels + 1) % 10
    good = score(real, digits.held_out_labels)
    bad = score(noisy)
    poor = score(without_3_and_7)
    assert bad["frechet_distance"] > 2 * good["frechet_distance"]
    assert bad["kernel_distance"] > good["kernel_distance"] + 0.02
    assert poor["recall"] < good["recall"] - 0.1
    assert poor["coverage"] < good["coverage"] - 0.1
    assert poor["precision"] == pytest.approx(good["precision"], abs=0.05)
    assert score(real, wrong_labels)["class_accuracy"] < 0.02
    assert score(digits.train[:360])["near_copy_share"] == 1.0


def test_is_a_function_of_its_arguments(score, digits):
    torch.manual_seed(1)
    first = score(digits.held_out[:60], seed=3)
    torch.manual_seed(2)
    assert score(digits.held_out[:60], seed=3) == first
    other = score(digits.held_out[:60], seed=4)
    assert {name for name in first if first[name] != other[name]} == {"kernel_distance", "kernel_distance_std"}


def test_what_cannot_be_scored_says_why(score, digits):
    with pytest.raises(ValueError, match=r"images holds images of shape \[16, 32, 3\]"):
        score(digits.held_out[:, :16])
    with pytest.raises(ValueError, match="validation_images is empty"):
        score(digits.held_out, validation=digits.held_out[:0])
    with pytest.raises(ValueError, match=r"labels must have shape \[360\]"):
        score(digits.held_out, digits.held_out_labels[:10])
