"""What `learning.py` found: points of runs that are there and of earlier ones, as figures, tables and a picture.

A point is a figure of its own, `DATA, JUDGE: RECIPE, IMAGES images, seed SEED`, so that the figures of one machine can
be read on another, where they stand beside its own.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from backbones import JUDGES
from fresh_clone import figure
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from recipes import BARE, BEST, EVERY, PLAIN, RECIPES, SETS, TRIAL_SEED, TRIALS

from pipeline.tracking import read_evaluations

PARTS = 4  # of the images, after each of which a model is scored
FLOORS = "floors.json"
SWEPT = "evaluation/sweep.json"
SOLVED = ", second order"  # of a point whose images are drawn by the recipe's solver
UNIT = "kernel distance × 1000"
POINT = re.compile(r"(?P<title>\w+, \w+): (?P<name>.+), (?P<images>[\d,]+) images, seed (?P<seed>\d+)")


class Run(NamedTuple):
    """One training."""

    data: str
    recipe: str
    share: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        words = "".join(c if c.isalnum() or c in ".-" else " " for c in self.recipe.lower()).split()
        return f"{'-'.join(words)}-{self.share:g}-seed-{self.seed}"

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return round(SETS[self.data].steps * self.share)


Points = dict[str, dict[int, dict[float, float]]]  # what was scored → seed → share of plain's images → kernel distance


# Reading -------------------------------------------------------------------------------------------


class Earlier:
    """Figures that were printed before, here or elsewhere."""

    def __init__(self, path: Path | None) -> None:
        """`path`: lines of JSON; None: there are none."""
        lines = [] if path is None else [json.loads(line) for line in path.read_text().splitlines()]
        self.floors: dict[str, dict[str, float]] = {}  # DATA, JUDGE → what no recipe does better than
        self.points: dict[str, Points] = {}  # DATA, JUDGE → points
        for line in lines:
            if found := POINT.fullmatch(line["figure"]):
                share = int(found["images"].replace(",", "")) / SETS[found["title"].partition(",")[0]].num_images
                by_seed = self.points.setdefault(found["title"], {}).setdefault(found["name"], {})
                by_seed.setdefault(int(found["seed"]), {})[share] = line["value"] / 1000
            elif line["bound"] is None:
                title, _, name = line["figure"].partition(": ")
                self.floors.setdefault(title, {})[name] = line["value"] / 1000

    def has(self, each: Run) -> bool:
        """Whether a run was made before: each judge saw what its solver drew at its end, which is what comes last."""
        titles = [f"{each.data}, {judge}" for judge in JUDGES]
        name = f"{each.recipe}{SOLVED}"
        return all(each.share in self.points.get(title, {}).get(name, {}).get(each.seed, {}) for title in titles)


def average_of(sigma_rel: float, each: Run) -> str:
    """The name of an average that is put together from snapshots at the end of a run."""
    return f"power-{sigma_rel}-step-{each.steps:09d}"


def read(folder: Path, data: str, judge: str, earlier: Earlier) -> Points:
    """All points of a set that were told before or are there, as a judge sees them, recipes in their order."""
    runs = [
        Run(data, name, share, seed)
        for name, recipe in EVERY.items()
        for share in recipe.shares
        for seed in ([TRIAL_SEED] if name in TRIALS else range(TRIAL_SEED))
    ]
    found = points_of(folder / data, runs, judge)
    for name, by_seed in earlier.points.get(f"{data}, {judge}", {}).items():
        for seed, of_seed in by_seed.items():
            found.setdefault(name, {}).setdefault(seed, {}).update(of_seed)
    order = list(EVERY)

    def place(name: str) -> tuple[int, str]:
        recipe = max((each for each in order if name.startswith(each)), key=len, default=None)
        return len(order) if recipe is None else order.index(recipe), name  # an earlier one is none any more

    return {name: dict(sorted(found[name].items())) for name in sorted(found, key=place)}


def points_of(place: Path, runs: Sequence[Run], judge: str) -> Points:
    """The points of these runs: a recipe's own average by its name, others by their length too."""
    found: Points = {}
    for each in runs:
        lengths = {average_of(sigma_rel, each): sigma_rel for sigma_rel in EVERY[each.recipe].sigma_rels}
        for row in read_evaluations(place / "runs" / each.name):
            name = each.recipe + (f", average of {lengths[row['ema']]}" if row["ema"] in lengths else "")
            share = row["step"] / SETS[each.data].steps
            found.setdefault(name, {}).setdefault(each.seed, {})[share] = row["scores"][f"{judge}/kid"]
        if (swept := place / "runs" / each.name / SWEPT).exists():
            (row,) = json.loads(swept.read_text())["rows"]
            by_seed = found.setdefault(f"{each.recipe}{SOLVED}", {})
            by_seed.setdefault(each.seed, {})[each.share] = row["scores"][f"{judge}/kid"]
    return found


# Telling -------------------------------------------------------------------------------------------


def tell(folder: Path, data: str, judge: str, earlier: Earlier) -> None:
    """A table of the means over the seeds, then the figures of a set, as a judge sees them."""
    points, title = read(folder, data, judge, earlier), f"{data}, {judge}"
    if 1.0 not in {share for of_seed in points.get(PLAIN, {}).values() for share in of_seed}:
        print(f"{data}: plain hasn't come to its end yet", file=sys.stderr)
        return
    for line in table(title, data, points):
        print(line, file=sys.stderr)
    path = folder / data / FLOORS
    floors = json.loads(path.read_text())[judge] if path.exists() else earlier.floors.get(title, {})
    for name, value in floors.items():
        figure(f"{title}: {name}", 1000 * value, None, UNIT)
    for name, by_seed in points.items():
        for seed, of_seed in by_seed.items():
            for share, distance in sorted(of_seed.items()):
                images = round(share * SETS[data].num_images)
                figure(f"{title}: {name}, {images:,} images, seed {seed}", 1000 * distance, None, UNIT)
    for name, drawn in product((BEST, BARE), ("", SOLVED)):
        if f"{name}{drawn}" in points and f"{PLAIN}{drawn}" in points:
            promise(f"{title}: {name}{drawn}", points[f"{name}{drawn}"], points[f"{PLAIN}{drawn}"])


def promise(title: str, best: dict[int, dict[float, float]], plain: dict[int, dict[float, float]]) -> None:
    """As near to the training images as plain comes, with half of its images; both are drawn alike.

    Markdown too: the means and each seed's, plain's, best's and their ratio.
    """
    target = mean_at(plain, 1.0)
    ends, halves = ([by[share] for by in of.values() if share in by] for of, share in ((plain, 1.0), (best, 0.5)))
    each = " ".join(f"{half / target:.2f}" for half in halves)
    told = f"{title}: distance with half of plain's images, over plain's with all; each seed's {each}"
    figure(told, mean_at(best, 0.5) / target, "<= 1", "ratio")
    cells = [f"{thousandths(statistics.mean(of))}; {' '.join(map(thousandths, of))}" for of in (ends, halves)]
    print(f"| {title} | {' | '.join(cells)} | {mean_at(best, 0.5) / target:.2f}; {each} |", file=sys.stderr)


def images_needed(of_seed: dict[float, float], target: float) -> float:
    """Share of plain's images at which a curve first falls to the target, straight in ln(images) between its points."""
    before: tuple[float, float] | None = None
    for share, distance in sorted(of_seed.items()):
        if distance <= target:
            if before is None:
                return share
            part = (before[1] - target) / (before[1] - distance)
            return math.exp(math.log(before[0]) * (1 - part) + math.log(share) * part)
        before = share, distance
    return math.inf


def mean_at(by_seed: dict[int, dict[float, float]], share: float) -> float:
    """Over the seeds that have come so far."""
    return statistics.mean(of_seed[share] for of_seed in by_seed.values() if share in of_seed)


def table(title: str, data: str, points: Points) -> Iterator[str]:
    """Markdown: a row for each recipe, a column for each share of plain's images; mean distances times 1,000.

    `from, to`: the least seed and the largest, at the end of a run.  `second order`: drawn so, there.  `needs`: the
    share of plain's images after which the curve is first down at the end of plain's, of the same seeds.
    """
    shares = sorted({share for by_seed in points.values() for of_seed in by_seed.values() for share in of_seed})
    headings = [f"{round(share * SETS[data].num_images):,}" for share in shares]
    yield f"| {title}, images | {' | '.join(headings)} | from, to | second order | seeds | needs |"
    yield "|---|" + "---|" * (len(shares) + 4)
    for name, by_seed in points.items():
        if name.endswith(SOLVED):
            continue
        cells = [
            thousandths(mean_at(by_seed, share)) if any(share in of_seed for of_seed in by_seed.values()) else ""
            for share in shares
        ]
        last = max(share for of_seed in by_seed.values() for share in of_seed)
        ends = [of_seed[last] for of_seed in by_seed.values() if last in of_seed]
        common = {share: mean_at(by_seed, share) for share in set.intersection(*map(set, by_seed.values()))}
        rivals = {seed: points[PLAIN][seed] for seed in by_seed if seed in points[PLAIN]}
        needed = images_needed(common, mean_at(rivals or points[PLAIN], 1.0))
        told = "" if len(common) < 2 else f"{needed:.2f}" if math.isfinite(needed) else "more"
        solved = [value for of_seed in points.get(f"{name}{SOLVED}", {}).values() for value in of_seed.values()]
        drawn = thousandths(statistics.mean(solved)) if solved else ""
        spread = f"{thousandths(min(ends))}, {thousandths(max(ends))}"
        yield f"| {name} | {' | '.join(cells)} | {spread} | {drawn} | {len(by_seed)} | {told} |"


def thousandths(distance: float) -> str:
    """A distance times 1,000, with as many digits as it has a use for."""
    value = 1000 * distance
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def plot(folder: Path, sets: Sequence[str], path: Path, earlier: Earlier) -> None:
    """Means over the seeds against the images seen, a panel for each judge and set; bars from least to largest."""
    drawing = Figure(figsize=(5.5 * len(sets), 4 * len(JUDGES) + 1), dpi=110, layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(len(JUDGES), len(sets), squeeze=False)
    for axes, (judge, data) in zip(panels.flat, product(JUDGES, sets), strict=True):
        points = read(folder, data, judge, earlier)
        for name in (name for name in RECIPES if name in points):
            by_seed = points[name].values()
            shares = sorted({share for of_seed in by_seed for share in of_seed})
            each = [[1000 * of_seed[share] for of_seed in by_seed if share in of_seed] for share in shares]
            means = np.array([statistics.mean(values) for values in each])
            bars = [means - [min(values) for values in each], [max(values) for values in each] - means]
            at = [share * SETS[data].num_images for share in shares]
            style = {PLAIN: "k--", BEST: "k-"}.get(name, f"C{list(RECIPES).index(name) - 1}-")
            mark, size = ("*", 9) if len(at) == 1 else ("o", 3)
            axes.errorbar(at, means, bars, fmt=style + mark, markersize=size, linewidth=1.2, capsize=2, label=name)
        values = [value for by_seed in points.values() for of_seed in by_seed.values() for value in of_seed.values()]
        axes.set(title=f"{data}, {judge}", xlabel="images seen", ylabel=UNIT, xscale="log")
        axes.set(yscale="log" if min(values, default=1) > 0 else "symlog")
        ticks = [SETS[data].num_images * part // PARTS for part in range(1, PARTS + 1)]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        if axes.get_yscale() == "log":
            axes.yaxis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 5, 7)))
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted("{x:,g}")
        axes.grid(alpha=0.3, which="both")
    lines = {label: line for axes in panels.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawing.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    drawing.savefig(path, format="png")
