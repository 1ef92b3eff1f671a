"""The real images that others are compared with: some of a set at once, or all of it in a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pipeline import program
from pipeline.config import Config
from pipeline.config_data import DataConfig
from pipeline.data import images
from pipeline.data.dataset import Shown, read_images
from pipeline.data.index import ShardSet
from pipeline.data.pieces import image_part
from pipeline.data.quarantine import BadSample
from pipeline.data.sequential import read_through
from pipeline.encoder import read_ahead
from pipeline.errors import blame


def num_images_of(sizes: Sequence[int], config: Config) -> list[int]:
    """How many images of each set are compared with: max_reference_images, in the shares that the sets are mixed by.

    Where a set has fewer than its share, fewer are taken of the others, too: shares hold to within one image, but that
    each set gives one at least.
    """
    weights = [Fraction(str(weight)) for weight in (config.data.weights or (1,))] if len(sizes) > 1 else [Fraction(1)]
    shares = [weight / sum(weights) for weight in weights]
    limits = (size / share for size, share in zip(sizes, shares, strict=True))
    total = int(min(config.evaluation.max_reference_images, *limits))
    counts = [int(total * share) for share in shares]
    rests = [total * share - count for share, count in zip(shares, counts, strict=True)]
    for a_set in sorted(range(len(rests)), key=lambda a_set: -rests[a_set])[: total - sum(counts)]:
        counts[a_set] += 1
    return [max(1, count) for count in counts]


def read_sets(key: str, folders: Sequence[str], config: Config) -> Shown:
    """As many samples of each set as `num_images_of` says; those that can't be read are told and left out."""
    sets: list[Shown] = []
    with blame(key):
        sizes = [len(ShardSet(folder, open_shards=1, remote=config.data.remote)) for folder in folders]
    counts = num_images_of(sizes, config)
    if len(sizes) > 1 and sum(counts) < min(config.evaluation.max_reference_images, sum(sizes)):
        program.say(
            f"{key}: {sum(counts):,} of {sum(sizes):,} images are compared with, {' + '.join(map(str, counts))} by "
            f"data.weights: the sets have {' + '.join(map(str, sizes))}"
        )
    for folder, count in zip(folders, counts, strict=True):
        with blame(key):
            found = read_images(folder, size=config.data.image_size, limit=count, remote=config.data.remote)
        sets.append(found)
        tell_bad(key, found.bad, len(found.bad) + len(found.pixels))
    labels = [each.labels for each in sets if each.labels is not None]
    captions = [each.captions for each in sets if each.captions is not None]
    return Shown(
        np.concatenate([each.pixels for each in sets]),
        np.concatenate(labels) if len(labels) == len(sets) else None,
        [text for each in captions for text in each] if len(captions) == len(sets) else None,
        [bad for each in sets for bad in each.bad],
    )


def tell_bad(key: str, bad: Sequence[BadSample], num_samples: int) -> None:
    """Warn of samples that can't be read, if there are any."""
    if bad:
        program.say(
            f"warning: {key}: {len(bad)} of {num_samples} samples can't be read and are left out; "
            f"the first: {bad[0].shard}: sample {bad[0].key!r}: {bad[0].reason}"
        )


def stream_images(
    shards: ShardSet, which: Sequence[int], data: DataConfig, *, batch_images: int, bad: list[BadSample]
) -> Iterator[NDArray[np.uint8]]:
    """All images of some shards in batches uint8 [B,H,W,3], cut in the centre; what can't be read is added to `bad`.

    A batch holds images of one shard.  Raises UsageError and RunError as `read_through` does.
    """

    def decode(key: str, parts: dict[str, bytes]) -> NDArray[np.uint8]:
        del key
        return images.decode(image_part(parts), data.image_size)

    for shard in which:
        batch: list[NDArray[np.uint8]] = []
        samples = read_ahead(read_through(shards, shard), decode, workers=data.workers, ahead=2 * batch_images)
        for row, (key, found) in enumerate(samples):
            if isinstance(found, ValueError):
                bad.append(BadSample(row, shards.path(shard), key, str(found)))
                continue
            batch.append(found)
            if len(batch) == batch_images:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)
