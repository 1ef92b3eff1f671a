"""Check a folder of WebDataset tars, as img2dataset writes them, and write its index.

Every header's checksum, both end-of-archive blocks, keys and parts are checked; every bad shard is named.  Shards that
have not changed since they were indexed are not read again; an interrupted run goes on when it is started again.

With --samples every sample is read once, as training reads it: images and moments are decoded, labels and captions
looked at.  What training would have to replace is listed by reason, and one by one in FOLDER/index/bad_samples.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline import files, program
from pipeline.data import images, latents
from pipeline.data.index import BAD_SAMPLES, build_index, num_cores
from pipeline.errors import RunError, UsageError

MOST_KINDS = 20  # reasons that are shown


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.parser("index", __doc__ or "")
    made.add_argument("folder", type=Path, help="the folder of the *.tar")
    made.add_argument("--workers", type=int, metavar="N", help="shards read at once (one per core)")
    made.add_argument(
        "--verify",
        action="store_true",
        help="read every shard again, also those that seem unchanged, and name the damaged",
    )
    made.add_argument("--samples", action="store_true", help="then read every sample too; 1 where any is bad")
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
    num_samples = sum(entry["samples"] for entry in shards)
    program.say(f"{args.folder}: {num_samples:,} samples in {len(shards):,} shards")
    if args.samples:
        read_samples(args.folder, num_samples, args.workers or num_cores())


def read_samples(folder: Path, num_samples: int, workers: int) -> None:
    """Read every sample; say what training could not use.  Raises RunError where there is any."""
    from pipeline.data.bad_samples import by_kind, find_bad_samples  # with torch, which headers don't want

    bad = find_bad_samples(folder, workers)
    if not bad:
        program.say(f"{folder}: all {num_samples:,} samples can be read")
        return
    kinds = by_kind(bad)
    width = len(f"{kinds[0].count:,}")
    for kind in kinds[:MOST_KINDS]:
        program.say(f"{kind.count:>{width},}  {kind.reason}; first: {kind.first.shard}: {kind.first.key!r}")
    if len(kinds) > MOST_KINDS:
        program.say(f"and {len(kinds) - MOST_KINDS:,} reasons more")
    raise RunError(
        f"{folder}: {len(bad):,} of {num_samples:,} samples can't be used, and training would replace them; "
        f"they are listed in {folder / 'index' / BAD_SAMPLES}"
    )
