"""A feature network and what it says of the real images: what drawn ones are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import program
from pipeline.config import Config
from pipeline.config_evaluation import FeaturesConfig
from pipeline.errors import UsageError
from pipeline.features import Classifier, Clip, FeatureNetwork, open_network
from pipeline.measuring import fit_classifier
from pipeline.metrics.answers import clip_scores, inception_score
from pipeline.metrics.classifier import ImageClassifier
from pipeline.metrics.scores import LEAST_IMAGES, Scores, feature_scores
from pipeline.real_features import Arrays, RealFeatures, RealSet, cache_folder, look_at, real_features

FITTED = "classifier."  # before the names of the fitted classifier's arrays


@dataclass(frozen=True)
class Yardstick:
    """A network, what it says of the real images, and the scores that follow; their names as in evaluations.jsonl."""

    title: str
    network: FeatureNetwork
    train: RealFeatures
    held_out: RealFeatures
    batch_images: int

    def scores(
        self,
        features: NDArray[np.float32],
        probabilities: NDArray[np.float32] | None,
        *,
        labels: NDArray[np.int64] | None,
        captions: NDArray[np.float32] | None,
    ) -> Scores:
        """Of images, by what the network says of them ([N,D], [N,K]) and of what was asked ([N], [N,D])."""
        found = feature_scores(self.train.features, features, len(self.held_out.features))
        if probabilities is not None:
            found["inception_score"] = inception_score(probabilities)
        scores: Scores = {f"{self.title}/{name}": value for name, value in found.items()}
        if labels is not None and (named := self.classes(probabilities)) is not None:
            scores["accuracy"] = float(np.mean(named == labels))
        if captions is not None:
            scores["clip_score"] = float(clip_scores(features, captions).mean())
        return scores

    def floor(self) -> Scores:
        """The scores of real held-out images: what a model that had learned everything would get, at their number."""
        real = self.held_out
        scores: Scores = {"num_images": len(real.features)}
        scores |= self.scores(
            real.features, real.get("probabilities"), labels=real.get("labels"), captions=real.get("captions")
        )
        return {f"validation/{name}": value for name, value in scores.items()}

    def classes(self, probabilities: NDArray[np.float32] | None) -> NDArray[np.int64] | None:
        """The class that each image is taken for, int64 [N]; None by a network that knows other classes than ours."""
        if probabilities is None or not isinstance(self.network, Classifier):
            return None
        return self.network.fitted.classes[probabilities.argmax(axis=1)]

    def read(self, prompts: Sequence[str | None]) -> NDArray[np.float32] | None:
        """Prompts → [N,D]; None where there are none, or the network can't read."""
        told = [text for text in prompts if text is not None]
        if not isinstance(self.network, Clip) or len(told) < len(prompts):
            return None
        parts = [told[i : i + self.batch_images] for i in range(0, len(told), self.batch_images)]
        return np.concatenate([self.network.read(part) for part in parts])


class OneClassError(Exception):
    """All labels are the same: no classifier can be fitted."""


def open_yardstick(
    settings: FeaturesConfig, config: Config, train: RealSet, held_out: RealSet, device: torch.device
) -> Yardstick | None:
    """Open the network, or fit it, and look at the real images; None where there are no two labels to fit it on.

    Raises UsageError, OSError, ValueError and ImportError: a network that is missing, too few real images.
    """
    size, title = config.evaluation.batch_images, settings.title

    def real(images: RealSet, description: dict[str, Any], look: Callable[[], Arrays]) -> RealFeatures:
        about = {"images": images.description, "network": description}
        found = real_features(cache_folder(config), title, about, look)
        if len(found.features) < LEAST_IMAGES:
            raise UsageError(
                f"{images.key} has {len(found.features)} images; precision, recall, density and coverage want "
                f"{LEAST_IMAGES} or more"
            )
        return found

    def real_by(network: FeatureNetwork, images: RealSet) -> RealFeatures:
        return real(images, network.description, lambda: look_at(network, images.shown, size, title))

    def fit() -> Arrays:
        shown = train.shown
        fitted = fit_classifier(shown.pixels, shown.labels, config.seed)
        if fitted is None:
            raise OneClassError
        state = {f"{FITTED}{name}": array for name, array in fitted.state().items()}
        return state | look_at(Classifier(fitted, train.description), shown, size, title)

    if settings.network != "classifier":
        network = open_network(settings, device)
        return Yardstick(title, network, real_by(network, train), real_by(network, held_out), size)
    if not train.has_labels():
        program.say("the images have no labels: no classifier is fitted, and its features' scores are left out")
        return None
    try:
        of_train = real(train, Classifier.described(train.description, config.seed), fit)
    except OneClassError:
        return None
    state = {name.removeprefix(FITTED): array for name, array in of_train.arrays.items() if name.startswith(FITTED)}
    classifier = Classifier(ImageClassifier(config.seed).load(state), train.description)
    return Yardstick(title, classifier, of_train, real_by(classifier, held_out), size)
