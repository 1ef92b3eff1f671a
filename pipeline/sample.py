"""Draw images of classes, prompts or both from RUN/export: one labelled grid, or thousands of single files.

What is drawn: --classes, --prompts, or a file of them, --from FILE:
  .txt    a class (name or id) on each line; for models that read captions a prompt
  .jsonl  objects {"class", "prompt", "seed", "guidance", "negative_class", "negative_prompt"}, what is wanted of them
  .csv    with a header of these names; an empty cell says nothing
--files FOLDER writes a PNG for each image, which says how it was drawn, and samples.jsonl.  The work is shared out over
the ranks (accelerate launch pipeline/sample.py CONFIG.yaml ...); for any number of them the files are the same.
A killed sample goes on where it was when the same command is run again.
"""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import asking, files, image_files, program, sampler
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.config import Config
from pipeline.drawing import draw_missing, try_out
from pipeline.engine import Engine
from pipeline.errors import UsageError, blame
from pipeline.image_files import Row
from pipeline.metrics.pictures import labelled_grid
from vae.model import state_sha256

GRID_COUNT, FILES_COUNT = 10, 1  # images of each, where --count doesn't say
LABEL_LETTERS = 40  # of a grid's row


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("sample", __doc__ or "")
    made.add_argument("--classes", metavar="A,B", help="names or ids, with commas between (default: the first ten)")
    made.add_argument("--prompts", nargs="+", metavar="TEXT", help="for models that read captions; after overrides")
    made.add_argument("--from", dest="path", type=Path, metavar="FILE", help="a list of what to draw, instead of these")
    made.add_argument("--count", type=int, metavar="N", help="images of each (default: 10 in a grid, 1 with --files)")
    made.add_argument("--columns", type=int, metavar="N", help="the same, where they are the columns of a grid")
    made.add_argument("--guidance", type=float, help="w in u + w (c - u) (default: the config's last scale)")
    made.add_argument("--guidance-rescale", type=float, default=0.0, metavar="PHI", help="0 to 1 (default 0)")
    made.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("START", "END"),
        help="shares of the steps, from pure noise, that are guided (default 0 1)",
    )
    made.add_argument("--steps", type=int, help="of the scheduler (default: evaluation.num_inference_steps)")
    made.add_argument("--scheduler", metavar="NAME", help="one of diffusers', such as EulerDiscreteScheduler")
    made.add_argument("--eta", type=float, default=0.0, help="0 is DDIM, 1 ancestral, where the scheduler has it")
    made.add_argument("--seed", type=int, help="of all noise (default: the config's)")
    made.add_argument("--export", type=Path, metavar="FOLDER", help="what to draw from (default RUN/export)")
    made.add_argument("--out", type=Path, help="the picture (default RUN/samples/grid.png)")
    made.add_argument("--files", type=Path, metavar="FOLDER", help="single PNG files here instead of one picture")
    return program.run_config(made, argv, sample, None)


def sample(config: Config, args: argparse.Namespace) -> None:
    """What is asked → export → this rank's share of the images, as files → one picture of them, or their list."""
    count = checked_count(args)
    engine = Engine(config.engine)
    export: Path = args.export or Path(config.run_dir) / "export"
    pipe = sampler.open_export(export, engine.device, tile_pixels=config.vae.tile_pixels)
    how = how_drawn(config, args, pipe)
    lines = asking.wanted_lines(pipe, args.classes, args.prompts, args.path)
    with blame("--guidance"):
        guidance = asking.guidance_scale(
            config.evaluation.guidance_scales[-1] if args.guidance is None else args.guidance
        )
    with blame("--seed"):
        seed = asking.whole_number(config.seed if args.seed is None else args.seed)
    images = asking.images_of(lines, count, seed=seed, guidance=guidance)
    rows = image_files.rows_of(images, pipe.config["class_names"], said_of_all(how, pipe, export))

    try_out(pipe, images[0], how)
    engine.quicken(pipe.unet)
    engine.quicken(pipe.vae, pipe.vae.decoder)
    if config.evaluation.decode_slices:
        pipe.vae.enable_slicing()

    out: Path = args.out or Path(config.run_dir) / "samples" / "grid.png"
    folder: Path = args.files or out.with_name(f".{out.name}.images")  # a grid is put together from files too
    engine.main_does(lambda: claim_folder(folder, rows) if args.files else claim_aside(folder, rows, out))
    batches = asking.batches(images, config.evaluation.batch_images)
    draw_missing(engine, pipe, batches, rows, folder=folder, how=how)
    engine.main_does(lambda: list_files(folder, rows) if args.files else write_grid(out, folder, rows, count))


def checked_count(args: argparse.Namespace) -> int:
    """Images of each line.  Raises UsageError."""
    if args.files is not None and args.out is not None:
        raise UsageError("--files and --out came; one of them was wanted: single files, or one picture")
    if args.files is not None and args.columns is not None:
        raise UsageError("--files and --columns came; --count was wanted: only a grid has columns")
    if args.count is not None and args.columns is not None:
        raise UsageError("--count and --columns came; one of them was wanted: both are the images of each")
    for option, given in (("--count", args.count), ("--columns", args.columns)):
        if given is not None:
            if given < 1:
                raise UsageError(f"{option}: {given} came, 1 or more was wanted")
            return given
    return GRID_COUNT if args.files is None else FILES_COUNT


def how_drawn(config: Config, args: argparse.Namespace, pipe: ClassConditionalPipeline) -> dict[str, Any]:
    """The arguments of the pipeline that are one for all images; it gets its scheduler.  Raises UsageError."""
    if args.scheduler is not None:
        pipe.scheduler = asking.scheduler_like(pipe, args.scheduler)
    start, end = args.guidance_interval
    steps = config.evaluation.num_inference_steps if args.steps is None else args.steps
    for option, came, fits, wanted in (
        ("--steps", steps, steps >= 1, "1 or more"),
        ("--guidance-rescale", args.guidance_rescale, 0 <= args.guidance_rescale <= 1, "0 to 1"),
        ("--guidance-interval", f"{start:g} {end:g}", 0 <= start <= end <= 1, "0 <= START <= END <= 1"),
        ("--eta", args.eta, 0 <= args.eta <= 1, "0 to 1"),
    ):
        if not fits:
            raise UsageError(f"{option}: {came} came, {wanted} was wanted")
    if args.eta and not asking.takes_eta(pipe.scheduler):
        raise UsageError(f"--eta: {args.eta} came; {type(pipe.scheduler).__name__} has none, DDIMScheduler has")
    return {
        "num_inference_steps": steps,
        "guidance_rescale": args.guidance_rescale,
        "guidance_interval": (start, end),
        "eta": args.eta,
    }


def said_of_all(how: dict[str, Any], pipe: ClassConditionalPipeline, export: Path) -> Row:
    """What every image says alike of how it was drawn: settings, scheduler, the export's passport, our version."""
    if (export / sampler.PASSPORT).exists():
        passport = files.read_json(export / sampler.PASSPORT)
    else:  # somebody else's: known by its weights
        passport = {"unet_sha256": state_sha256(pipe.unet.state_dict())}
    tile = sampler.tile_of(pipe)
    return {
        **({"tile_pixels": tile} if tile is not None else {}),
        "guidance_rescale": how["guidance_rescale"],
        "guidance_interval": list(how["guidance_interval"]),
        "steps": how["num_inference_steps"],
        "scheduler": type(pipe.scheduler).__name__,
        "eta": how["eta"],
        "export": passport,
        "version": image_files.project_version(),
    }


def claim_folder(folder: Path, rows: Sequence[Row]) -> None:
    """Make FOLDER one for these images.  Raises UsageError where it can't be, or has others."""
    with blame("--files"):
        image_files.claim(folder, rows)


def claim_aside(folder: Path, rows: Sequence[Row], out: Path) -> None:
    """The same for the folder beside a picture, which is the program's own: what another command left goes."""
    with blame("--out"):
        if out.is_dir():
            raise UsageError(f"{out}: a folder came, the name of a picture was wanted")
        try:
            image_files.claim(folder, rows)
        except UsageError:
            shutil.rmtree(folder)
            image_files.claim(folder, rows)


def list_files(folder: Path, rows: Sequence[Row]) -> None:
    """Write samples.jsonl."""
    image_files.write_list(folder, rows)
    program.say(f"{len(rows)} images are in {folder}, listed in {folder / image_files.LISTED}")


def write_grid(out: Path, folder: Path, rows: Sequence[Row], columns: int) -> None:
    """One picture of all images, a row for each line; it says how they were drawn.  The folder goes."""
    paths = [folder / name for name in image_files.file_names(rows)]
    lines = [
        (label_of(rows[first]), [image_files.read_png(path) for path in paths[first : first + columns]])
        for first in range(0, len(rows), columns)
    ]
    image_files.write_png(out, labelled_grid(lines, scale=2), {"columns": columns, **image_files.together(rows)})
    shutil.rmtree(folder)
    program.say(f"the picture is {out}")


def label_of(row: Row) -> str:
    """Of a grid's row: the class, the prompt, or both."""
    said = ": ".join(str(row[key]) for key in ("class", "prompt") if row[key] is not None)
    return textwrap.shorten(said, LABEL_LETTERS, placeholder=" ...")


if __name__ == "__main__":
    program.end(main())
