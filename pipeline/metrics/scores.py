"""Every score of one set of images against the real training images, as flat dictionaries."""

from pipeline.metrics.arrays import Features, Images, check_images, check_same_size
from pipeline.metrics.distances import frechet_distance, kernel_distance
from pipeline.metrics.manifold import manifold
from pipeline.metrics.neighbours import feature_copies, near_copy_share

LEAST_IMAGES = 6  # on either side: one more than the neighbours of density and coverage

Scores = dict[str, float | int]


def feature_scores(train: Features, images: Features, num_equal: int | None) -> Scores:
    """Scores in the features of one network.  train [M, D], images [N, D].

        fid                   Fréchet distance; 0 is best; biased upwards for few images, and the more the larger D is
        kid, kid_standard_error
                              kernel distance; 0 is best; without bias
        precision, density    do the images look real?  share; about 1
        recall, coverage      is everything real also made?  shares
        fid_equal_n, recall_equal_n, coverage_equal_n
                              the same of the first `num_images_equal_n` = num_equal images
        near_copy_share       share of near-copies of training images, see `feature_copies`; of real ones about 0.01
        num_reference_images  M

    The images come interleaved by class, so that every prefix of them is balanced.  num_equal: how many real held-out
    images there are.  FID falls, recall and coverage grow with the number of images, so a comparison with the held-out
    ones has to be at equal N.  Left out where there are fewer images than that: no equal N exists then; None: left out.
    Raises ValueError as the single measures do.
    """
    kernel = kernel_distance(train, images)
    whole = manifold(train, images)
    scores: Scores = {
        "fid": frechet_distance(train, images),
        "kid": kernel.value,
        "kid_standard_error": kernel.standard_error,
        "precision": whole.precision,
        "recall": whole.recall,
        "density": whole.density,
        "coverage": whole.coverage,
        "near_copy_share": float(feature_copies(train, images).mean()),
        "num_reference_images": len(train),
    }
    if num_equal is not None and LEAST_IMAGES <= num_equal <= len(images):
        same = num_equal == len(images)
        prefix = whole if same else manifold(train, images[:num_equal])
        scores |= {
            "fid_equal_n": scores["fid"] if same else frechet_distance(train, images[:num_equal]),
            "recall_equal_n": prefix.recall,
            "coverage_equal_n": prefix.coverage,
            "num_images_equal_n": num_equal,
        }
    return scores


def pixel_scores(train_images: Images, images: Images, validation_images: Images) -> Scores:
    """How near images come to training images in pixels.  All uint8 [·, H, W, 3] of one size.

        near_copy_share         share nearer to a training image than any validation image is; about 0 is good
        near_copy_threshold_levels, nearest_train_median_levels
                                pixel distances behind it, root mean square in levels of 0..255

    Raises ValueError as `near_copy_share` does.
    """
    check_images(train_images, "train_images")
    for name, array in (("images", images), ("validation_images", validation_images)):
        check_images(array, name)
        check_same_size(array, train_images, name)
    copies = near_copy_share(train_images, validation_images, images)
    return {
        "near_copy_share": copies.share,
        "near_copy_threshold_levels": copies.threshold_levels,
        "nearest_train_median_levels": copies.median_samples_levels,
    }
