"""The order of the data: every sample once per epoch, and the same global batches however they are shared out."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.draws import Purpose, permutation, uniform
from pipeline.data.order import ALGORITHM, DataState, Order, check_ranks, rank_batches
from pipeline.errors import UsageError

Place = tuple[int, int]
STATE = DataState(position=640, seed=7, global_batch=64, lanes=8, block=100, data_fingerprint="abc")


def epoch_by_hand(counts: list[int], seed: int, lanes: int, block: int, epoch: int) -> list[Place]:
    """What an epoch reads, by lists: the sentences of the module's docstring, one by one."""
    line = [
        (shard, row)
        for shard in permutation(len(counts), seed, Purpose.SHARD_ORDER, epoch).tolist()
        for row in range(counts[shard])
    ]
    start = int(uniform(seed, Purpose.LINE_START, epoch) * len(line))
    line = line[start:] + line[:start]
    length = len(line) // lanes
    shuffled: list[list[Place]] = []
    for lane in range(lanes):
        mine = line[lane * length : (lane + 1) * length]
        blocks = [mine[i : i + block] for i in range(0, length, block)]
        shuffled.append(
            [
                of_block[i]
                for number, of_block in enumerate(blocks)
                for i in permutation(len(of_block), seed, Purpose.BLOCK_ORDER, epoch, fine=lane, finer=number)
            ]
        )
    return [shuffled[p % lanes][p // lanes] for p in range(length * lanes)]


def read_epoch(order: Order, epoch: int) -> list[Place]:
    first = epoch * order.epoch_length
    return [order(p) for p in range(first, first + order.epoch_length)]


def uneven_counts(num_shards: int, seed: int = 0) -> list[int]:
    counts = np.random.default_rng(seed).integers(1, 40, num_shards)
    counts[:: max(1, num_shards // 6)] = 0
    return counts.tolist()


def samples_of(counts: list[int]) -> set[Place]:
    return {(shard, row) for shard, count in enumerate(counts) for row in range(count)}


def test_golden_order() -> None:
    order = Order([3, 0, 5, 2, 4], seed=7, lanes=3, block=2)
    assert order.epoch_length == 12
    # fmt: off
    assert [order(p) for p in range(24)] == [
        (2, 2), (4, 1), (0, 2), (2, 3), (4, 2), (0, 1), (2, 4), (0, 0), (3, 1), (4, 0), (4, 3), (3, 0),
        (2, 2), (0, 0), (4, 2), (2, 1), (0, 1), (4, 1), (2, 4), (4, 0), (4, 3), (2, 3), (0, 2), (3, 0),
    ]
    # fmt: on
    assert ALGORITHM == 1  # the golden order belongs to it: change both or neither


@settings(deadline=None, max_examples=80)
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any),
    lanes=st.integers(1, 12),
    block=st.integers(1, 20),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 2**40),
)
def test_any_epoch_is_that_of_the_docstring(counts: list[int], lanes: int, block: int, seed: int, epoch: int) -> None:
    lanes = min(lanes, sum(counts))
    order = Order(counts, seed, lanes, block)
    places = read_epoch(order, epoch)
    assert places == epoch_by_hand(counts, seed, lanes, block, epoch)
    assert len(set(places)) == len(places) == sum(counts) - sum(counts) % lanes
    assert set(places) <= samples_of(counts)


@pytest.mark.parametrize(
    "counts", [[25], [25, 0], [3, 4, 0, 11, 7], [1] * 25], ids=["one shard", "one and an empty", "uneven", "tiny"]
)
def test_epochs_leave_different_samples_unread(counts: list[int]) -> None:
    order = Order(counts, seed=1, lanes=8, block=5)
    left: Counter[Place] = Counter()
    for epoch in range(200):
        unread = samples_of(counts) - set(read_epoch(order, epoch))
        assert len(unread) == 25 % 8
        left.update(unread)
    assert len(left) == 25 and max(left.values()) < 22  # each in 8 epochs of 200, on average: + 5 sigma


def test_epochs_differ() -> None:
    order = Order(uneven_counts(20), seed=1, lanes=4, block=10)
    assert read_epoch(order, 0) != read_epoch(order, 1)


def test_seeds_differ() -> None:
    counts = uneven_counts(20)
    assert read_epoch(Order(counts, 1, 4, 10), 0) != read_epoch(Order(counts, 2, 4, 10), 0)


def test_one_sample_per_lane() -> None:
    counts = [2, 0, 3, 1]
    order = Order(counts, seed=0, lanes=6, block=4)
    assert order.lane_length == 1
    assert set(read_epoch(order, 3)) == samples_of(counts)


@pytest.mark.parametrize("counts", [[2, 3, 2], [0], []], ids=str)
def test_more_lanes_than_samples_are_refused(counts: list[int]) -> None:
    with pytest.raises(UsageError, match=rf"data\.lanes: 8 lanes came, but the set has only {sum(counts)} samples"):
        Order(counts, seed=0, lanes=8, block=4)


@pytest.mark.parametrize("position", [10**12, 10**15, 2**62])
def test_any_position_can_be_sought(position: int) -> None:
    counts = uneven_counts(12)
    order = Order(counts, seed=5, lanes=4, block=7)
    epoch, within = divmod(position, order.epoch_length)
    assert order(position) == epoch_by_hand(counts, 5, 4, 7, epoch)[within]


def test_order_does_not_depend_on_what_was_asked_before() -> None:
    counts = uneven_counts(12)
    order = Order(counts, seed=5, lanes=4, block=7)
    positions = np.random.default_rng(0).integers(0, 10 * order.epoch_length, 300).tolist()
    assert [order(p) for p in positions] == [Order(counts, 5, 4, 7)(p) for p in positions]


def spearman(order: Order, counts: list[int]) -> float:
    starts = np.cumsum([0, *counts])
    numbers: NDArray[np.int64] = np.array([starts[shard] + row for shard, row in read_epoch(order, 0)])
    return float(np.corrcoef(np.argsort(np.argsort(numbers)), np.arange(numbers.size))[0, 1])


@pytest.mark.parametrize("counts", [[4000], [100] * 40], ids=["one shard", "forty shards"])
def test_shuffle_is_real(counts: list[int]) -> None:
    for lanes in (1, 8):
        assert abs(spearman(Order(counts, 3, lanes, block=4000), counts)) < 4 / np.sqrt(4000)


def test_neighbours_in_a_shard_are_parted() -> None:
    order = Order([4000], seed=3, lanes=4, block=1000)
    rows = np.array([row for _, row in read_epoch(order, 0)])
    assert np.mean(np.abs(np.diff(rows[::4])) == 1) < 0.01


DIVISORS_OF_24 = (1, 2, 3, 4, 6, 8, 12, 24)


def test_every_world_size_gives_the_same_global_batches() -> None:
    counts = uneven_counts(200)
    batch, lanes = 48, 24
    whole = Order(counts, seed=9, lanes=lanes, block=16)
    rng = np.random.default_rng(0)
    position = 0
    for _ in range(130):
        world = int(rng.choice(DIVISORS_OF_24))
        share = batch // world
        micro = int(rng.choice([m for m in range(1, share + 1) if share % m == 0]))
        read: list[Place | None] = [None] * batch
        for rank in range(world):
            order = Order(counts, seed=9, lanes=lanes, block=16)  # a process that knows nothing but its position
            lists = list(
                rank_batches(
                    position, position + batch, global_batch=batch, micro_batch=micro, rank=rank, num_ranks=world
                )
            )
            assert [len(positions) for positions in lists] == [micro] * (share // micro)
            for p in (p for positions in lists for p in positions):
                assert read[p - position] is None
                read[p - position] = order(p)
        assert read == [whole(p) for p in range(position, position + batch)]
        position += batch


def test_batches_of_a_run_are_those_of_its_parts() -> None:
    def batches(begin: int, stop: int) -> list[list[int]]:
        return list(rank_batches(begin, stop, global_batch=12, micro_batch=2, rank=1, num_ranks=3))

    assert batches(24, 60) == batches(24, 36) + batches(36, 60)
    assert batches(24, 36) == [[25, 28], [31, 34]]
    assert batches(24, 24) == []


@pytest.mark.parametrize("world", DIVISORS_OF_24)
def test_ranks_own_whole_lanes(world: int) -> None:
    counts = uneven_counts(60)
    order = Order(counts, seed=2, lanes=24, block=16)
    epoch = order.epoch_length
    stop = -(-epoch // 48) * 48
    line = {place: i for i, place in enumerate(line_of(counts, 2))}
    for rank in range(world):
        lists = rank_batches(0, stop, global_batch=48, micro_batch=48 // world, rank=rank, num_ranks=world)
        mine = [p for positions in lists for p in positions if p < epoch]
        lanes = {line[order(p)] // order.lane_length for p in mine}
        assert lanes == {lane for lane in range(24) if lane % world == rank}


def line_of(counts: list[int], seed: int) -> list[Place]:
    """The first epoch's line, before it is cut: one lane in blocks of one sample is not shuffled."""
    return read_epoch(Order(counts, seed, lanes=1, block=1), 0)


def test_each_shard_lies_in_few_lanes() -> None:
    counts, lanes = uneven_counts(60), 12
    order = Order(counts, seed=2, lanes=lanes, block=1000)
    pieces = {(p % lanes, order(p)[0]) for p in range(order.epoch_length)}
    assert len(pieces) <= np.count_nonzero(counts) + lanes + 1  # every cut adds one piece


def test_a_state_survives_json() -> None:
    assert DataState(**json.loads(json.dumps(STATE.to_json()))) == STATE


def test_a_state_goes_on_from_any_position() -> None:
    STATE.check_continues(replace(STATE, position=0).to_json())


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", 8), ("global_batch", 32), ("lanes", 4), ("block", 99), ("data_fingerprint", "abd"), ("algorithm", 0)],
)
def test_whatever_differs_is_named(field: str, value: int | str) -> None:
    saved = STATE.to_json() | {field: value}
    with pytest.raises(UsageError) as told:
        STATE.check_continues(saved)
    assert f"{field} was {value!r}, now {getattr(STATE, field)!r}" in str(told.value)
    assert str(told.value).count(" was ") == 1


def test_all_that_differs_is_named_at_once() -> None:
    saved = STATE.to_json() | {"seed": 1, "block": 2}
    del saved["algorithm"]
    with pytest.raises(UsageError, match=r"seed was 1, now 7; block was 2, now 100; algorithm was None, now 1"):
        STATE.check_continues(saved)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_that_share_evenly_are_welcome(ranks: int) -> None:
    check_ranks(ranks, lanes=8, global_batch=16)


@pytest.mark.parametrize(
    ("ranks", "lanes", "batch", "nearest"),
    [
        (3, 8, 16, "2, 4"),
        (5, 8, 16, "4, 8"),  # 3 and 6 would be nearer, but do not divide
        (16, 8, 16, "4, 8"),
        (8, 8, 12, "2, 4"),
        (7, 24, 48, "6, 8"),
        (2, 7, 64, "1"),
        (1000, 64, 256, "32, 64"),
    ],
)
def test_the_nearest_that_work_are_named(ranks: int, lanes: int, batch: int, nearest: str) -> None:
    with pytest.raises(UsageError) as told:
        check_ranks(ranks, lanes=lanes, global_batch=batch)
    said = str(told.value)
    assert said.startswith(f"{ranks} ranks came") and f"data.lanes={lanes}" in said
    assert f"train.global_batch_images={batch}" in said and said.endswith(f"nearest that work: {nearest}")
