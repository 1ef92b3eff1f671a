"""Memorisation: how near a generated image comes to an image of the training set, in pixels or in features."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from pipeline.metrics.arrays import Features, Images, check_features, check_images, check_same_size

COPY_QUANTILE = 0.01  # of the training images' distances to their nearest others


class NearCopies(NamedTuple):
    """Distances are root-mean-square differences per pixel and channel, in levels of 0..255."""

    share: float  # of samples nearer to a training image than the threshold, in [0, 1]
    threshold_levels: float  # the smallest distance from a validation image to a training image
    median_samples_levels: float  # of the samples' distances to their nearest training images
    median_validation_levels: float  # the same for the validation images


def nearest(train: Images, images: Images, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k training images nearest to each image, nearest first: (indices, distances).

    train uint8 [M, H, W, 3], images uint8 [N, H, W, 3]; indices int64 [N, k], distances float64 [N, k]: root
    mean square difference per pixel and channel, in levels of 0..255. Right to 1e-7, and exactly 0 for an
    exact copy: products of 8-bit pixels are whole numbers, which scikit-learn sums in float64. It goes
    through both sets in blocks, so beyond the pixels as float32 memory grows with N·k, not N·M. Equally
    near images come in the order of their indices.
    Raises ValueError for misshapen or empty sets, different image sizes, and k outside 1..M.
    """
    check_images(train, "train")
    check_images(images, "images")
    check_same_size(images, train, "images")
    if not 1 <= k <= len(train):
        raise ValueError(f"k must be in 1..{len(train)} (the training images), got {k}")
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(_flat(train))
    distances, indices = search.kneighbors(_flat(images))  # Euclidean, over all H·W·3 values
    order = np.lexsort((indices, distances), axis=1)
    indices, distances = np.take_along_axis(indices, order, 1), np.take_along_axis(distances, order, 1)
    num_values = train[0].size
    return indices.astype(np.int64), distances.astype(np.float64) / np.sqrt(num_values)


def near_copy_share(train: Images, validation: Images, samples: Images) -> NearCopies:
    """Which share of the samples is nearer to a training image than any real validation image is.

    All uint8 [·, H, W, 3]. Real images that were never trained on show how near two different images come by
    chance. A share near 0 says that the samples are not copies; memorised images push it towards 1, and the
    samples' median below the validation images' median. A threshold of 0 says that a validation image is an
    exact copy of a training image, so that nothing can be nearer and the share says nothing.
    Raises ValueError as `nearest` does.
    """
    check_images(validation, "validation")
    check_images(samples, "samples")
    check_same_size(validation, train, "validation")
    check_same_size(samples, train, "samples")
    validation_levels = nearest(train, validation, 1)[1][:, 0]  # [N of validation]
    sample_levels = nearest(train, samples, 1)[1][:, 0]  # [N of samples]
    threshold = validation_levels.min()
    return NearCopies(
        share=float(np.mean(sample_levels < threshold)),
        threshold_levels=float(threshold),
        median_samples_levels=float(np.median(sample_levels)),
        median_validation_levels=float(np.median(validation_levels)),
    )


def copy_distance(train: Features) -> float:
    """How near is too near, in features: 99% of the training images have no other one at this distance.

    train [M, D], floating point.  0 where over 1% of them are there twice, so that only exact copies count.
    Raises ValueError for fewer than three images, a NaN or an infinity.
    """
    train, _ = check_features(train, train, min_samples=3)
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(train)
    distances, _ = search.kneighbors()  # without an argument: neighbours of the fitted images, self left out
    return float(np.quantile(distances[:, 0], COPY_QUANTILE))


def feature_copies(train: Features, samples: Features) -> NDArray[np.bool_]:
    """Which samples are near-copies: a training image lies within `copy_distance` of them, bool [N].

    Of real held-out images about 1% are, as of the training images themselves; copying shows as a share far above
    theirs (compare the tests of Meehan et al. 2020 and Alaa et al. 2022, which hold the same distances together).

    train [M, D], samples [N, D], floating point.
    Raises ValueError for fewer than three training images, different widths, a NaN or an infinity.
    """
    near = copy_distance(train)
    train, samples = check_features(train, samples, min_samples=1)
    distances, _ = _nearest_features(train, samples, 1)
    slack = 1e-6 * float(np.sqrt(np.square(train).sum(1).max()))  # distances of equal features are rounded
    return distances[:, 0] <= near + slack


def nearest_features(train: Features, samples: Features, k: int) -> NDArray[np.int64]:
    """Indices of the k training images nearest in features, nearest first, int64 [N, k].

    Raises ValueError as `feature_copies` does, and for k outside 1..M.
    """
    train, samples = check_features(train, samples, min_samples=1)
    if not 1 <= k <= len(train):
        raise ValueError(f"k must be in 1..{len(train)} (the training images), got {k}")
    return _nearest_features(train, samples, k)[1]


def _nearest_features(
    train: NDArray[np.float64], samples: NDArray[np.float64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(train)
    distances, indices = search.kneighbors(samples)
    return distances, indices.astype(np.int64)


def _flat(images: Images) -> NDArray[np.float32]:
    """[N, H, W, 3] → [N, H·W·3]."""
    return images.reshape(len(images), -1).astype(np.float32)
