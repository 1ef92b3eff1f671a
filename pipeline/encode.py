"""Encode image shards into latent shards: one output tar for each input tar, posterior moments and labels.

Shards are shared out over the ranks, and with --part over the tasks of a job array.  Each is written aside and renamed,
so a killed encode goes on where it was when the same command is run again, with any number of ranks.
"""

from __future__ import annotations

if __package__ in (None, ""):  # started as a file: look for modules in the folder above this one, not in it
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import re
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import AutoencoderKL
from torch.nn import Module
from tqdm import tqdm
from webdataset.writer import TarWriter

from pipeline import files, program
from pipeline.config import Config, DataConfig
from pipeline.data import latents, preview
from pipeline.data.index import ShardSet, note_shard
from pipeline.data.latent_set import LatentSet, Record, quarantined
from pipeline.data.latents import Origin
from pipeline.data.quarantine import BadSample, Count
from pipeline.data.sequential import read_through
from pipeline.encoder import Encoder, Ready, read_ahead
from pipeline.engine import Engine
from pipeline.errors import RunError, SampleError, UsageError, blame
from pipeline.locks import Locks
from pipeline.run_folder import STATUS, write_status
from pipeline.text import TextEncoder
from vae.model import load, weights_sha256
from vae.moments import MomentStatistics

WHOLE_SET = 0  # the lock of what is done once for a set; that of shard i is i + 1
LOOK_AGAIN_S, SAY_S = 0.3, 10.0


class Part(NamedTuple):
    """A job array's task: its number, from 1, and how many there are."""

    number: int
    of: int

    def status_name(self) -> str:
        """The file that tells how this task stands."""
        return STATUS if self.of == 1 else f"status.part-{self.number}-of-{self.of}.json"


def parse_part(text: str) -> Part:
    """I/N with 1 ≤ I ≤ N."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} came, I/N with I from 1 to N was wanted, such as 3/16")
    return Part(int(found[1]), int(found[2]))


@dataclass
class Work:
    """A set to encode, and how this rank stands with it."""

    key: str  # of the config, that named the folder
    latent_set: LatentSet
    encoder: Encoder
    locks: Locks
    writer: int  # tells apart processes that write the same file at once
    bad: list[BadSample] = field(default_factory=list[BadSample])  # met or found noted by this rank
    count: Count = Count()
    num_images: int = 0  # encoded by this rank
    num_quarantined: int = 0  # met by this rank


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("encode", __doc__ or "")
    made.add_argument(
        "--part",
        type=parse_part,
        default=Part(1, 1),
        metavar="I/N",
        help="do only the I-th of N parts of the shards, from 1: for job arrays; the last one to end finishes the set",
    )
    return program.run_config(made, argv, encode, status_folder, lambda args: args.part.status_name())


def status_folder(raw: dict[str, Any]) -> str | None:
    """The first folder that latents are written to, also in a config that was not checked yet."""
    named = raw["data"]["train_latents"]
    first = named[0] if isinstance(named, list | tuple) and named else named
    return first if isinstance(first, str) and "://" not in first else None


def encode(config: Config, args: argparse.Namespace) -> None:
    """config → engine → frozen networks → the shards of every set → what is complete is finished."""
    data, part = config.data, args.part
    if data.train_latents is None:
        raise UsageError(
            "data.train_latents: null came: this config trains on the images themselves; encode wants a folder for "
            "each of data.train_images"
        )
    engine = Engine(config.engine)
    with blame("vae.path"):
        vae = load(config.vae.path)
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if data.image_size % factor:
        raise UsageError(f"data.image_size: {data.image_size} came, a multiple of the VAE's factor {factor} was wanted")
    text = None
    if data.encode_text is not None:
        with blame("data.encode_text"):
            text = TextEncoder.load(data.encode_text)
    work = open_sets(config, engine, vae, text)
    engine.main_does(partial(begin, work, part))
    Module.to(vae, engine.device)
    if text is not None:
        text.to(engine.device)

    began = time.monotonic()
    for one in work:
        encode_shards(engine, one, part, data)
    engine.wait()
    seconds = time.monotonic() - began

    done = [sum(counts) for counts in zip(*engine.gather([sum_up(work)]), strict=True)][0]
    told: list[str] = engine.main_does(partial(close, work, part, data))
    for line in told:
        say(engine, line)
    num_images, num_quarantined = done
    say(engine, f"encoded {num_images:,} images")


if __name__ == "__main__":
    program.end(main())
