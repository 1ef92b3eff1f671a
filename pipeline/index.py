"""Check a folder of WebDataset tars, as img2dataset writes them, and write its index.

Every header's checksum, both end-of-archive blocks, keys and parts are checked; every bad shard is named.  Shards that
have not changed since they were indexed are not read again; an interrupted run goes on when it is started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline import files, program
from pipeline.data import images, latents
from pipeline.data.index import build_index
from pipeline.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.parser("index", __doc__ or "")
    made.add_argument("folder", type=Path, help="the folder of the *.tar")
    made.add_argument("--workers", type=int, metavar="N", help="how many shards to read at once (one per core)")
    made.add_argument(
        "--verify",
        action="store_true",
        help="read every shard again, also those that seem unchanged, and name the damaged",
    )
    return program.run_plain(made, argv, index)


def index(args: argparse.Namespace) -> None:
    """Write FOLDER/index, and say what was found.  Half a set is refused: what makes it writes the index."""
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers: {args.workers} came, at least 1 was wanted")
    described = args.folder / "dataset.json"
    if described.is_file() and files.read_json(described).get("complete") is False:
        raise UsageError(f"{args.folder}: half made; run the command that makes it again, and it goes on")
    required = (images.PARTS | {latents.PART},)
    build_index(args.folder, required, workers=args.workers, verify=args.verify)
    shards = files.read_json(args.folder / "index" / "manifest.json")["shards"]
    program.say(f"{args.folder}: {sum(s['samples'] for s in shards):,} samples in {len(shards):,} shards")
