"""Every score of one set of images, as one flat dictionary."""

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics.arrays import Images, check_images, check_same_size
from pipeline.metrics.classifier import ImageClassifier
from pipeline.metrics.distances import frechet_distance, kernel_distance
from pipeline.metrics.manifold import manifold
from pipeline.metrics.neighbours import near_copy_share


def image_scores(
    classifier: ImageClassifier | None,
    train_images: Images,
    images: Images,
    labels: NDArray[np.integer] | None,
    *,
    validation_images: Images,
    seed: int,
) -> dict[str, float | int]:
    """Scores of `images` against the training images, on the features of a classifier fitted on those.

    classifier: None where the training images have no labels; then only distances in pixels are given.
    All image arrays uint8 [·, H, W, 3] of one size. labels, integer [N]: the classes that were asked for, or
    None where none were. The images come interleaved by class, so that every prefix of them is balanced.

        class_accuracy          share that the classifier takes for what was asked (left out without labels)
        frechet_distance        0 is best; biased upwards for few images
        kernel_distance, _std   0 is best; mean and standard deviation over subsets drawn by `seed`
        precision, density      do the images look real?  share; about 1
        recall, coverage        is everything real also made?  shares
        recall_equal_n, coverage_equal_n
                                the same on the first `num_images_equal_n` = len(validation_images) images
        near_copy_share         share nearer to a training image than any validation image is; about 0 is good
        near_copy_threshold_levels, nearest_train_median_levels
                                pixel distances behind it, root mean square in levels of 0..255
        num_images, num_train_images

    For a yardstick, score the validation images themselves. Recall and coverage grow with the number of
    images, so a comparison with the validation images has to be at equal N: that is what the `_equal_n` pair
    is for. It is left out where there are fewer images than validation images: no equal N exists then.
    Raises ValueError as the single measures do.
    """
    check_images(train_images, "train_images")
    for name, array in (("images", images), ("validation_images", validation_images)):
        check_images(array, name)
        check_same_size(array, train_images, name)
    scores: dict[str, float | int] = {"num_images": len(images), "num_train_images": len(train_images)}
    copies = near_copy_share(train_images, validation_images, images)
    scores_of_copies: dict[str, float | int] = {
        "near_copy_share": copies.share,
        "near_copy_threshold_levels": copies.threshold_levels,
        "nearest_train_median_levels": copies.median_samples_levels,
    }
    if classifier is None:
        return scores | scores_of_copies
    if labels is not None:
        scores["class_accuracy"] = classifier.accuracy(images, labels)

    real, fake = classifier.features(train_images), classifier.features(images)  # [M, D], [N, D]
    kernel = kernel_distance(real, fake, seed)
    whole = manifold(real, fake)
    scores |= {
        "frechet_distance": frechet_distance(real, fake),
        "kernel_distance": kernel.mean,
        "kernel_distance_std": kernel.std,
        "precision": whole.precision,
        "recall": whole.recall,
        "density": whole.density,
        "coverage": whole.coverage,
    }
    num_equal = len(validation_images)
    if len(images) >= num_equal:
        prefix = manifold(real, fake[:num_equal])
        scores |= {
            "recall_equal_n": prefix.recall,
            "coverage_equal_n": prefix.coverage,
            "num_images_equal_n": num_equal,
        }

    return scores | scores_of_copies
