"""Memorisation: how near, in pixels, a generated image comes to an image of the training set."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from pipeline.metrics.arrays import Images, check_images, check_same_size


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


def _flat(images: Images) -> NDArray[np.float32]:
    """[N, H, W, 3] → [N, H·W·3]."""
    return images.reshape(len(images), -1).astype(np.float32)
