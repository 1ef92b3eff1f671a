"""Which recipe learns most per image?  Kernel distances against the images seen.

    python benchmarks/learning.py --folder FOLDER [--data digits|emoji ...] [--only RECIPE ...] [--seeds 0 1 2]
                                  [--trials] [--jobs 1] [--table]

Every recipe trains the same U-Net on the same latents, in batches of as many images.  1,000 images drawn without
guidance, in as many passes of the network, are held against the training images in the features of two judges that no
recipe knows (`backbones.py`): the unbiased kernel distance, 0 is best.  A recipe is scored on its way, and at its end a
second time, drawn by a solver of second order; only one whose learning rate falls to 0 at the end has a run of its own
for each number of images.

`recipes.py` says what is compared.  For each image all compute the same, but for U-REPA's head, a little, and Muon, a
third of a step of so small a U-Net.  Learning rates were chosen by the trials, on a seed of which nothing else is told.

Each run is a folder of FOLDER.  What is there isn't made again: to go on, run the same command again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import backbones
import numpy as np
import torch
from backbones import JUDGES
from fresh_clone import figure
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from omegaconf import OmegaConf
from recipes import BARE, BEST, EVERY, PLAIN, RECIPES, SETS, TRIAL_SEED, TRIALS
from verbs import ROOT, run

from pipeline.data.dataset import read_images
from pipeline.data.images import to_pixels, to_unit
from pipeline.features import open_network
from pipeline.metrics.distances import kernel_distance
from pipeline.tracking import read_evaluations
from vae.metrics import reconstruct
from vae.model import load

PARTS = 4  # of the images, after each of which a model is scored
SNAPSHOTS = 20  # of the averages that any other length is made of
FLOORS = "floors.json"
SWEPT = "evaluation/sweep.json"
SOLVED = ", second order"  # of a point whose images are drawn by the recipe's solver
OWN = ("diffusion", "optimizer", "ema", "checkpoint", "evaluation", "tracking")  # sections that a recipe says itself


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


def main() -> None:
    """Run what is asked for and isn't there, then print what is there."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--folder", type=Path, required=True, help="where to work, and to go on")
    made.add_argument("--data", nargs="+", choices=list(SETS), default=list(SETS))
    made.add_argument("--only", nargs="+", choices=list(EVERY), metavar="RECIPE", help="(default: all)")
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--trials", action="store_true", help=f"run the trials, on seed {TRIAL_SEED} alone")
    made.add_argument("--jobs", type=int, default=1, help="trainings at once, each on one thread")
    made.add_argument("--table", action="store_true", help="run nothing")
    made.add_argument("--plot", type=Path, help="draw the curves into this PNG file")
    args = made.parse_args()
    folder: Path = args.folder.resolve()
    torch.set_num_threads(1)
    if not args.table:
        recipes, seeds = (TRIALS, [TRIAL_SEED]) if args.trials else (RECIPES, args.seeds)
        chosen = {name: recipe for name, recipe in recipes.items() if args.only is None or name in args.only}
        for data in args.data:
            make_ready(folder, data)
            if any(recipe.teacher for recipe in chosen.values()):
                run(folder / data, "encode", "config.yaml", *SETS[data].words, *aligned(folder, data))
        wanted = [
            Run(data, name, share, seed)
            for seed in seeds
            for name, recipe in chosen.items()
            for data in args.data
            for share in recipe.shares
        ]
        with ThreadPoolExecutor(args.jobs) as pool:
            for told in pool.map(partial(train, folder), wanted):
                print(told, file=sys.stderr, flush=True)
    for data, judge in product(args.data, JUDGES):
        tell(folder, data, judge)
    if args.plot is not None:
        plot(folder, args.data, args.plot)


# Running -------------------------------------------------------------------------------------------


def make_ready(folder: Path, data: str) -> None:
    """Images, judge, autoencoder and latents of a set, unless they are there."""
    place, chosen = folder / data, SETS[data]
    place.mkdir(parents=True, exist_ok=True)
    config = OmegaConf.load(ROOT / "configs" / chosen.config)
    for section in OWN:
        config.pop(section)
    OmegaConf.save(config, place / "config.yaml")
    if (place / FLOORS).exists():
        return
    kind, *options = chosen.prepare
    run(place, "prepare", kind, f"data/{data}", *options)
    backbones.make(place / "data" / data, *JUDGES)
    autoencoder = place / str(config.vae.run_dir) / "autoencoder"
    if not autoencoder.exists():
        run(place, "train-vae", "config.yaml", *chosen.words)
    run(place, "encode", "config.yaml", *chosen.words)
    (place / FLOORS).write_text(json.dumps(floors(place / "data" / data, autoencoder)))


def aligned(folder: Path, data: str) -> list[str]:
    """Overrides for U-REPA: latents of their own, with the features of the teacher, which is made if missing."""
    images = Path("data", data)
    backbones.make(folder / data / images, "teacher")
    teacher = backbones.settings("teacher", images / "teacher").model_copy(update={"name": None})
    said = teacher.model_dump_json(exclude_none=True)
    return [f"data.train_latents={images / 'aligned'}", f"train.alignment={{features: {said}, hidden_width: 128}}"]


def floors(images: Path, autoencoder: Path) -> dict[str, dict[str, float]]:
    """What no recipe does better than: each judge's distances of held-out images, and of their reconstructions."""
    train, held_out = (
        read_images(images / part, size=backbones.SIZE, limit=100_000).pixels for part in ("train", "validation")
    )
    vae = load(autoencoder)
    again = torch.cat([reconstruct(vae, part) for part in torch.from_numpy(to_unit(held_out)).split(64)])
    sets = {"real held-out images": held_out, "their reconstructions": to_pixels(again)}
    found: dict[str, dict[str, float]] = {}
    for kind in JUDGES:
        judge = open_network(backbones.settings(kind, images / kind), torch.device("cpu"))
        real = backbones.see(judge, train)
        found[kind] = {name: kernel_distance(real, backbones.see(judge, pixels)).value for name, pixels in sets.items()}
    return found


def train(folder: Path, each: Run) -> str:
    """Train and score, unless that is done; what came of it, for the impatient."""
    chosen, recipe = SETS[each.data], EVERY[each.recipe]
    place, run_dir = folder / each.data, f"runs/{each.name}"
    judges = (backbones.settings(kind, Path("data", each.data, kind)) for kind in JUDGES)
    features = ", ".join(judge.model_dump_json(exclude_none=True) for judge in judges)
    words = [
        "config.yaml",
        *chosen.words,
        f"run_dir={run_dir}",
        f"seed={each.seed}",
        f"optimizer={{learning_rate: {chosen.learning_rate * recipe.rate:g}, warmup_steps: 50}}",
        f"train={{steps: {each.steps}, global_batch_images: {chosen.batch_images}}}",
        "data.workers=0",
        "ema.decays=[0.9999]",
        f"checkpoint={{every_steps: {chosen.steps // SNAPSHOTS}, keep_last: 1}}",
        "evaluation={every_steps: 1000000, num_images: 1000, guidance_scales: [1.0], num_inference_steps: 25}",
        f"evaluation.scores_every_steps={each.steps if recipe.falls else chosen.steps // PARTS}",
        f"evaluation={{features: [{features}], cache_dir: features, loss_images: 0}}",
        "evaluation.likelihood={num_images: 0, ode_images: 0}",
        "tracking.tensorboard=false",
        *recipe.words,
    ]
    if recipe.teacher:
        words += aligned(folder, each.data)
    if recipe.sigma_rels:
        words += ["ema.sigma_rels=[0.05,0.1]", f"ema.snapshot_every_steps={chosen.steps // SNAPSHOTS}"]
    done = {row["ema"] for row in read_evaluations(place / run_dir) if row["step"] == each.steps}
    if not done:
        run(place, "train", *words, log=each.name)
    for sigma_rel in recipe.sigma_rels:
        average = average_of(sigma_rel, each)
        if average not in done:
            run(place, "ema", *words, "--sigma-rel", str(sigma_rel), log=each.name)
            run(place, "evaluate", *words, "--checkpoint", "newest", "--ema", average, log=each.name)
    if not (place / run_dir / SWEPT).exists():
        average = next(row["ema"] for row in read_evaluations(place / run_dir) if row["step"] == each.steps)
        run(place, "sweep", *words, "--ema", average, "--scheduler", recipe.solver, log=each.name)
    found = [f"{kind}'s {json.dumps(points_of(place, [each], kind))}" for kind in JUDGES]
    return f"{each.data}, {each.name}: {', '.join(found)}"


def average_of(sigma_rel: float, each: Run) -> str:
    """The name of an average that is put together from snapshots at the end of a run."""
    return f"power-{sigma_rel}-step-{each.steps:09d}"


# Reading -------------------------------------------------------------------------------------------


def read(folder: Path, data: str, judge: str) -> Points:
    """All points of a set that are there, as a judge sees them."""
    runs = [
        Run(data, name, share, seed)
        for name, recipe in EVERY.items()
        for share in recipe.shares
        for seed in ([TRIAL_SEED] if name in TRIALS else range(TRIAL_SEED))
    ]
    return points_of(folder / data, runs, judge)


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


def tell(folder: Path, data: str, judge: str) -> None:
    """A table of the means over the seeds, then the figures of a set, as a judge sees them."""
    points = read(folder, data, judge)
    if 1.0 not in {share for of_seed in points.get(PLAIN, {}).values() for share in of_seed}:
        print(f"{data}: plain hasn't come to its end yet", file=sys.stderr)
        return
    target = mean_at(points[PLAIN], 1.0)
    title, unit = f"{data}, {judge}", "kernel distance × 1000"
    for line in table(title, data, points, target):
        print(line, file=sys.stderr)
    for name, value in json.loads((folder / data / FLOORS).read_text())[judge].items():
        figure(f"{title}: {name}", 1000 * value, None, unit)
    for name, by_seed in points.items():
        for share in sorted({share for of_seed in by_seed.values() for share in of_seed}):
            told = f"{title}: {name}, {round(share * SETS[data].num_images):,} images"
            figure(f"{told}{spread(by_seed, share, 1000)}", 1000 * mean_at(by_seed, share), None, unit)
    for name, drawn in product((BEST, BARE), ("", SOLVED)):
        if f"{name}{drawn}" in points and f"{PLAIN}{drawn}" in points:
            needs(title, f"{name}{drawn}", points[f"{name}{drawn}"], mean_at(points[f"{PLAIN}{drawn}"], 1.0))


def needs(title: str, name: str, by_seed: dict[int, dict[float, float]], target: float) -> None:
    """The figures of the promise: as near to the training images as plain comes, with half of its images.

    Both are drawn alike.
    """
    ratio = mean_at(by_seed, 0.5) / target
    figure(f"{title}: {name}: distance with half of plain's images, over plain's with all", ratio, "<= 1", "ratio")
    needed = {seed: {0.0: images_needed(of_seed, target)} for seed, of_seed in by_seed.items()}
    on_the_way = all(len(of_seed) > 1 for of_seed in by_seed.values())
    if on_the_way and all(math.isfinite(of_seed[0.0]) for of_seed in needed.values()):
        told = f"{title}: {name}: images needed for plain's final distance, over plain's{spread(needed, 0.0)}"
        figure(told, mean_at(needed, 0.0), "<= 0.5", "share")


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


def spread(by_seed: dict[int, dict[float, float]], share: float, factor: float = 1) -> str:
    """Every seed's value."""
    values = [f"{factor * of_seed[share]:.4g}" for _, of_seed in sorted(by_seed.items()) if share in of_seed]
    return f", {len(values)} seeds: {' '.join(values)}"


def table(title: str, data: str, points: Points, target: float) -> Iterator[str]:
    """Markdown: a row for each recipe, a column for each share of plain's images; distances times 1,000.

    `second order`: drawn so, at the end of a run.
    """
    shares = sorted({share for by_seed in points.values() for of_seed in by_seed.values() for share in of_seed})
    headings = [f"{round(share * SETS[data].num_images):,}" for share in shares]
    yield f"| {title}, images | {' | '.join(headings)} | second order | seeds | needs |"
    yield "|---|" + "---|" * (len(shares) + 3)
    for name, by_seed in points.items():
        if name.endswith(SOLVED):
            continue
        cells = [
            f"{1000 * mean_at(by_seed, share):.2f}" if any(share in of_seed for of_seed in by_seed.values()) else ""
            for share in shares
        ]
        common = {share: mean_at(by_seed, share) for share in set.intersection(*map(set, by_seed.values()))}
        needed = images_needed(common, target)
        told = "" if len(common) < 2 else f"{needed:.2f}" if math.isfinite(needed) else "more"
        solved = [1000 * value for of_seed in points.get(f"{name}{SOLVED}", {}).values() for value in of_seed.values()]
        drawn = f"{statistics.mean(solved):.2f}" if solved else ""
        yield f"| {name} | {' | '.join(cells)} | {drawn} | {len(by_seed)} | {told} |"


def plot(folder: Path, sets: Sequence[str], path: Path) -> None:
    """Means over the seeds against the images seen, a panel for each judge and set; bars from least to largest."""
    drawing = Figure(figsize=(5.5 * len(sets), 4 * len(JUDGES) + 1), dpi=110, layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(len(JUDGES), len(sets), squeeze=False)
    for axes, (judge, data) in zip(panels.flat, product(JUDGES, sets), strict=True):
        points = read(folder, data, judge)
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
        axes.set(title=f"{data}, {judge}", xlabel="images seen", ylabel="kernel distance × 1000", xscale="log")
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


if __name__ == "__main__":
    main()
