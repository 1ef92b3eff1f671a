"""A small classifier fitted on the real training images: it names classes and gives features.

It takes a few seconds on one thread and needs no download, which is what a small data set and a test need. It
sees 16×16 colour thumbnails, so it judges shape and colour, not texture: photographs at 256 pixels want the
features of a pretrained network instead, and everything else in this package takes those just as well.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from pipeline.metrics.arrays import Images, check_images, check_same_size

_THUMBNAIL_SIDE_PIXELS = 16
_CHUNK_IMAGES = 256  # at 512 px, 256 images are 0.8 GB as float32
_NUM_EPOCHS = 20
_NUM_LAYERS = 3


class ImageClassifier:
    """Multi-layer perceptron (128, 64, ReLU) on thumbnails; the 64 last hidden activations are its features.

    A choice by measurement on scikit-learn's digits at 32×32, stratified 80/20, ten splits: 98.8 % of the
    held-out images right. The same network without shifted copies of its training images reaches 98.0 %; an
    RBF support vector machine 99.1 %, but it has no layer to read features from.

    Fitting is a pure function of (images, labels, seed). It holds nine float32 thumbnails (27 KB) per image.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._layers: list[tuple[NDArray[np.float32], NDArray[np.float32]]] | None = None  # weight, bias of each

    def fit(self, images: Images, labels: NDArray[np.integer]) -> Self:
        """images uint8 [N, H, W, 3], labels integer [N]; any H, W, any integers as classes.

        Raises ValueError for an empty or misshapen set, labels that don't match it, and a single class.
        """
        check_images(images, "images")
        _check_labels(labels, images)
        classes = np.unique(labels)
        if len(classes) < 2:
            raise ValueError(f"a classifier needs at least two classes, all labels are {classes[0]}")
        self._reference = images[:1].copy()  # the size that every later image must have

        thumbnails = _thumbnails(images)
        # Centred per input but scaled by one number: the border pixels of a set like digits hardly vary, and
        # a scale of their own would blow their noise up to the size of the strokes.
        self._mean, self._std = thumbnails.mean(axis=0), max(float(thumbnails.std()), 1e-6)
        inputs = np.concatenate([self._standardized(copy) for copy in _shifted_copies(thumbnails)])
        targets = np.tile(labels.astype(np.int64), len(inputs) // len(images))

        # alpha: weight decay. max_iter: epochs; a fixed number, so "not converged" is no news.
        mlp = MLPClassifier((128, 64), alpha=1.0, max_iter=_NUM_EPOCHS, random_state=self.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mlp.fit(inputs, targets)
        layers = zip(mlp.coefs_, mlp.intercepts_, strict=True)
        self._layers = [(w.astype(np.float32), b.astype(np.float32)) for w, b in layers]
        self._classes = classes.astype(np.int64)
        self._feature_scale = 1.0
        self._feature_scale = max(float(np.sqrt(np.mean(self.features(images) ** 2))), 1e-6)
        return self

    def state(self) -> dict[str, NDArray[Any]]:
        """All that `fit` found, as arrays by name, for `load`."""
        layers = self._layers_fitted()
        return {
            "size": np.array(self._reference.shape[1:3]),
            "mean": self._mean,
            "std": np.array(self._std),
            "classes": self._classes,
            "feature_scale": np.array(self._feature_scale),
            **{f"weight_{i}": weight for i, (weight, _) in enumerate(layers)},
            **{f"bias_{i}": bias for i, (_, bias) in enumerate(layers)},
        }

    def load(self, state: Mapping[str, NDArray[Any]]) -> Self:
        """Be the classifier that `state` was taken of."""
        height, width = (int(side) for side in state["size"])
        self._reference = np.zeros((1, height, width, 3), dtype=np.uint8)
        self._mean, self._std = state["mean"], state["std"].item()
        self._classes, self._feature_scale = state["classes"], state["feature_scale"].item()
        self._layers = [(state[f"weight_{i}"], state[f"bias_{i}"]) for i in range(_NUM_LAYERS)]
        return self

    def predict(self, images: Images) -> NDArray[np.int64]:
        """The class of each image, int64 [N]; images uint8 [N, H, W, 3].

        Raises ValueError before `fit`, for a misshapen or empty set, and for another size than was fitted on.
        """
        return self.classes[self.probabilities(images).argmax(axis=1)]

    @property
    def classes(self) -> NDArray[np.int64]:
        """The labels it knows, in order, int64 [K]."""
        self._layers_fitted()
        return self._classes

    def probabilities(self, images: Images) -> NDArray[np.float64]:
        """How likely it takes each class to be, float64 [N, K], the classes in order; ValueError as in `predict`."""
        weight, bias = self._layers_fitted()[-1]
        logits = (self._hidden(images) @ weight + bias).astype(np.float64)
        if logits.shape[1] == 1:  # of two classes scikit-learn has one output, the second one's
            logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
        return softmax(logits, axis=1)

    def features(self, images: Images) -> NDArray[np.float32]:
        """Last hidden activations, float32 [N, 64], of images uint8 [N, H, W, 3]; ValueError as in `predict`.

        Divided by their root mean square over the training images: how large a hidden layer's numbers are is
        an accident of its training, and would set the size of every distance measured on them.
        """
        return (self._hidden(images) / self._feature_scale).astype(np.float32)

    def accuracy(self, images: Images, labels: NDArray[np.integer]) -> float:
        """Share in [0, 1] of images, uint8 [N, H, W, 3], whose predicted class is their label in [N]."""
        check_images(images, "images")
        _check_labels(labels, images)
        return float(np.mean(self.predict(images) == labels))

    def _hidden(self, images: Images) -> NDArray[np.float32]:
        """[N, 64]."""
        layers = self._layers_fitted()
        check_images(images, "images")
        check_same_size(images, self._reference, "images")
        hidden = self._standardized(_thumbnails(images))
        for weight, bias in layers[:-1]:
            hidden = np.maximum(hidden @ weight + bias, 0.0)  # [N, width of the layer]
        return hidden

    def _layers_fitted(self) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        if self._layers is None:
            raise ValueError("the classifier is not fitted yet: call fit(images, labels) first")
        return self._layers

    def _standardized(self, thumbnails: NDArray[np.float32]) -> NDArray[np.float32]:
        """[N, 3, h, w] → [N, 3·h·w]."""
        return ((thumbnails - self._mean) / self._std).reshape(len(thumbnails), -1)


def _check_labels(labels: NDArray[np.integer], images: Images) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if labels.shape != (len(images),):
        raise ValueError(f"labels must have shape [{len(images)}], one per image, got {list(labels.shape)}")


def _thumbnails(images: Images) -> NDArray[np.float32]:
    """uint8 [N, H, W, 3] → float32 [N, 3, h, w] in [0, 1]; h, w at most 16, a pixel the mean of its area."""
    size = tuple(min(side, _THUMBNAIL_SIDE_PIXELS) for side in images.shape[1:3])
    chunks: list[NDArray[np.float32]] = []
    for start in range(0, len(images), _CHUNK_IMAGES):
        x = torch.from_numpy(np.ascontiguousarray(images[start : start + _CHUNK_IMAGES]))  # [n, H, W, 3]
        x = x.permute(0, 3, 1, 2).float() / 255  # [n, 3, H, W]
        chunks.append(torch.nn.functional.adaptive_avg_pool2d(x, size).numpy())
    return np.concatenate(chunks)


def _shifted_copies(thumbnails: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """The thumbnails moved by -1, 0 and 1 pixels along both axes, edges repeated: nine times [N, 3, h, w]."""
    height, width = thumbnails.shape[2:]
    padded = np.pad(thumbnails, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    return [padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
