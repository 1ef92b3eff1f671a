"""Score a model at every combination of sampler settings: steps, guidance, its interval, guide, average, scheduler.

Each option takes one value or more; the grid is all of their combinations.  Of RUN/export, or with --ema of averages of
a checkpoint.  The images drawn are kept in RUN/evaluation, so an interrupted sweep goes on where it was.  Results:
RUN/evaluation/sweep.json, sweep.png and a table, best first.
"""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from rich import box
from rich.console import Console
from rich.table import Table

from pipeline import asking, files, program, sampler
from pipeline.asking import Wanted
from pipeline.average import checkpoint_pipeline, find_average
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.config import Config
from pipeline.drawing import try_out
from pipeline.engine import Engine
from pipeline.errors import UsageError, blame
from pipeline.evaluation import Evaluation, model_sha256
from pipeline.kept_images import KeptImages
from pipeline.metrics.plots import sweep_plot
from pipeline.reporting.page import keep_report
from pipeline.reporting.words import biases, number, score_of, with_error
from pipeline.run_folder import check_same
from pipeline.sampler import Asked
from vae.model import state_sha256
from vae.tiles import in_tiles

SHOWN = ("fid", "kid", "precision", "recall", "coverage")  # of a network's scores, in the table
NULL = "null"  # the condition that one is guided away from, where no network is


@dataclass(frozen=True)
class Point:
    """One combination."""

    ema: str
    scheduler: str
    steps: int
    guidance: float
    interval: tuple[float, float]
    guide: str = NULL

    def words(self) -> dict[str, str]:
        """Its settings, by their headings."""
        return {
            "average": self.ema,
            "scheduler": self.scheduler.removesuffix("Scheduler"),
            "steps": f"{self.steps}",
            "guidance": f"{self.guidance:g}",
            "guided": f"{self.interval[0]:g} to {self.interval[1]:g}",
            "away from": "/".join(Path(self.guide).parts[-3:]),
        }


@dataclass(frozen=True)
class Guide:
    """What one is guided away from: the null condition, or a worse network's word for the same condition."""

    name: str = NULL
    unet: UNet2DConditionModel | None = None
    sha256: str | None = None

    @classmethod
    def open(cls, name: str) -> Guide:
        """A U-Net in a folder, as checkpoints, snapshots and exports have them.  Raises UsageError."""
        if name == NULL:
            return cls()
        if not (Path(name) / "config.json").is_file():
            raise UsageError(
                f"--guide: {name}: no U-Net lies there; the folder of one was wanted, such as "
                f"RUN/checkpoints/step-000000100/ema/decay-0.9999 or SMALLER_RUN/export/unet, or {NULL}"
            )
        try:
            unet: Any = UNet2DConditionModel.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise UsageError(
                f"--guide: {name}: does not open as a U-Net ({str(error).partition(chr(10))[0]})"
            ) from error
        return cls(name, unet.requires_grad_(False).eval(), state_sha256(unet.state_dict()))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("sweep", __doc__ or "")
    made.add_argument("--steps", type=int, nargs="+", metavar="N", help="(default: the config's)")
    made.add_argument("--guidance", type=float, nargs="+", metavar="W", help="scales (default: the config's)")
    made.add_argument(
        "--interval", nargs="+", metavar="START,END", default=["0,1"], help="shares of the steps that are guided"
    )
    made.add_argument(
        "--guide",
        nargs="+",
        metavar="FOLDER",
        default=[NULL],
        help=f"U-Nets to be guided away from, instead of the null condition: early ones, smaller ones; or {NULL}",
    )
    made.add_argument("--ema", nargs="+", metavar="NAME", help="averages of a checkpoint (default: RUN/export's)")
    made.add_argument("--step", type=int, help="with --ema: of the checkpoint (default: the newest)")
    made.add_argument("--scheduler", nargs="+", metavar="NAME", help="of diffusers' (default: the model's own)")
    made.add_argument("--num-images", type=int, metavar="N", help="of each (default: evaluation.num_images)")
    return program.run_config(made, argv, sweep, None)


def sweep(config: Config, args: argparse.Namespace) -> None:
    """The grid → images of each point → scores → JSON, table, picture."""
    engine, run = Engine(config.engine), Path(config.run_dir)
    models = models_of(engine, config, args)
    first = next(models)  # so that an export that is missing is told at once
    check_same(run, config, ("conditioning", "diffusion"))
    intervals = [interval_of(text) for text in args.interval]
    guides = {name: Guide.open(name) for name in args.guide}
    changed: dict[str, Any] = {"loss_images": 0, "bits": False}  # which no setting of the sampler changes
    if args.num_images is not None:
        changed["num_images"] = args.num_images
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=changed)})
    settings = config.evaluation
    evaluation = Evaluation(engine, config)
    evaluation.require_network()
    rows: list[dict[str, Any]] = []
    path = run / "evaluation" / "sweep.json"
    for ema, pipe, checkpoint in chain([first], models):
        own = pipe.scheduler
        for name in args.scheduler or [type(own).__name__]:
            pipe.scheduler = own
            if args.scheduler:
                with blame("--scheduler"):
                    pipe.scheduler = asking.scheduler_like(pipe, name)
            model: str = engine.main_does(lambda pipe=pipe: model_sha256(pipe))
            for steps, guidance, interval, away_from in grid(
                args.steps or [settings.num_inference_steps],
                args.guidance or settings.guidance_scales,
                intervals,
                list(guides),
            ):
                point, guide = Point(ema, name, steps, guidance, interval, away_from), guides[away_from]
                how = {"num_inference_steps": steps, "guidance_interval": interval, "guide": guide.unet}
                with blame(f"--steps {steps}, --guidance {guidance:g}, --interval {interval[0]:g},{interval[1]:g}"):
                    try_out(pipe, Wanted(0, evaluation.asked[0], Asked(), guidance, seed=0), how)
                kept = KeptImages.of(
                    run,
                    checkpoint,
                    model=model,
                    asked=evaluation.asked,
                    seed=config.seed,
                    guidance_scale=guidance,
                    num_inference_steps=steps,
                    batch_images=settings.batch_images,
                    guidance_interval=interval,
                    guide=guide.sha256,
                )
                kept.draw(engine, pipe, lambda: True, in_training=False, guide=guide.unet)
                scores = evaluation.image_scores(kept, lambda: True)
                rows.append({**asdict(point), "checkpoint": checkpoint, "scores": scores})
                said = {"num_images": settings.num_images, "references": evaluation.references(), "rows": rows}
                engine.main_does(lambda said=said: files.write_json(path, said))

    def finish() -> None:
        show(rows, evaluation.titles[0], path, num_images=settings.num_images)
        keep_report(run)

    engine.main_does(finish)


def interval_of(text: str) -> tuple[float, float]:
    """START,END as two shares of the steps.  Raises UsageError."""
    try:
        start, end = map(float, text.split(","))
    except ValueError:
        start, end = 1.0, 0.0
    if not 0 <= start <= end <= 1:
        raise UsageError(
            f"--interval: {text!r} came, START,END with 0 <= START <= END <= 1 was wanted, such as 0.2,0.8"
        )
    return start, end


def grid(
    steps: Sequence[int],
    guidance: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    guides: Sequence[str] = (NULL,),
) -> Generator[tuple[int, float, tuple[float, float], str]]:
    """All combinations, each once: at scale 1 nothing is guided, whatever the interval and the guide."""
    every = product(steps, guidance, intervals, guides)
    yield from dict.fromkeys(
        (n, w, (0.0, 1.0), NULL) if w == 1 else (n, w, interval, guide) for n, w, interval, guide in every
    )


def models_of(
    engine: Engine, config: Config, args: argparse.Namespace
) -> Generator[tuple[str, ClassConditionalPipeline, str]]:
    """(average, pipeline, checkpoint) of the export, or of each average asked for."""
    if args.ema is None:
        if args.step is not None:
            raise UsageError("--step: an export is of one checkpoint; give --ema too")
        folder = Path(config.run_dir) / "export"
        pipe = sampler.open_export(folder, engine.device, tile_pixels=config.vae.tile_pixels)
        passport = sampler.passport_of(folder)
        yield passport["ema"], pipe, passport["checkpoint"]
        return
    for name in args.ema:
        average = find_average(config, name, args.step)
        pipe = checkpoint_pipeline(config, average)
        with blame("vae.tile_pixels"):
            in_tiles(pipe.vae, config.vae.tile_pixels)
        yield average.name, pipe.to(engine.device), average.found.path.name


def show(rows: Sequence[dict[str, Any]], network: str, path: Path, *, num_images: int) -> None:
    """The table, best first by the network's Fréchet distance, and the picture."""
    names = [name for name in (*(f"{network}/{name}" for name in SHOWN), "accuracy") if name in rows[0]["scores"]]
    points = [Point(**{name: row[name] for name in Point.__dataclass_fields__}) for row in rows]
    told = [point.words() for point in points]
    same = {name: value for name, value in told[0].items() if all(each[name] == value for each in told)}
    real = rows[0]["scores"][f"{network}/num_reference_images"]
    caption = f"N = {num_images:,} images of each, M = {real:,} training images\n{biases(names)}"
    table = Table(
        title=f"{len(rows)} combinations, best first", caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    settings = [name for name in told[0] if name not in same]
    for name in settings:
        table.add_column(name, justify="right" if name in ("steps", "guidance") else "left", overflow="fold")
    for name in names:
        table.add_column(score_of(name.rpartition("/")[2]).title, justify="right", min_width=8)
    for row, said in sorted(zip(rows, told, strict=True), key=lambda both: both[0]["scores"][f"{network}/fid"]):
        errors = [row["scores"].get(f"{name}_standard_error", 0.0) for name in names]
        scores = [
            with_error(row["scores"][name], error) if error else number(float(f"{row['scores'][name]:.3g}"))
            for name, error in zip(names, errors, strict=True)
        ]
        table.add_row(*(said[name] for name in settings), *scores)
    Console().print(table)
    program.say("in all of them: " + ", ".join(f"{name} {value}" for name, value in same.items()))
    over = max(("steps", "guidance"), key=lambda name: len({getattr(point, name) for point in points}))
    lines: dict[str, list[tuple[float, float]]] = {}
    for point, said, row in zip(points, told, rows, strict=True):
        label = ", ".join(f"{name} {said[name]}" for name in settings if name != over)
        lines.setdefault(label, []).append((getattr(point, over), row["scores"][f"{network}/fid"]))
    drawn = [
        (label, [at for at, _ in sorted(values)], [y for _, y in sorted(values)]) for label, values in lines.items()
    ]
    with files.whole(path.with_suffix(".png")) as aside:
        sweep_plot(aside, drawn, x=over, y=f"Fréchet distance ({network}); 0 is best")
    program.say(f"the picture is {path.with_suffix('.png')}")


if __name__ == "__main__":
    program.end(main())
