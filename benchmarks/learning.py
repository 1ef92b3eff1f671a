"""Which recipe learns most per image?  Kernel distances against the images seen.

    python benchmarks/learning.py --folder FOLDER [--data digits|emoji ...] [--only RECIPE ...] [--seeds 0 1 2]
                                  [--trials] [--jobs 1] [--earlier FIGURES] [--table] [--plot FILE]

Every recipe trains the same U-Net on the same latents, in batches of as many images.  1,000 images drawn without
guidance, in as many passes of the network, are held against the training images in the features of two judges that no
recipe knows (`backbones.py`): the unbiased kernel distance, 0 is best.  A recipe is scored on its way, and at its end a
second time, drawn by a solver of second order; only one whose learning rate falls to 0 at the end has a run of its own
for each number of images.

`recipes.py` says what is compared.  For each image all compute the same, but for U-REPA's head, a little, and Muon, a
third of a step of so small a U-Net.  Learning rates were chosen by the trials, on a seed of which nothing else is told.

Each run is a folder of FOLDER.  What is there isn't made again: to go on, run the same command again.  With --earlier
what is in the figures of another FOLDER isn't, either: they are told beside what is there (`curves.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import backbones
import torch
from backbones import JUDGES
from curves import FLOORS, PARTS, SWEPT, Earlier, Run, average_of, plot, points_of, tell
from omegaconf import OmegaConf
from recipes import EVERY, RECIPES, SETS, TRIAL_SEED, TRIALS
from verbs import ROOT, run

from pipeline.data.dataset import read_images
from pipeline.data.images import to_pixels, to_unit
from pipeline.features import open_network
from pipeline.metrics.distances import kernel_distance
from pipeline.tracking import read_evaluations
from vae.metrics import reconstruct
from vae.model import load

SNAPSHOTS = 20  # of the averages that any other length is made of
OWN = ("diffusion", "optimizer", "ema", "checkpoint", "evaluation", "tracking")  # sections that a recipe says itself


def main() -> None:
    """Run what is asked for and isn't there, then print what is there."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--folder", type=Path, required=True, help="where to work, and to go on")
    made.add_argument("--data", nargs="+", choices=list(SETS), default=list(SETS))
    made.add_argument("--only", nargs="+", choices=list(EVERY), metavar="RECIPE", help="(default: all)")
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--trials", action="store_true", help=f"run the trials, on seed {TRIAL_SEED} alone")
    made.add_argument("--jobs", type=int, default=1, help="trainings at once, each on one thread")
    made.add_argument("--earlier", type=Path, metavar="FIGURES", help="lines that this program printed before")
    made.add_argument("--table", action="store_true", help="run nothing")
    made.add_argument("--plot", type=Path, help="draw the curves into this PNG file")
    args = made.parse_args()
    folder: Path = args.folder.resolve()
    earlier = Earlier(args.earlier)
    torch.set_num_threads(1)
    if not args.table:
        recipes, seeds = (TRIALS, [TRIAL_SEED]) if args.trials else (RECIPES, args.seeds)
        chosen = {name: recipe for name, recipe in recipes.items() if args.only is None or name in args.only}
        every = [
            Run(data, name, share, seed)
            for seed in seeds
            for name, recipe in chosen.items()
            for data in args.data
            for share in recipe.shares
        ]
        wanted = [each for each in every if not earlier.has(each)]
        for data in {each.data for each in wanted}:
            make_ready(folder, data)
            if any(chosen[each.recipe].teacher for each in wanted if each.data == data):
                run(folder / data, "encode", "config.yaml", *SETS[data].words, *aligned(folder, data))
        with ThreadPoolExecutor(args.jobs) as pool:
            for told in pool.map(partial(train, folder), wanted):
                print(told, file=sys.stderr, flush=True)
    for data, judge in product(args.data, JUDGES):
        tell(folder, data, judge, earlier)
    if args.plot is not None:
        plot(folder, args.data, args.plot, earlier)


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


if __name__ == "__main__":
    main()
