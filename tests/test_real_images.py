"""The real images that others are compared with: which of a set, and of a mix of sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_sets import good, write_set
from world import small_config

from pipeline.config import Config
from pipeline.real_features import RealSet
from pipeline.real_images import num_images_of


def config_of(folders: list[Path], weights: list[float] | None, limit: int) -> Config:
    values: dict[str, Any] = small_config(Path("nowhere"))
    values["data"] |= {"train_images": [str(folder) for folder in folders], "train_latents": None, "weights": weights}
    values["evaluation"]["max_reference_images"] = limit
    return Config.model_validate(values)


def reference(folders: list[Path], weights: list[float] | None, limit: int) -> RealSet:
    config = config_of(folders, weights, limit)
    return RealSet("data.train_images", config.data.train_images, config)


@pytest.mark.parametrize(
    ("sizes", "weights", "limit", "wanted"),
    [
        ([1000, 1000], [9, 1], 500, [450, 50]),
        ([1000, 1000], [0.9, 0.1], 500, [450, 50]),
        ([1000, 1000, 1000], [1, 1, 1], 500, [167, 167, 166]),
        ([1000, 1000, 1000], [0.5, 0.3, 0.2], 7, [4, 2, 1]),  # 3.5, 2.1, 1.4
        ([100, 20], [1, 1], 500, [20, 20]),  # a set with fewer images than its share
        ([100, 20], [1, 3], 500, [7, 19]),  # 26 images: 6.5 and 19.5
        ([100, 100], [1000, 1], 50, [50, 1]),  # of each one at least
        ([1000], None, 500, [500]),
        ([100], None, 500, [100]),
        ([100], [7], 500, [100]),
    ],
)
def test_a_mix_is_compared_with_images_in_its_shares(
    sizes: list[int], weights: list[float] | None, limit: int, wanted: list[int]
) -> None:
    config = config_of([Path(f"set{number}") for number in range(len(sizes))], weights, limit)
    assert num_images_of(sizes, config) == wanted


def test_the_images_are_evenly_spaced_in_each_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sets of labels 0 to 29 and 100 to 129, each label once."""
    folders = [
        write_set(tmp_path / name, [[good(first + i) | {"cls": str(first + i).encode()} for i in range(30)]])
        for name, first in (("a", 0), ("b", 100))
    ]
    found = reference(folders, [9, 1], 20).shown
    assert found.labels is not None and found.captions is not None
    assert found.labels.tolist() == [*(i * 30 // 18 for i in range(18)), 100, 115]
    assert found.captions == [f"picture {label}" for label in found.labels]
    assert len(np.unique(found.pixels, axis=0)) == len(found.pixels) == 20
    assert "compared with" not in capsys.readouterr().err
    fewer = reference(folders, [9, 1], 50).shown
    assert fewer.labels is not None and fewer.labels.tolist() == [*range(30), 100, 110, 120]
    assert "33 of 60 images are compared with, 30 + 3 by data.weights: the sets have 30 + 30" in capsys.readouterr().err


def test_weights_are_part_of_the_reference_s_description(tmp_path: Path) -> None:
    folders = [
        write_set(tmp_path / name, [[good(first + i) for i in range(30)]]) for name, first in (("a", 0), ("b", 40))
    ]
    of_nine, same, of_one = (reference(folders, weights, 20).description for weights in ([9, 1], [0.9, 0.1], [1, 1]))
    assert of_nine == same and of_nine != of_one
    held_out = config_of(folders, [9, 1], 20)
    alone = RealSet("data.validation_images", (str(folders[1]),), held_out)
    assert alone.description["num_images"] == [20] and len(alone.shown.pixels) == 20
