"""Inception Score and CLIP score against their formulas."""

import numpy as np
import pytest
import torch

from pipeline.metrics.answers import clip_scores, inception_score


def test_inception_score_is_the_formula():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(7, 0.3), size=50)
    marginal = [sum(row[k] for row in p) / len(p) for k in range(7)]
    kl = [sum(row[k] * np.log(row[k] / marginal[k]) for k in range(7)) for row in p]
    assert inception_score(p) == pytest.approx(np.exp(np.mean(kl)), rel=1e-10)


def test_inception_score_of_sure_answers_is_the_number_of_classes_and_of_equal_ones_is_one():
    assert inception_score(np.eye(5)[np.arange(100) % 5]) == pytest.approx(5)  # zeros: 0 ln 0 = 0
    assert inception_score(np.full((30, 5), 0.2)) == pytest.approx(1)


def test_inception_score_of_few_images_is_too_low():
    p = np.random.default_rng(0).dirichlet(np.full(10, 0.1), size=4000)
    whole, parts = inception_score(p), [inception_score(part) for part in np.split(p, 400)]
    assert np.mean(parts) < whole - 0.5


def test_clip_score_is_a_hundred_cosines():
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal((20, 8)).astype(np.float32) for _ in range(2))
    cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(x).double(), torch.from_numpy(y).double()).numpy()
    np.testing.assert_allclose(clip_scores(x, y), 100 * np.maximum(cosine, 0), rtol=1e-10)
    np.testing.assert_allclose(clip_scores(x, 3 * x), 100)
    assert (clip_scores(x, -x) == 0).all()


def test_what_has_no_score_says_why():
    with pytest.raises(ValueError, match="rows that sum to 1"):
        inception_score(np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"images \[4, 3\] and captions \[5, 3\] came"):
        clip_scores(np.ones((4, 3)), np.ones((5, 3)))
