"""Curves of any length as few points, so that no spike is lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 2000  # of a curve, its mean and both edges counted
Row = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """y over rising x; where it was thinned, the lowest and the highest of what each mean stands for."""

    x: Row
    y: Row
    low: Row | None = None
    high: Row | None = None

    @property
    def num_points(self) -> int:
        """Numbers that are drawn."""
        return len(self.x) * (1 if self.low is None else 3)


def thin(x: Row, y: Row, max_points: int = MAX_POINTS) -> Curve:
    """At most `max_points` points of a curve: means over equal spans of x, with the extremes within each.

    x, y [N]; x rises or stays; where y is NaN nothing was measured.  A curve that is short enough stays as it is.
    """
    there = ~np.isnan(y)
    x, y = x[there], y[there]
    if len(x) <= max_points:
        return Curve(x, y)
    spans = max_points // 3
    which = np.minimum((x - x[0]) / (x[-1] - x[0] or 1) * spans, spans - 1).astype(np.int64)
    starts = np.flatnonzero(np.diff(which, prepend=-1))
    sizes = np.diff(starts, append=len(x))
    mean_x, mean_y = (np.add.reduceat(each, starts) / sizes for each in (x, y))
    return Curve(mean_x, mean_y, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts))
