"""Make image shards (WebDataset tars) with train and validation parts.

digits          scikit-learn's handwritten digits: 1,797 real images with labels and captions, no download
emoji           1,400 emoji with their names as captions, drawn from Debian's fonts-noto-color-emoji
folder SOURCE   your own images, one folder per class
table SOURCE    a CSV, JSONL or Parquet table of image paths with captions, labels or both

A killed prepare goes on where it was when the same command is run again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import program
from pipeline.data import emoji
from pipeline.data.prepare import prepare_digits, prepare_emoji, prepare_folder, prepare_table
from pipeline.data.tables import Columns

ONLY_FOR = {  # option → the kinds that know it
    "source": ("folder", "table"),
    "format": ("folder", "table"),
    "images": ("table",),
    "path_column": ("table",),
    "caption_column": ("table",),
    "label_column": ("table",),
    "font": ("emoji",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.parser("prepare", __doc__ or "")
    made.add_argument("kind", choices=("digits", "emoji", "folder", "table"), help="what to prepare")
    made.add_argument("source", nargs="?", type=Path, help="the folder with one folder per class, or the table")
    made.add_argument("out", type=Path, help="where OUT/train and OUT/validation are written")
    made.add_argument("--size", type=int, default=32, help="side of the images, pixels (default 32)")
    made.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    made.add_argument("--validation", type=float, default=0.2, help="share held out (default 0.2)")
    made.add_argument("--workers", type=int, help="processes; the shards are the same for any (default: the cores)")
    made.add_argument("--format", choices=("png", "jpg"), help="folder, table: of the images (default png; jpg: 95)")
    made.add_argument("--images", type=Path, metavar="ROOT", help="table: where its paths begin (default: beside it)")
    made.add_argument("--path-column", metavar="NAME", help="table: the column of image paths (default path)")
    made.add_argument("--caption-column", metavar="NAME", help="table: the column of captions (default caption)")
    made.add_argument("--label-column", metavar="NAME", help="table: the column of labels (default label)")
    made.add_argument("--font", type=Path, help=f"emoji: a colour font (default {emoji.FONT})")
    return program.run_plain(made, argv, prepare)


def prepare(args: argparse.Namespace) -> None:
    """Write the shards, their index and dataset.json."""
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    in_range = {"--size": args.size > 0, "--validation": 0 < args.validation < 1, "--workers": workers >= 0}
    for name, good in in_range.items():
        if not good:
            raise program.UsageError(f"{name}: out of range")
    for name, kinds in ONLY_FOR.items():
        if getattr(args, name) is not None and args.kind not in kinds:
            told = "a source" if name == "source" else f"--{name.replace('_', '-')}"
            raise program.UsageError(f"prepare {args.kind}: {told} came, which is for {' and '.join(kinds)}")
    shared: dict[str, Any] = {
        "size": args.size,
        "seed": args.seed,
        "validation_share": args.validation,
        "workers": workers,
    }
    match args.kind:
        case "digits":
            prepare_digits(args.out, **shared)
        case "emoji":
            prepare_emoji(args.out, font=args.font or emoji.FONT, **shared)
        case _ if args.source is None:
            wanted = "the folder of your images" if args.kind == "folder" else "your table"
            raise program.UsageError(f"prepare {args.kind}: {wanted} and the folder to write were wanted")
        case "folder":
            passed_over = prepare_folder(args.source, args.out, image_format=args.format or "png", **shared)
            if passed_over:
                program.say(f"warning: {args.source}: {passed_over}")
        case _:
            chosen = {"path": args.path_column, "caption": args.caption_column, "label": args.label_column}
            prepare_table(
                args.source,
                args.images or args.source.parent,
                args.out,
                columns=Columns(**{part: name for part, name in chosen.items() if name}),
                image_format=args.format or "png",
                **shared,
            )
    program.say(f"look at {args.out / 'train' / 'preview.png'}")
    program.say(f"the shards are in {args.out / 'train'} and {args.out / 'validation'}")
