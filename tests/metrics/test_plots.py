"""A plot is a picture of the numbers that came, and of as many."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.metrics.plots import bound_plot

T = np.array([1.0, 10.0, 100.0])


def test_the_bounds_picture_shows_the_numbers(tmp_path: Path) -> None:
    drawn: list[np.ndarray] = []
    for name, bits in (("one", np.array([1.0, 0.1, 0.01])), ("other", np.array([1.0, 0.5, 0.01]))):
        path = tmp_path / f"{name}.png"
        bound_plot(path, T, bits, 0.1 * bits, np.array([1.0, 9.0, 90.0]), title="a bound")
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            drawn.append(np.asarray(picture))
    assert drawn[0].std() > 10 and drawn[0].shape == drawn[1].shape
    assert (drawn[0] != drawn[1]).mean() > 1e-3


def test_rows_of_other_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 timesteps, 2 terms, 3 errors and 3 counts came"):
        bound_plot(tmp_path / "bound.png", T, T[:2], T, T, title="")
