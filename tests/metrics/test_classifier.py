import numpy as np
import pytest

from pipeline.metrics.classifier import ImageClassifier


def blocks(num_images, seed=0, size=(40, 24)):
    """Two classes of any-sized images: reddish and bluish noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % 2 * 7 - 3  # classes -3 and 4
    images = rng.integers(0, 100, (num_images, *size, 3), dtype=np.uint8)
    images[labels == 4, :, :, 0] += 100
    images[labels == -3, :, :, 2] += 100
    return images, labels


def test_names_held_out_digits(classifier, digits):
    assert classifier.accuracy(digits.held_out, digits.held_out_labels) >= 0.98
    predicted = classifier.predict(digits.held_out)
    assert predicted.dtype == np.int64
    assert predicted.shape == (len(digits.held_out),)
    share = np.mean(predicted == digits.held_out_labels)
    assert classifier.accuracy(digits.held_out, digits.held_out_labels) == share


def test_features_are_the_last_hidden_layer_at_unit_scale(classifier, digits):
    features = classifier.features(digits.train)
    assert features.dtype == np.float32
    assert features.shape == (len(digits.train), 64)
    assert (features >= 0).all()  # after the ReLU
    assert np.sqrt(np.mean(features**2)) == pytest.approx(1.0, rel=1e-5)
    # What the classes are read from: a linear map of the features gives them all back.
    logits, *_ = np.linalg.lstsq(features, np.eye(10)[classifier.predict(digits.train)], rcond=None)
    assert np.mean((features @ logits).argmax(1) == classifier.predict(digits.train)) > 0.98


def test_an_image_has_the_same_features_in_any_batch(classifier, digits):
    together = classifier.features(digits.held_out)
    alone = np.concatenate([classifier.features(digits.held_out[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(together[:5], alone, rtol=1e-4, atol=1e-5)


def test_is_a_function_of_images_labels_and_seed():
    images, labels = blocks(60)
    np.random.seed(5)
    first = ImageClassifier(seed=3).fit(images, labels).features(images)
    np.random.seed(6)
    np.testing.assert_array_equal(first, ImageClassifier(seed=3).fit(images, labels).features(images))
    assert not np.array_equal(first, ImageClassifier(seed=4).fit(images, labels).features(images))


def test_leaves_the_global_random_state_alone():
    images, labels = blocks(20)
    before = np.random.get_state()[1].copy()
    ImageClassifier().fit(images, labels)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("size", [(40, 24), (5, 9), (16, 16), (70, 3)])
def test_takes_any_size_and_any_integers_as_classes_and_sees_colour(size):
    images, labels = blocks(80, size=size)
    classifier = ImageClassifier().fit(images, labels.astype(np.int32))
    assert classifier.accuracy(*blocks(40, seed=1, size=size)) == 1.0


def test_a_moved_digit_keeps_its_class(classifier, digits):
    moved = np.roll(digits.held_out, 2, axis=2)
    assert classifier.accuracy(moved, digits.held_out_labels) > 0.95


def test_what_cannot_be_fitted_says_why():
    images, labels = blocks(4)
    fit = ImageClassifier().fit
    with pytest.raises(ValueError, match=r"images is empty: shape \[0, 40, 24, 3\]"):
        fit(images[:0], labels[:0])
    with pytest.raises(ValueError, match="at least two classes, all labels are -3"):
        fit(images[::2], labels[::2])
    with pytest.raises(ValueError, match=r"labels must have shape \[4\], one per image, got \[3\]"):
        fit(images, labels[:3])
    with pytest.raises(ValueError, match="labels must be integers, got float64"):
        fit(images, labels / 1)
    with pytest.raises(ValueError, match=r"shape \[N, H, W, 3\], got \[4, 40, 24\]"):
        fit(images[..., 0], labels)
    with pytest.raises(ValueError, match="uint8 images, got float32"):
        fit(images.astype(np.float32), labels)


def test_what_cannot_be_judged_says_why():
    images, labels = blocks(4)
    with pytest.raises(ValueError, match="not fitted yet"):
        ImageClassifier().predict(images)
    classifier = ImageClassifier().fit(images, labels)
    with pytest.raises(ValueError, match=r"shape \[20, 24, 3\], wanted \[40, 24, 3\]"):
        classifier.features(images[:, :20])
    with pytest.raises(ValueError, match="images is empty"):
        classifier.predict(images[:0])
    with pytest.raises(ValueError, match="one per image"):
        classifier.accuracy(images, labels[:2])


def test_it_is_the_same_when_it_is_put_together_again(classifier, digits):
    again = ImageClassifier().load(classifier.state())
    np.testing.assert_array_equal(again.features(digits.held_out), classifier.features(digits.held_out))
    np.testing.assert_array_equal(again.predict(digits.held_out), classifier.predict(digits.held_out))
    with pytest.raises(ValueError, match="wanted"):
        again.features(digits.held_out[:, :16])


def test_probabilities_are_of_the_classes_in_order(classifier, digits):
    p = classifier.probabilities(digits.held_out)
    np.testing.assert_allclose(p.sum(axis=1), 1)
    np.testing.assert_array_equal(classifier.classes[p.argmax(axis=1)], classifier.predict(digits.held_out))
    two = digits.train_labels < 2  # of two classes scikit-learn gives one output
    pair = ImageClassifier().fit(digits.train[two], digits.train_labels[two] + 5)
    held_out = digits.held_out_labels < 2
    assert pair.probabilities(digits.held_out[held_out]).shape == (held_out.sum(), 2)
    assert pair.accuracy(digits.held_out[held_out], digits.held_out_labels[held_out] + 5) > 0.97
