"""What a network says of images one by one, scored: the class it names, how sure it is, whether a caption fits."""

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics.arrays import Features


def inception_score(probabilities: NDArray[np.floating]) -> float:
    """exp(mean KL(p(y|x) ‖ p(y))), Salimans et al. 2016, section 4, of all images at once; 1 to the number of classes.

    probabilities [N, K], rows that sum to 1.  With p(y) the mean of the same images it is biased downwards for few of
    them; papers give the mean over ten parts of 50,000, which is lower still.  It compares with no real image: one
    good picture of each class has the best score there is.
    Raises ValueError for anything else.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or len(p) < 1 or not np.allclose(p.sum(axis=1), 1, atol=1e-3) or (p < 0).any():
        raise ValueError(f"probabilities must have shape [N, K] and rows that sum to 1, got {list(p.shape)}")
    marginal = p.mean(axis=0)
    ratio = np.divide(p, marginal, out=np.ones_like(p), where=p > 0)  # 0 ln 0 = 0
    return float(np.exp((p * np.log(ratio)).sum(axis=1).mean()))


def clip_scores(images: Features, captions: Features) -> NDArray[np.float64]:
    """100 · max(cos(image, caption), 0) of each pair (Hessel et al. 2021, eq. 1, in torchmetrics' units), float64 [N].

    images, captions [N, D]: CLIP's projections.  Raises ValueError where they don't fit each other.
    """
    if images.shape != captions.shape or images.ndim != 2:
        raise ValueError(
            f"images {list(images.shape)} and captions {list(captions.shape)} came, wanted is [N, D] twice"
        )
    x, y = (each.astype(np.float64) for each in (images, captions))
    cosine = (x * y).sum(axis=1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return 100 * np.maximum(cosine, 0)
