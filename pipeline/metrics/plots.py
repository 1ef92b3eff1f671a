"""Plots of what was measured, for people: PNG files by matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray


def bound_plot(
    path: Path, t: Sequence[int], bits: NDArray[np.float64], errors: NDArray[np.float64], *, title: str
) -> None:
    """The bound's term at each timestep, with two standard errors, and its running sum.

    t: rising; bits, errors float64 [len(t)], bits/dim that the term at t has.  Raises ValueError where they differ in
    length.
    """
    if not len(t) == len(bits) == len(errors):
        raise ValueError(f"{len(t)} timesteps, {len(bits)} terms and {len(errors)} errors came, as many of each wanted")
    # A Figure of its own, not pyplot's, which keeps state for the whole process.
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    above = figure.subplots()
    above.fill_between(t, bits - 2 * errors, bits + 2 * errors, alpha=0.25, linewidth=0)
    above.plot(t, bits, marker=".", markersize=4, linewidth=1)
    above.set_yscale("symlog", linthresh=max(1e-6, float(np.abs(bits[1:]).min(initial=1.0))))
    above.axhline(0, color="0.8", linewidth=0.8)
    above.set_xlabel("timestep t (0 is L_0, the density of the data given the last step)")
    above.set_ylabel("bits/dim of one step")
    above.set_title(title)
    figure.savefig(path, format="png")
