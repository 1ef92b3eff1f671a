"""What feature networks say of the real images, looked at once and kept in a folder for all runs.

A file is named by the fingerprint of all that it depends on: data, how many of them, preprocessing, network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from pipeline import files
from pipeline.config import Config
from pipeline.data.dataset import Shown, read_told
from pipeline.data.index import ShardSet
from pipeline.errors import UsageError, blame
from pipeline.features import Clip, FeatureNetwork, Images
from pipeline.real_images import num_images_of, read_sets

FORMAT = 1  # of the files, and of how images are decoded and cut
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class RealSet:
    """The real images of one setting, read when they are first asked for."""

    key: str  # the setting
    folders: tuple[str, ...]
    config: Config

    @cached_property
    def description(self) -> dict[str, Any]:
        """JSON of all that the images depend on."""
        with blame(self.key):
            sets = [ShardSet(folder, open_shards=1, remote=self.config.data.remote) for folder in self.folders]
        return {
            "format": FORMAT,
            "data": [shards.fingerprint for shards in sets],
            "num_images": num_images_of([len(shards) for shards in sets], self.config),
            "image_size": self.config.data.image_size,
        }

    @cached_property
    def shown(self) -> Shown:
        """Pixels, labels and captions."""
        return read_sets(self.key, self.folders, self.config)

    def forget(self) -> None:
        """Free the pixels; they are read again when they are asked for."""
        self.__dict__.pop("shown", None)

    def has_labels(self) -> bool:
        """Whether the first image of each set has a label."""
        with blame(self.key):
            sets = [ShardSet(folder, open_shards=1, remote=self.config.data.remote) for folder in self.folders]
            told = [next(read_told(shards, [_first(shards)]), (None, None)) for shards in sets]
        return all(label is not None for label, _ in told)


@dataclass(frozen=True)
class RealFeatures:
    """What one network says of a set of real images."""

    fingerprint: str  # of all that it depends on
    arrays: Arrays

    @property
    def features(self) -> NDArray[np.float32]:
        """[N,D]."""
        return self.arrays["features"]

    def get(self, name: str) -> NDArray[Any] | None:
        """`probabilities` [N,K], `labels` [N] or `captions` [N,D], where there are any."""
        return self.arrays.get(name)


def real_features(folder: Path, title: str, description: dict[str, Any], look: Callable[[], Arrays]) -> RealFeatures:
    """The features of this description, from the folder or else by `look`, and then kept there.

    Raises UsageError for a file there that is of another description, or can't be read.
    """
    fingerprint = files.fingerprint(description)[:16]
    path = folder / f"{title}-{fingerprint}.safetensors"
    if path.exists():
        return RealFeatures(fingerprint, _read(path, description))
    arrays = look()
    with files.whole(path, os.getpid()) as aside:  # other runs may find the same at the same time
        metadata = {"description": json.dumps(description, sort_keys=True)}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, aside, metadata)
    return RealFeatures(fingerprint, arrays)


def look_at(network: FeatureNetwork, shown: Shown, batch_images: int, title: str) -> Arrays:
    """What a network says of real images, by name."""
    arrays = see_all(network, shown.pixels, batch_images, f"{title} sees real images")
    if shown.labels is not None:
        arrays["labels"] = shown.labels
    if isinstance(network, Clip) and shown.captions is not None:
        starts = range(0, len(shown.captions), batch_images)
        read = [network.read(shown.captions[start : start + batch_images]) for start in starts]
        arrays["captions"] = np.concatenate(read)
    return arrays


def see_all(network: FeatureNetwork, images: Images, batch_images: int, title: str) -> Arrays:
    """`features` [N,D], and `probabilities` [N,K] where it names classes, of images uint8 [N,H,W,3]."""
    starts = tqdm(
        range(0, len(images), batch_images),
        desc=title,
        unit=f" × {batch_images} images",
        dynamic_ncols=True,
        leave=False,
    )
    seen = [network.see(images[start : start + batch_images]) for start in starts]
    found: Arrays = {"features": np.concatenate([each.features for each in seen])}
    named = [each.probabilities for each in seen if each.probabilities is not None]
    if named:
        found["probabilities"] = np.concatenate(named)
    return found


def cache_folder(config: Config) -> Path:
    """Where features of real images are kept."""
    if config.evaluation.cache_dir is not None:
        return Path(config.evaluation.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "latent-diffusion-pipeline"


def _read(path: Path, description: dict[str, Any]) -> Arrays:
    try:
        with safe_open(path, framework="numpy") as opened:
            said: dict[str, Any] = json.loads((opened.metadata() or {}).get("description", "{}"))
            arrays: Arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"{path}: can't be read ({error}); remove it, and it is made anew") from None
    if said != json.loads(json.dumps(description)):
        was, now = _flat(said), _flat(description)
        key = next(key for key in sorted({*was, *now}) if was.get(key) != now.get(key))
        raise UsageError(
            f"{path}: features of real images by another preprocessing: {key} was {was.get(key)!r}, wanted is "
            f"{now.get(key)!r}; remove it, and it is made anew"
        )
    return arrays


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}{key}.")
    return found


def _first(shards: ShardSet) -> tuple[int, int]:
    """(shard, row) of the first sample."""
    return next(shard for shard, count in enumerate(shards.counts) if count), 0
