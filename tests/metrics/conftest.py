"""Real images: scikit-learn's digits at 32×32, stratified into training and held-out images, and a classifier."""

from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pipeline.metrics.classifier import ImageClassifier


class Digits(NamedTuple):
    train: NDArray[np.uint8]  # [1437, 32, 32, 3]
    train_labels: NDArray[np.int64]
    held_out: NDArray[np.uint8]  # [360, 32, 32, 3], shuffled: every prefix is about balanced
    held_out_labels: NDArray[np.int64]


@pytest.fixture(scope="session")
def digits() -> Digits:
    images, labels = load_digits(return_X_y=True)
    grey = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC)) for x in grey])
    rgb = np.repeat(large[..., None], 3, axis=3)
    train, held_out, train_labels, held_out_labels = train_test_split(
        rgb, labels.astype(np.int64), test_size=0.2, stratify=labels, random_state=0
    )
    return Digits(train, train_labels, held_out, held_out_labels)


@pytest.fixture(scope="session")
def classifier(digits: Digits) -> ImageClassifier:
    return ImageClassifier().fit(digits.train, digits.train_labels)
