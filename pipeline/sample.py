"""Draw a labelled grid of images from RUN/export, as any diffusers user would load it."""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from pipeline import files, program, sampler
from pipeline.config import Config
from pipeline.engine import Engine
from pipeline.errors import UsageError
from pipeline.metrics.pictures import labelled_grid
from pipeline.sampler import Asked


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("sample", __doc__ or "")
    made.add_argument("--classes", help="names or ids, with commas between (default: the first ten)")
    made.add_argument("--columns", type=int, default=10, help="images of each class (default 10)")
    made.add_argument("--guidance", type=float, help="w in u + w (c - u) (default: the config's last scale)")
    made.add_argument("--seed", type=int, help="of the noise (default: the config's)")
    made.add_argument("--out", type=Path, help="the picture (default RUN/samples/grid.png)")
    return program.run_config(made, argv, sample, None)


def sample(config: Config, args: argparse.Namespace) -> None:
    """export → images → one picture."""
    pipe = sampler.open_export(Path(config.run_dir) / "export", Engine(config.engine).device)
    names = config.conditioning.class_names or tuple(str(i) for i in range(config.conditioning.num_classes))
    asked: list[str | int] = list(range(min(10, len(names))))
    if args.classes:
        words = [word.strip() for word in args.classes.split(",")]
        asked = [int(word) if word.isdigit() else word for word in words]
    if args.columns < 1:
        raise UsageError(f"--columns: {args.columns} came, 1 or more was wanted")
    try:
        ids = pipe.label_ids(asked)
    except ValueError as error:
        raise UsageError(f"--classes: {error}") from None
    labels = [label for label in ids for _ in range(args.columns)]
    with tqdm(total=len(labels), desc="sample", unit=" images", dynamic_ncols=True) as bar:
        pixels = sampler.draw(
            pipe,
            [Asked(label) for label in labels],
            range(len(labels)),
            seed=config.seed if args.seed is None else args.seed,
            guidance_scale=config.evaluation.guidance_scales[-1] if args.guidance is None else args.guidance,
            num_inference_steps=config.evaluation.num_inference_steps,
            batch_images=config.evaluation.batch_images,
            bar=bar,
        )
    rows = [(names[c], list(pixels[i * args.columns : (i + 1) * args.columns])) for i, c in enumerate(ids)]
    out: Path = args.out or Path(config.run_dir) / "samples" / "grid.png"
    with files.whole(out) as aside:
        labelled_grid(rows, scale=2).save(aside, format="PNG")
    program.say(f"the picture is {out}")


if __name__ == "__main__":
    program.end(main())
