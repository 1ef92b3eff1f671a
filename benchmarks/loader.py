"""What does a latent sample cost until it lies in a batch, and what do its draws cost?

python benchmarks/loader.py      (one thread; a minute)

Real shards of 4×64×64 moments (fp16 [8,64,64] and a class) are read, checked, copied and collated in batches of 64,
in the shuffled order of training; against webdataset's own decoding and batching of the same shards, read from first
to last.  Both are timed in pairs, in an order drawn anew each time; a figure is the median of the pairs' ratios.  The
control is ours against ours.  The draws (posterior noise, eps, timestep, dropout) are timed alone.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from pipeline.data import latents
from pipeline.data.dataset import Samples
from pipeline.data.index import ShardSet, build_index
from pipeline.data.pieces import ClassLabel, Diffusion, Dropout, Moments, Piece, PosteriorNoise, class_label

SHAPE = (4, 64, 64)
SHARDS, SAMPLES_PER_SHARD, BATCH, LANES = 4, 512, 64, 16
PAIRS = 40
SEED = 0


def write_set(folder: Path) -> list[str]:
    """Latent shards as encode writes them, and their index."""
    rng = np.random.default_rng(SEED)
    for shard in range(SHARDS):
        with (folder / f"{shard:06d}.tar").open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
            for row in range(SAMPLES_PER_SHARD):
                moments = latents.moments_to_bytes(rng.normal(size=(2 * SHAPE[0], *SHAPE[1:])))
                number = shard * SAMPLES_PER_SHARD + row
                writer.write({"__key__": f"{number:08d}", latents.PART: moments, "cls": str(number % 1000).encode()})
    build_index(folder)
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def samples_of(folder: Path, *pieces: Piece) -> Samples:
    """The set in the order of training."""
    return Samples([ShardSet(folder, open_shards=LANES)], pieces, seed=SEED, lanes=LANES, block=1024)


def label(position: int, parts: dict[str, bytes]) -> dict[str, Any]:
    """The class alone, without its dropout's draw."""
    del position
    return {"class_label": np.int64(class_label(parts))}


def seconds(work: Callable[[], Any]) -> float:
    """Of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def ratio(one: Callable[[], Any], other: Callable[[], Any], rng: random.Random) -> float:
    """Median over pairs of the time of `one` over that of `other`."""
    found: list[float] = []
    for _ in range(PAIRS):
        took: dict[int, float] = {}
        for which in rng.sample((0, 1), 2):
            took[which] = seconds((one, other)[which])
        found.append(took[0] / took[1])
    return statistics.median(found)


def say(figure: str, value: float, bound: str, holds: bool, unit: str) -> None:
    """One line of the result."""
    print(json.dumps({"figure": figure, "value": round(value, 3), "bound": bound, "holds": holds, "unit": unit}))


def main() -> None:
    """Deliver the set both ways, then draw."""
    torch.set_num_threads(1)
    num_samples = SHARDS * SAMPLES_PER_SHARD
    with tempfile.TemporaryDirectory() as name:
        tars = write_set(Path(name))
        condition = (ClassLabel(1000), Dropout(SEED, 0.1))
        delivered = samples_of(Path(name), Moments(SEED, SHAPE), label)

        def ours() -> None:
            for first in range(0, num_samples, BATCH):
                loaded = delivered.__getitems__(list(range(first, first + BATCH)))
                assert loaded["batch"]["moments"].shape == (BATCH, 2 * SHAPE[0], *SHAPE[1:])

        def webdatasets() -> None:
            batches: Any = WebDataset(tars, shardshuffle=False).decode().to_tuple(latents.PART, "cls").batched(BATCH)
            assert sum(len(labels) for _, labels in batches) == num_samples

        for warm in (ours, webdatasets, ours):
            warm()
        rng = random.Random(SEED)
        faster, control = ratio(webdatasets, ours, rng), ratio(ours, ours, rng)
        say("latent samples delivered: webdataset's time over ours", faster, ">= 5", faster >= 5, "ratio")
        same = abs(control - 1) <= 0.05
        say("latent samples delivered: control, our time over ours", control, "0.95 to 1.05", same, "ratio")
        each = statistics.median(seconds(ours) for _ in range(9)) / num_samples * 1e6
        say("a latent sample delivered, copied and collated", each, "none", True, "µs")

        pieces = (PosteriorNoise(SEED, SHAPE), Diffusion(SEED, SHAPE, BATCH), *condition)
        _, parts = delivered.sets[0].read(0, 0)

        def draw() -> None:
            for position in range(512):
                for piece in pieces:
                    piece(position, parts)

        draw()
        drawn = statistics.median(seconds(draw) for _ in range(9)) / 512 * 1e6
        say("draws of a sample: posterior noise, eps, timestep, dropout", drawn, "<= 400", drawn <= 400, "µs")


if __name__ == "__main__":
    main()
