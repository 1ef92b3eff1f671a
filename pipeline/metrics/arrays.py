"""The two kinds of array every measure starts from, and the checks that they are what they claim to be."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Images: TypeAlias = NDArray[np.uint8]
"""[N, H, W, 3], RGB, 0..255."""

Features: TypeAlias = NDArray[np.float32] | NDArray[np.float64]
"""[N, D], one row for each image."""


def check_images(images: Images, name: str) -> None:
    """Raises ValueError, naming the array, unless it is a non-empty uint8 [N, H, W, 3]."""
    if images.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8 images, got {images.dtype}")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{name} must have shape [N, H, W, 3], got {list(images.shape)}")
    if images.size == 0:
        raise ValueError(f"{name} is empty: shape {list(images.shape)}")


def check_same_size(images: Images, reference: Images, name: str) -> None:
    """Raises ValueError unless both sets hold images of the same height and width."""
    if images.shape[1:] != reference.shape[1:]:
        wanted, came = list(reference.shape[1:]), list(images.shape[1:])
        raise ValueError(f"{name} holds images of shape {came}, wanted {wanted}")


def check_features(real: Features, fake: Features, min_samples: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both sets as float64. real [N, D], fake [M, D].

    Raises ValueError unless both are finite floating-point matrices of the same width D ≥ 1 and at least
    `min_samples` rows.
    """
    for name, features in (("real", real), ("fake", fake)):
        if features.ndim != 2 or features.shape[1] == 0:
            raise ValueError(f"{name} features must have shape [N, D], got {list(features.shape)}")
        if not np.issubdtype(features.dtype, np.floating):
            raise ValueError(f"{name} features must be floating point, got {features.dtype}")
        if len(features) < min_samples:
            raise ValueError(f"{name} features: needs at least {min_samples} samples, got {len(features)}")
        if not np.isfinite(features).all():
            bad_row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise ValueError(f"{name} features hold a NaN or an infinity, first in row {bad_row}")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real and fake features differ in width: {real.shape[1]} and {fake.shape[1]}")
    return real.astype(np.float64), fake.astype(np.float64)
