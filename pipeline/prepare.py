"""Make image shards (WebDataset tars) with train and validation parts.

digits          scikit-learn's handwritten digits: 1,797 real images, no download
folder SOURCE   your own images, one folder per class
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline import program
from pipeline.data.prepare import prepare_digits, prepare_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.parser("prepare", __doc__ or "")
    made.add_argument("kind", choices=("digits", "folder"), help="what to prepare")
    made.add_argument("source", nargs="?", type=Path, help="for folder: a folder with one folder per class")
    made.add_argument("out", type=Path, help="where OUT/train and OUT/validation are written")
    made.add_argument("--size", type=int, default=32, help="side of the images, pixels (default 32)")
    made.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    made.add_argument("--validation", type=float, default=0.2, help="share held out (default 0.2)")
    return program.run_plain(made, argv, prepare)


def prepare(args: argparse.Namespace) -> None:
    """Write the shards, their index and dataset.json."""
    for name, good in (("--size", args.size > 0), ("--validation", 0 < args.validation < 1)):
        if not good:
            raise program.UsageError(f"{name}: out of range")
    shared = {"size": args.size, "seed": args.seed, "validation_share": args.validation}
    if args.kind == "digits":
        prepare_digits(args.out, **shared)
    elif args.source is None:
        raise program.UsageError("prepare folder: the folder of your images and the one to write were wanted")
    else:
        prepare_folder(args.source, args.out, **shared)
    program.say(f"the shards are in {args.out / 'train'} and {args.out / 'validation'}")
