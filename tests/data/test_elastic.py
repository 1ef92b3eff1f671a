"""A run that ends and goes on at another number of ranks and loader processes, again and again, reads the same batches.

`segments` says when a run ends and how many there are when it goes on; whatever reads positions is held against it.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from pipeline.data import latents
from pipeline.data.dataset import Samples, load_batches
from pipeline.data.index import ShardSet, build_index
from pipeline.data.order import Mix, Order, check_ranks, rank_batches
from pipeline.data.pieces import Diffusion, Moments, PosteriorNoise

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


REAL_COUNTS = ([7, 0, 130, 41, 3, 0, 12], [60, 0, 5])
SHAPE = (1, 1, 1)


@pytest.fixture(scope="module")
def real_sets(tmp_path_factory: pytest.TempPathFactory, write_tar: Callable[..., Path]) -> list[Path]:
    """Latent shards, uneven and empty ones among them; a sample's moments are its set and its number."""
    folders: list[Path] = []
    for a_set, counts in enumerate(REAL_COUNTS):
        folder = tmp_path_factory.mktemp(f"set{a_set}")
        number = 0
        for shard, count in enumerate(counts):
            samples: list[dict[str, Any]] = []
            for _ in range(count):
                moments = latents.moments_to_bytes(np.array([a_set, number]).reshape(2, 1, 1))
                samples.append({"__key__": f"{number:05d}", latents.PART: moments, "cls": b"0"})
                number += 1
            write_tar(folder / f"{shard:03d}.tar", samples)
        build_index(folder)
        folders.append(folder)
    return folders


def real_samples(folders: Sequence[Path], weights: tuple[float, ...]) -> Samples:
    """As a process that knows its settings and the folders makes it."""
    pieces = (Moments(SEED, SHAPE), PosteriorNoise(SEED, SHAPE), Diffusion(SEED, SHAPE, GLOBAL_BATCH))
    sets = [ShardSet(folder, open_shards=LANES) for folder in folders]
    return Samples(sets, pieces, seed=SEED, lanes=LANES, block=BLOCK, weights=weights)


def read_really(segment: Segment, folders: Sequence[Path], weights: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """What all ranks' loaders deliver of a segment, in order of position.

    One rank, another in each segment, has its loader processes; the others read by themselves, to save time.
    """
    share = GLOBAL_BATCH // segment.world
    loaded: list[dict[str, torch.Tensor]] = []
    positions: list[int] = []
    for rank in range(segment.world):
        lists = list(
            rank_batches(
                segment.start,
                segment.stop,
                global_batch=GLOBAL_BATCH,
                micro_batch=share,
                rank=rank,
                num_ranks=segment.world,
            )
        )
        workers = segment.workers if rank == segment.start // GLOBAL_BATCH % segment.world else 0
        samples = real_samples(folders, weights)
        for batch, replaced in load_batches(samples, lists, workers=workers, pin_memory=False):
            assert replaced == []
            loaded.append(batch)
        positions += [position for of_batch in lists for position in of_batch]
    back = torch.argsort(torch.tensor(positions))
    return {name: torch.cat([batch[name] for batch in loaded])[back] for name in loaded[0]}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("num_sets", "weights", "resumes"), [(1, (1.0,), RESUMES // 4), (2, (0.75, 0.25), RESUMES)])
def test_real_tars_give_the_same_global_batches(
    real_sets: list[Path], num_sets: int, weights: tuple[float, ...], resumes: int
) -> None:
    folders = real_sets[:num_sets]
    made = list(segments(3, resumes, most_batches=2))
    undisturbed = read_really(Segment(1, 0, 0, made[-1].stop), folders, weights)
    assert len(undisturbed["u"]) == made[-1].stop
    for segment in made:
        for name, tensor in read_really(segment, folders, weights).items():
            assert torch.equal(tensor, undisturbed[name][segment.start : segment.stop]), (segment, name)
    order = [Order(list(counts), SEED, LANES, BLOCK) for counts in REAL_COUNTS[:num_sets]]
    firsts = [np.cumsum([0, *counts]) for counts in REAL_COUNTS]
    mix = Mix(order, weights)
    for position, (a_set, number) in enumerate(undisturbed["moments"].flatten(1).int().tolist()):
        of_set, shard, row = mix(position)
        assert (a_set, number) == (of_set, int(firsts[of_set][shard]) + row)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_one_shard_serves_eight_ranks_of_four_processes(real_sets: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    shutil.copy(real_sets[0] / "002.tar", folder)
    build_index(folder)
    samples = real_samples([folder], (1.0,))
    whole, _ = next(load_batches(samples, [list(range(2 * GLOBAL_BATCH))], workers=0, pin_memory=False))
    for rank in range(8):
        lists = list(
            rank_batches(0, 2 * GLOBAL_BATCH, global_batch=GLOBAL_BATCH, micro_batch=2, rank=rank, num_ranks=8)
        )
        found = list(load_batches(real_samples([folder], (1.0,)), lists, workers=4, pin_memory=False))
        assert len(found) == len(lists) == 6
        for (batch, _), positions in zip(found, lists, strict=True):
            assert all(torch.equal(batch[name], whole[name][positions]) for name in whole)
