import numpy as np
import pytest

from pipeline.metrics.neighbours import copy_distance, feature_copies, near_copy_share, nearest, nearest_features


def noise(num, seed=0, size=(6, 4)):
    return np.random.default_rng(seed).integers(0, 256, (num, *size, 3), dtype=np.uint8)


def test_is_the_root_mean_square_difference():
    train, images = noise(20), noise(7, seed=1)
    all_levels = np.array([[np.sqrt(np.mean((x.astype(float) - y.astype(float)) ** 2)) for y in train] for x in images])
    indices, levels = nearest(train, images, k=3)
    assert indices.dtype == np.int64
    np.testing.assert_array_equal(indices, all_levels.argsort(axis=1)[:, :3])
    np.testing.assert_allclose(levels, np.sort(all_levels, axis=1)[:, :3], rtol=1e-6)


def test_unit_is_one_level_of_one_pixel():
    black, grey = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 12, np.uint8)
    assert nearest(black, grey, k=1)[1].item() == pytest.approx(12.0)


def test_an_exact_copy_is_at_exactly_zero_and_one_level_is_not():
    train = noise(400, size=(32, 32))
    images = train[[17, 3]].copy()
    images[1, 0, 0, 0] ^= 1
    indices, levels = nearest(train, images, k=1)
    np.testing.assert_array_equal(indices[:, 0], [17, 3])
    assert levels[0, 0] == 0.0
    assert levels[1, 0] == pytest.approx(1 / np.sqrt(32 * 32 * 3))


def test_equally_near_images_come_in_order():
    train = np.repeat(noise(3), 4, axis=0)
    indices, levels = nearest(train, train[[4]], k=12)
    np.testing.assert_array_equal(indices[0, :4], [4, 5, 6, 7])
    assert (np.diff(levels[0]) >= 0).all()


def test_copies_of_training_images_are_found(digits):
    copies = near_copy_share(digits.train, digits.held_out, digits.train[:100])
    assert copies.share == 1.0
    assert copies.median_samples_levels == 0.0
    assert copies.threshold_levels > 0.0


def test_slightly_noisy_copies_are_found(digits):
    rng = np.random.default_rng(0)
    noisy = np.clip(digits.train[:100] + rng.normal(0, 3, (100, 32, 32, 3)), 0, 255).astype(np.uint8)
    assert near_copy_share(digits.train, digits.held_out, noisy).share > 0.95


def test_real_unseen_images_are_not_copies(digits):
    half = len(digits.held_out) // 2
    fresh = near_copy_share(digits.train, digits.held_out[:half], digits.held_out[half:])
    assert fresh.share <= 0.03
    assert fresh.median_samples_levels == pytest.approx(fresh.median_validation_levels, rel=0.1)
    itself = near_copy_share(digits.train, digits.held_out, digits.held_out)
    assert itself.share == 0.0  # none is nearer than the nearest
    nearest_levels = nearest(digits.train, digits.held_out, 1)[1]
    assert itself.threshold_levels == nearest_levels.min()
    assert itself.median_validation_levels == np.median(nearest_levels)


def test_a_training_image_in_the_validation_set_shows_as_threshold_zero():
    train = noise(10)
    copies = near_copy_share(train, train[:1], train)
    assert copies.threshold_levels == 0.0
    assert copies.share == 0.0


def test_what_has_no_neighbours_says_why():
    train = noise(5)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.5 .* got 6"):
        nearest(train, train, k=6)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.5 .* got 0"):
        nearest(train, train, k=0)
    with pytest.raises(ValueError, match=r"images holds images of shape \[5, 4, 3\], wanted \[6, 4, 3\]"):
        nearest(train, noise(2, size=(5, 4)), k=1)
    with pytest.raises(ValueError, match="train is empty"):
        nearest(train[:0], train, k=1)
    with pytest.raises(ValueError, match="samples holds images of shape"):
        near_copy_share(train, train, noise(2, size=(5, 4)))
    with pytest.raises(ValueError, match="validation must be uint8 images, got float64"):
        near_copy_share(train, train / 255, train)


def test_near_copies_in_features_are_about_as_many_as_real_images_have():
    rng = np.random.default_rng(0)
    train, held_out, fresh = (rng.standard_normal((1000, 6)) for _ in range(3))
    assert feature_copies(train, held_out).mean() == pytest.approx(0.01, abs=0.01)
    copies = train[:300] + 1e-3 * rng.standard_normal((300, 6))
    mixed = np.concatenate([copies, fresh[:700]])
    found = feature_copies(train, mixed)
    assert found[:300].all() and found[300:].mean() < 0.03
    np.testing.assert_array_equal(nearest_features(train, copies, 3)[:, 0], np.arange(300))


def test_the_copy_distance_is_a_quantile_of_the_training_images_own():
    train = np.random.default_rng(0).standard_normal((40, 2))
    own = [min(np.linalg.norm(x - y) for j, y in enumerate(train) if j != i) for i, x in enumerate(train)]
    assert copy_distance(train) == pytest.approx(np.quantile(own, 0.01))


def test_where_training_images_are_there_twice_only_exact_copies_count():
    rng = np.random.default_rng(0)
    once = rng.standard_normal((30, 4))
    train = np.concatenate([once, once])
    assert feature_copies(train, np.concatenate([once[:5], once[:5] + 0.01])).tolist() == [True] * 5 + [False] * 5
    with pytest.raises(ValueError, match="needs at least 3 samples, got 2"):
        feature_copies(train[:2], once)
