"""The largest micro-batch that fits the device's memory, found by trying."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.errors import RunError


def largest_that_fits(share: int, attempt: Callable[[int], None], agree: Callable[[bool], bool]) -> int:
    """The largest divisor of `share` that `attempt` gets through without torch.OutOfMemoryError on every rank.

    `agree`: whether something is true on all ranks.  Raises RunError where not even one image fits.
    """
    for size in (size for size in range(share, 0, -1) if share % size == 0):
        fits = True
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            fits = False
        if agree(fits):
            return size
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise RunError(
        "train.micro_batch_images: not even one image fits the device's memory; try "
        "engine.gradient_checkpointing=true, engine.strategy=zero3 over more ranks, or a smaller network"
    )
