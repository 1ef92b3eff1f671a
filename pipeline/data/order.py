"""Position → (shard, sample): the order of the data as a pure function of the seed.

The shards of an epoch are permuted and laid in a ring; from a drawn start it is cut into C equal lanes; each lane is
shuffled in blocks.  Position p of an epoch reads lane p mod C at offset p // C.  A rank of W reads the positions p
with p mod W = rank, so where W divides C it owns whole lanes, opens few shards, and the global batch is the same for
every W.  The N mod C samples before the start stay unread in that epoch; another start leaves others the next time.

Several sets are mixed by a pattern that repeats: each lane walks along it, one place further on than the lane before,
and takes its next sample of the set that it finds there.  So a lane reads each set in that set's own order, and at
every stretch of its places the sets come in their shares: of two, to within one sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import count
from math import lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.draws import Purpose, permutation, uniform
from pipeline.errors import UsageError

LONGEST_PATTERN = 10_000  # places, of the pattern that mixes sets
ALGORITHM = 1  # part of a run's identity: raise it when any position would read another sample


class Order:
    """The sample at every position, for shards with the given counts.

    Memory: 16 bytes a shard for each of two epochs, and 8 bytes for each sample of one block per lane.
    """

    def __init__(self, samples_per_shard: list[int], seed: int, lanes: int, block: int) -> None:
        """`samples_per_shard`: samples of each shard, empty ones allowed.  Raises UsageError if lanes > samples."""
        self.counts = np.asarray(samples_per_shard, dtype=np.int64)
        self.seed, self.lanes, self.block = seed, lanes, block
        self.num_samples = int(self.counts.sum())
        self.lane_length = self.num_samples // lanes
        if self.lane_length == 0:
            raise UsageError(
                f"data.lanes: {lanes} lanes came, but the set has only {self.num_samples} samples; "
                "give at most as many lanes as samples"
            )
        self.epoch_length = self.lane_length * lanes
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._shuffled = lru_cache(maxsize=lanes)(self._shuffle)

    def __call__(self, position: int) -> tuple[int, int]:
        """(shard, sample within it) at a position ≥ 0."""
        epoch, within = divmod(position, self.epoch_length)
        lane, offset = within % self.lanes, within // self.lanes
        block, place = divmod(offset, self.block)
        offset = block * self.block + int(self._shuffled(epoch, lane, block)[place])
        shards, ends, start = self._plan(epoch)
        line = (start + lane * self.lane_length + offset) % self.num_samples
        slot = int(np.searchsorted(ends, line, side="right"))  # skips empty shards
        shard = int(shards[slot])
        return shard, int(line - (ends[slot] - self.counts[shard]))

    def _make_plan(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        shards = permutation(len(self.counts), self.seed, Purpose.SHARD_ORDER, epoch)
        start = int(uniform(self.seed, Purpose.LINE_START, epoch) * self.num_samples)
        return shards, np.cumsum(self.counts[shards]), start

    def _shuffle(self, epoch: int, lane: int, block: int) -> NDArray[np.int64]:
        length = min(self.block, self.lane_length - block * self.block)
        return permutation(length, self.seed, Purpose.BLOCK_ORDER, epoch, fine=lane, finer=block)


class Mix:
    """The set and the sample at every position, for sets mixed by weight.  Of one set: that set's own order."""

    def __init__(self, orders: list[Order], weights: tuple[float, ...]) -> None:
        """`orders`: of each set, all with the same number of lanes; `weights`: > 0, taken as the decimals they are
        written as.  Raises UsageError where the weights want a pattern that is too long.
        """
        self.orders, self.lanes = orders, orders[0].lanes
        shares = _whole_numbers(weights)
        # The i-th of n places of a set belongs at (i + 1/2)/n of the pattern; wanted twice, in the sets' order.
        places = sorted((Fraction(2 * i + 1, 2 * n), a_set) for a_set, n in enumerate(shares) for i in range(n))
        self._pattern = np.array([a_set for _, a_set in places], dtype=np.int64)
        taken = self._pattern[:, None] == np.arange(len(shares))
        self._before = np.concatenate([np.zeros((1, len(shares)), np.int64), np.cumsum(taken, axis=0)])

    def __call__(self, position: int) -> tuple[int, int, int]:
        """(set, shard, sample within it) at a position ≥ 0."""
        if len(self.orders) == 1:
            return 0, *self.orders[0](position)
        offset, lane = divmod(position, self.lanes)
        a_set = int(self._pattern[(lane + offset) % len(self._pattern)])
        of_set = self._count(a_set, lane + offset) - self._count(a_set, lane)  # this lane's samples of it so far
        shard, row = self.orders[a_set](of_set * self.lanes + lane)
        return a_set, shard, row

    def _count(self, a_set: int, place: int) -> int:
        """How often a set comes before a place of the endless pattern."""
        rounds, rest = divmod(place, len(self._pattern))
        return int(rounds * self._before[-1, a_set] + self._before[rest, a_set])


def _whole_numbers(weights: tuple[float, ...]) -> list[int]:
    """The smallest whole numbers in these proportions."""
    exact = [Fraction(str(weight)) for weight in weights]
    unit = lcm(*(share.denominator for share in exact))
    whole = np.array([int(share * unit) for share in exact], dtype=object)
    whole //= np.gcd.reduce(whole)
    if sum(whole) > LONGEST_PATTERN:
        raise UsageError(
            f"data.weights: {list(weights)} came, which are {' : '.join(map(str, whole))} in whole numbers; "
            f"round them until these add up to {LONGEST_PATTERN:,} at most"
        )
    return whole.tolist()


@dataclass(frozen=True)
class DataState:
    """All that the data needs to go on, and all that must not differ when it does."""

    position: int  # samples drawn so far over all ranks
    seed: int
    global_batch: int
    lanes: int
    block: int
    data_fingerprint: str
    algorithm: int = ALGORITHM

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def check_continues(self, saved: dict[str, Any]) -> None:
        """Raise UsageError naming whatever differs, besides the position, from a saved state."""
        mine = self.to_json()
        differing = [key for key in mine if key != "position" and saved.get(key) != mine[key]]
        if differing:
            said = "; ".join(f"{key} was {saved.get(key)!r}, now {mine[key]!r}" for key in differing)
            raise UsageError(
                f"data: the checkpoint's order of samples can't go on: {said}. "
                "Give the former data and settings, or start a new run_dir"
            )


def rank_batches(
    position: int, stop: int | None, *, global_batch: int, micro_batch: int, rank: int, num_ranks: int
) -> Iterator[list[int]]:
    """This rank's positions, one list per micro-batch, from `position` up to `stop` (both whole global batches).

    `stop` None: without end.
    """
    for start in count(position, global_batch) if stop is None else range(position, stop, global_batch):
        mine = range(start + rank, start + global_batch, num_ranks)
        for first in range(0, len(mine), micro_batch):
            yield list(mine[first : first + micro_batch])


def check_ranks(num_ranks: int, *, lanes: int, global_batch: int) -> None:
    """Raise UsageError where this number of ranks can't share the lanes and the batch, naming those that can."""
    good = [w for w in range(1, min(lanes, global_batch) + 1) if lanes % w == 0 and global_batch % w == 0]
    if num_ranks in good:
        return
    near = sorted(good, key=lambda w: (abs(w - num_ranks), -w))[:2]
    raise UsageError(
        f"{num_ranks} ranks came, but the number of ranks must divide data.lanes={lanes} and "
        f"train.global_batch_images={global_batch}; nearest that work: {', '.join(map(str, sorted(near)))}"
    )
