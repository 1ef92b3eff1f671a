"""A run that ends and goes on at another number of ranks and loader processes, again and again, reads the same batches.

`segments` says when a run ends and how many there are when it goes on; whatever reads positions is held against it.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

from pipeline.data.order import Mix, Order, check_ranks, rank_batches

LANES, BLOCK, SEED = 24, 16, 9
GLOBAL_BATCH = 48
RESUMES = 120
WORLDS = (1, 2, 3, 4, 6, 8, 12, 24)  # what divides the lanes and the batch
MOST_WORKERS = 4
Place = tuple[int, int, int]  # set, shard, sample within it


class Segment(NamedTuple):
    """What a run reads between two starts: the positions from `start` up to `stop`, both whole global batches."""

    world: int  # ranks
    workers: int  # loader processes of each rank; 0: the rank itself
    start: int
    stop: int


def segments(seed: int, resumes: int = RESUMES, most_batches: int = 4) -> Iterator[Segment]:
    """A first start and `resumes` more.  At each of these the number of ranks and of loader processes are others."""
    rng = np.random.default_rng(seed)
    world, workers, start = 1, 0, 0
    for _ in range(resumes + 1):
        stop = start + int(rng.integers(1, most_batches + 1)) * GLOBAL_BATCH
        yield Segment(world, workers, start, stop)
        world = int(rng.choice([other for other in WORLDS if other != world]))
        workers = int(rng.choice([other for other in range(MOST_WORKERS + 1) if other != workers]))
        start = stop


def uneven_counts(num_shards: int, seed: int) -> list[int]:
    """Samples of each shard, one to 39; every seventh is empty."""
    counts = np.random.default_rng(seed).integers(1, 40, num_shards)
    counts[::7] = 0
    return counts.tolist()


SETS = {  # samples of each shard of each set, and their weights
    "one set": ([uneven_counts(60, 0)], (1.0,)),
    "two sets": ([uneven_counts(60, 0), uneven_counts(23, 1)], (0.75, 0.25)),
    "three sets": ([uneven_counts(60, 0), uneven_counts(23, 1), [500]], (5.0, 2.0, 1.0)),
}
every_mix = pytest.mark.parametrize(("counts", "weights"), SETS.values(), ids=SETS)


def make_mix(counts: list[list[int]], weights: tuple[float, ...]) -> Mix:
    """What a process makes that knows its settings and nothing else."""
    return Mix([Order(of_set, SEED, LANES, BLOCK) for of_set in counts], weights)


def read(segment: Segment, counts: list[list[int]], weights: tuple[float, ...]) -> list[tuple[int, Place]]:
    """(position, place) of all that the ranks and their loader processes read, rank by rank."""
    check_ranks(segment.world, lanes=LANES, global_batch=GLOBAL_BATCH)
    share = GLOBAL_BATCH // segment.world
    micro = next(size for size in (3, 2, 1) if share % size == 0)
    found: list[tuple[int, Place]] = []
    for rank in range(segment.world):
        batches = list(
            rank_batches(
                segment.start,
                segment.stop,
                global_batch=GLOBAL_BATCH,
                micro_batch=micro,
                rank=rank,
                num_ranks=segment.world,
            )
        )
        num_processes = max(1, segment.workers)
        for process in range(num_processes):
            mix = make_mix(counts, weights)
            found += [(p, mix(p)) for batch in batches[process::num_processes] for p in batch]
    return found


def test_every_resume_changes_the_number_of_ranks_and_processes() -> None:
    made = list(segments(0))
    assert len(made) == RESUMES + 1 >= 101
    for former, later in pairwise(made):
        assert later.start == former.stop
        assert later.world != former.world and later.workers != former.workers
    assert {segment.world for segment in made} == set(WORLDS)
    assert {segment.workers for segment in made} == set(range(MOST_WORKERS + 1))


@every_mix
def test_the_global_batches_are_those_of_one_undisturbed_rank(
    counts: list[list[int]], weights: tuple[float, ...]
) -> None:
    whole = make_mix(counts, weights)
    for segment in segments(1):
        found = read(segment, counts, weights)
        assert sorted(p for p, _ in found) == list(range(segment.start, segment.stop))  # none missing, none twice
        assert all(place == whole(p) for p, place in found)


@every_mix
def test_no_sample_is_lost_or_read_twice_but_the_tail(counts: list[list[int]], weights: tuple[float, ...]) -> None:
    """In each epoch of each set, but for the N mod C samples that the order leaves unread."""
    drawn: list[list[list[tuple[int, int]]]] = [[[] for _ in range(LANES)] for _ in counts]
    for segment in segments(2):
        for position, (a_set, shard, row) in sorted(read(segment, counts, weights)):
            drawn[a_set][position % LANES].append((shard, row))
    for of_set, in_lanes in zip(counts, drawn, strict=True):
        every = {(shard, row) for shard, count in enumerate(of_set) for row in range(count)}
        length = len(every) // LANES
        epochs = min(map(len, in_lanes)) // length
        assert epochs >= 3
        for epoch in range(epochs):
            places = [place for of_lane in in_lanes for place in of_lane[epoch * length : (epoch + 1) * length]]
            assert len(set(places)) == len(places) == len(every) - len(every) % LANES
            assert set(places) <= every
