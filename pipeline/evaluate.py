"""Score a model against the real images: RUN/export, or with --checkpoint one of the run's checkpoints.

The images drawn are kept in RUN/evaluation, so an interrupted evaluation goes on where it was.  Results: a row for each
guidance scale in RUN/evaluations.jsonl, all of the newest in RUN/scores.json, pictures in RUN/evaluation.

--compare A B draws nothing that is there: paired differences of two models' images, with intervals.  A and B are export
folders, folders of kept images (RUN/evaluation/step-...), or run folders, of whose newest evaluation as CONFIG says the
images are taken.
"""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipeline import files, program, sampler
from pipeline.average import checkpoint_pipeline, find_average
from pipeline.bounds import Costs, likelihood_scores
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.comparison import compare, show_comparison
from pipeline.config import Config
from pipeline.data.images import to_pixels, to_unit
from pipeline.denoising_strip import DENOISING, ROWS, save_denoising
from pipeline.engine import Engine
from pipeline.errors import UsageError, blame
from pipeline.evaluation import Evaluation, Model, own_conditions
from pipeline.kept_images import KeptImages
from pipeline.metrics.distances import frechet_distance
from pipeline.metrics.neighbours import nearest, nearest_features
from pipeline.metrics.pictures import neighbours_picture
from pipeline.metrics.scores import pixel_scores
from pipeline.model_card import note_scores
from pipeline.real_features import see_all
from pipeline.reporting.page import keep_report
from pipeline.reporting.words import biases
from pipeline.run_folder import check_same
from pipeline.score_rows import flat_name, flat_scores, plain
from pipeline.tracking import Row, write_evaluation
from vae.metrics import psnr, reconstruct
from vae.tiles import in_tiles

Scores = dict[str, Any]
NUM_RESAMPLES = 1000
NEIGHBOURS, NEIGHBOUR_SAMPLES = 4, 10  # of the picture: nearest training images, samples


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("evaluate", __doc__ or "")
    made.add_argument(
        "--checkpoint", metavar="NAME", help="of the run, such as step-000001000, or newest; no export needed"
    )
    made.add_argument("--ema", metavar="NAME", help="with --checkpoint: which average (default: the config's first)")
    made.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="A less B, with 95%% intervals")
    made.add_argument("--resamples", type=int, help=f"with --compare: of the bootstrap (default {NUM_RESAMPLES})")
    return program.run_config(made, argv, evaluate, None)


def evaluate(config: Config, args: argparse.Namespace) -> None:
    """A model → images of each guidance scale → rows and scores beside those of the real validation images."""
    engine = Engine(config.engine)
    run = Path(config.run_dir)
    if args.ema is not None and args.checkpoint is None:
        raise UsageError("--ema: an export has one average; give --checkpoint too, or export another one")
    if args.resamples is not None and args.compare is None:
        raise UsageError(
            "--resamples: it is of the bootstrap of --compare, which did not come; leave it out, or give both"
        )
    if args.compare is not None:
        if args.checkpoint is not None:
            raise UsageError("--checkpoint: --compare came with it, which is told folders; leave one of them out")
        num_resamples = NUM_RESAMPLES if args.resamples is None else args.resamples
        found = compare(Evaluation(engine, config), *args.compare, num_resamples=num_resamples)
        engine.main_does(lambda: show_comparison(found, run / "evaluation" / "comparison.json"))
        return
    pipe, model = checkpoint_of(engine, config, args) if args.checkpoint else export_of(engine, config)
    check_same(run, config, ("conditioning", "diffusion"))
    evaluation = Evaluation(engine, config)
    rows = evaluation.score(pipe, model, lambda: True, in_training=False)
    assert rows is not None  # nobody told it to stop
    kept = evaluation.kept(pipe, str(model.checkpoint))

    def finish() -> None:
        for row in rows:
            write_evaluation(run, row)
        scores = flat_scores(rows) | with_pixels(config, pipe, evaluation, kept)
        set_beside(scores, rows)
        files.write_json(run / "scores.json", scores)
        if not args.checkpoint:
            note_scores(run / "export", scores)
        wishes = sampler.rows_of(config, ROWS)
        title = f"checkpoint {scores['checkpoint']}"
        save_denoising(run / "evaluation" / DENOISING, pipe, wishes, config, title=title)
        keep_report(run)
        show(scores, config, run)

    engine.main_does(finish)


def export_of(engine: Engine, config: Config) -> tuple[ClassConditionalPipeline, Model]:
    """RUN/export."""
    folder = Path(config.run_dir) / "export"
    pipe = sampler.open_export(folder, engine.device, tile_pixels=config.vae.tile_pixels)
    passport = sampler.passport_of(folder)
    return pipe, Model.of_checkpoint(passport["checkpoint"], passport["ema"])


def checkpoint_of(engine: Engine, config: Config, args: argparse.Namespace) -> tuple[ClassConditionalPipeline, Model]:
    """A checkpoint of the run, by its name, with one of its averages."""
    step = re.fullmatch(r"(?:step-)?(\d+)|newest", args.checkpoint)
    if step is None:
        raise UsageError(f"--checkpoint: {args.checkpoint!r} came; step-000001000 or newest was wanted")
    average = find_average(config, args.ema, int(step[1]) if step[1] else None)
    pipe = checkpoint_pipeline(config, average)
    with blame("vae.tile_pixels"):
        in_tiles(pipe.vae, config.vae.tile_pixels)
    return pipe.to(engine.device), Model.of_checkpoint(average.found.path.name, average.name)


def with_pixels(
    config: Config, pipe: ClassConditionalPipeline, evaluation: Evaluation, kept: Sequence[KeptImages]
) -> Scores:
    """What an evaluation in the training leaves out: it wants the real pixels, or an hour."""
    run, train, held_out = Path(config.run_dir), evaluation.train.shown, evaluation.held_out.shown
    scores: Scores = autoencoder_scores(config, pipe.vae, evaluation)
    sets = {"validation": held_out.pixels}
    sets |= {f"guidance_{each.guidance_scale:g}": np.concatenate([*map(each.read, each.portions)]) for each in kept}
    for prefix, images in sets.items():
        found = pixel_scores(train.pixels, images, held_out.pixels)
        found |= {"num_images": len(images), "num_train_images": len(train.pixels)}
        scores |= {f"{prefix}/{name}": value for name, value in found.items()}
        if prefix != "validation":
            draw_neighbours(run / "evaluation" / f"nearest-{prefix}.png", evaluation, images[:NEIGHBOUR_SAMPLES])
    program.say("counting the bits of held-out images")
    costs = Costs(pipe, config.diffusion, config.seed, config.evaluation.batch_images)
    own = own_conditions(config, held_out)
    plot = run / "evaluation" / "bound.png"
    return scores | likelihood_scores(
        costs, config.evaluation.likelihood, train.pixels, held_out.pixels, own, plot=plot
    )


def autoencoder_scores(config: Config, vae: AutoencoderKL, evaluation: Evaluation) -> Scores:
    """How well it gives held-out images back: mean PSNR, and in features the distance of what comes back."""
    images, size = evaluation.held_out.shown.pixels, config.evaluation.batch_images
    decibels: list[torch.Tensor] = []
    pixels: list[NDArray[np.uint8]] = []
    for start in range(0, len(images), size):
        x = torch.from_numpy(to_unit(images[start : start + size])).to(vae.device)
        x_hat = reconstruct(vae, x)
        decibels.append(psnr(x_hat, x).cpu())
        pixels.append(to_pixels(x_hat.cpu()))
    scores: Scores = {"vae/psnr_db": float(torch.cat(decibels).mean()), "vae/num_images": len(images)}
    for title, yardstick in evaluation.yardsticks.items():
        features = see_all(yardstick.network, np.concatenate(pixels), size, f"{title} sees reconstructions")["features"]
        scores[f"vae/{title}/fid"] = frechet_distance(yardstick.held_out.features, features)
    return scores


def draw_neighbours(path: Path, evaluation: Evaluation, samples: NDArray[np.uint8]) -> None:
    """Samples beside the training images nearest in the first network's features; in pixels where there is none."""
    train = evaluation.train.shown.pixels
    count = min(NEIGHBOURS, len(train))
    yardstick = next(iter(evaluation.yardsticks.values()), None)
    if yardstick is None:
        found, _ = nearest(train, samples, count)
    else:
        found = nearest_features(yardstick.train.features, yardstick.network.see(samples).features, count)
    with files.whole(path) as aside:
        neighbours_picture(samples, train, found).save(aside, format="PNG")


def set_beside(scores: Scores, rows: Sequence[Row]) -> None:
    """Recall and coverage as shares of those of the held-out images, at equal numbers: both grow with the number."""
    for row in rows:
        prefix = f"guidance_{row['guidance_scale']:g}"
        for title in row["references"]:
            for name in (flat_name(plain(title), each) for each in ("recall", "coverage")):
                of_validation = float(scores.get(f"validation/{name}", 0))
                if f"{prefix}/{name}_equal_n" in scores and of_validation > 0:
                    share = float(scores[f"{prefix}/{name}_equal_n"]) / of_validation
                    scores[f"{prefix}/{name}_of_validation"] = share


def show(scores: Scores, config: Config, run: Path) -> None:
    """The scores as a table, and where everything lies."""
    columns = ["validation", *(f"guidance_{scale:g}" for scale in config.evaluation.guidance_scales)]
    names = list(dict.fromkeys(name.split("/", 1)[1] for name in scores if name.split("/")[0] in columns))
    real = f"M = {scores['validation/num_train_images']:,} training images"
    table = Table(title=f"{run / 'scores.json'}: N images against {real}", caption=biases(names))
    table.add_column("")
    for column in columns:
        said = "real, held out" if column == "validation" else column
        table.add_column(f"{said}\nN = {scores[f'{column}/num_images']:,}", justify="right")
    for name in names:
        if name not in ("num_images", "num_train_images"):
            values: list[Any] = [scores.get(f"{column}/{name}") for column in columns]
            told = ["" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for v in values]
            table.add_row(name, *told)
    console = Console()
    console.print(table)
    console.print(f"autoencoder: {scores['vae/psnr_db']:.1f} dB PSNR on {scores['vae/num_images']:,} held-out images")
    for line in likelihood_lines(scores):
        console.print(line)
    console.print(f"nearest training images beside samples: {run / 'evaluation'}/nearest-*.png")


def likelihood_lines(scores: Scores) -> list[str]:
    """What a person wants to read of the likelihoods."""
    titles = {
        "bound": "variational bound of the latents",
        "ode": "likelihood of the latents by the ODE",
        "pixel_bound": "bound of the whole system, 8-bit pixels",
    }
    return [
        f"{title}: {scores[f'likelihood/{name}_bits_per_dim']:.3f} ± {scores[f'likelihood/{name}_standard_error']:.3f} "
        f"bits/dim, N = {scores[f'likelihood/{counted}num_images']:,} held-out images"
        for name, title in titles.items()
        for counted in ["ode_" if name == "ode" else ""]
        if f"likelihood/{name}_bits_per_dim" in scores
    ]


if __name__ == "__main__":
    program.end(main())
