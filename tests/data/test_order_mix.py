"""A mix of sets: each is read in its own order, the shares hold in every window, only the position counts."""

from collections import defaultdict
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.order import LONGEST_PATTERN, Mix, Order, rank_batches
from pipeline.errors import UsageError

Place = tuple[int, int, int]  # set, shard, sample within it
FAR = 10**12
UNEVEN = ([3, 0, 5, 2, 4], [0, 9, 1, 0, 7, 2], [30, 0, 1], [12])  # samples of each set's shards


def sets(num_sets: int, lanes: int = 3, block: int = 2, seed: int = 7) -> list[Order]:
    return [Order(counts, seed, lanes, block) for counts in UNEVEN[:num_sets]]


def read(mix: Mix, start: int, stop: int) -> list[Place]:
    return [mix(p) for p in range(start, stop)]


def test_golden_mix() -> None:
    mix = Mix(sets(2), (3, 1))
    # fmt: off
    assert read(mix, 0, 24) == [
        (0, 2, 2), (0, 4, 1), (1, 1, 0), (0, 2, 3), (1, 4, 0), (0, 0, 2), (1, 1, 6), (0, 4, 2), (0, 0, 1), (0, 2, 4),
        (0, 0, 0), (0, 3, 1), (0, 4, 0), (0, 4, 3), (1, 4, 6), (0, 2, 2), (1, 4, 1), (0, 3, 0), (1, 1, 7), (0, 0, 0),
        (0, 4, 2), (0, 2, 1), (0, 0, 1), (0, 4, 1),
    ]
    # fmt: on
    assert mix(FAR) == (1, 2, 0)


# of one set, and of one in several


@pytest.mark.parametrize("weight", [1, 3, 0.1, 1e-7, 1e9])
def test_a_mix_of_one_set_is_its_order(weight: float) -> None:
    (order,) = sets(1)
    mix = Mix([order], (weight,))
    for first in (0, FAR):
        assert [mix(p)[1:] for p in range(first, first + 50)] == [order(p) for p in range(first, first + 50)]
        assert {mix(p)[0] for p in range(first, first + 50)} == {0}


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ((0.75, 0.25), (3, 1)),
        ((6, 2), (3, 1)),
        ((0.1, 0.2), (1, 2)),  # as floats, their quotient is not 2 exactly
        ((0.7, 0.2, 0.1), (7, 2, 1)),
        ((1e-3, 2e-3), (1, 2)),
        ((1.5, 1), (3, 2)),
    ],
)
def test_weights_are_the_decimals_they_are_written_as(weights: tuple[float, ...], whole: tuple[float, ...]) -> None:
    orders = sets(len(weights))
    assert read(Mix(orders, weights), 0, 300) == read(Mix(orders, whole), 0, 300)


def test_the_longest_pattern_is_taken() -> None:
    mix = Mix(sets(2), (LONGEST_PATTERN - 1, 1))
    assert sum(mix(p)[0] for p in range(LONGEST_PATTERN * 3)) == 3  # each of three lanes walks the pattern once


@pytest.mark.parametrize("weights", [(LONGEST_PATTERN, 1), (0.33333, 0.66667), (1.00001, 1)], ids=str)
def test_a_pattern_that_is_too_long_is_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(
        UsageError, match=r"^data\.weights: \[.*\] came, which are .* : .* in whole numbers; round them"
    ):
        Mix(sets(2), weights)


# shares


def places_of(shares: tuple[int, ...]) -> NDArray[np.int64]:
    """The pattern as a lane walks it from its beginning: the set at each of its places."""
    mix = Mix([Order([1], 0, 1, 1) for _ in shares], tuple(map(float, shares)))
    return np.array([mix(p)[0] for p in range(sum(shares))])


def largest_departure(places: NDArray[np.int64], a_set: int) -> Fraction:
    """Of a set's count from its share of the window, over all windows of any length in the endless pattern, samples."""
    num_places, of_set = len(places), int(np.count_nonzero(places == a_set))
    ahead = np.concatenate([[0], np.cumsum((places == a_set) * num_places - of_set)])  # in 1/num_places samples
    return Fraction(int(ahead.max() - ahead.min()), num_places)


def most_departure(shares: tuple[int, ...], a_set: int) -> Fraction:
    """The bound.  Each other set's ideal places are off by half a sample at most, to either side."""
    num_places, others = sum(shares), len(shares) - 2
    return Fraction(num_places + others * shares[a_set] - others - 1, num_places)


def coprime(num_sets: int, most: int) -> list[tuple[int, ...]]:
    return [shares for shares in product(range(1, most), repeat=num_sets) if np.gcd.reduce(shares) == 1]


def test_two_sets_are_kept_as_nearly_as_whole_samples_can() -> None:
    """1 - 1/n for a pattern of n places: no order does better in every window."""
    for shares in coprime(2, 16):
        for a_set in range(2):
            departure = largest_departure(places_of(shares), a_set)
            assert departure == 1 - Fraction(1, sum(shares)) == most_departure(shares, a_set)


@pytest.mark.parametrize(("num_sets", "most"), [(3, 8), (4, 5)])
def test_several_sets_are_kept_to_a_sample_and_a_share_of_one(num_sets: int, most: int) -> None:
    reached = False
    for shares in coprime(num_sets, most):
        places = places_of(shares)
        for a_set in range(num_sets):
            departure, bound = largest_departure(places, a_set), most_departure(shares, a_set)
            assert departure <= bound < 1 + Fraction(shares[a_set] * (num_sets - 2), sum(shares))
            reached |= departure == bound
    assert reached  # no smaller bound holds for all


@pytest.mark.parametrize("shares", [(3, 1), (1, 1), (5, 3), (2, 3, 5), (1, 1, 1, 4)], ids=str)
@pytest.mark.parametrize("lanes", [1, 4, 6, 7])
def test_shares_hold_in_every_window_of_positions(shares: tuple[int, ...], lanes: int) -> None:
    """Of one lane: to the pattern's own departure.  Of all: of each begun and each whole row of lanes, what the whole
    turns of the pattern leave over.
    """
    num_places, rows = sum(shares), 2 * sum(shares)
    mix = Mix(sets(len(shares), lanes), tuple(map(float, shares)))
    found = np.array([mix(p)[0] for p in range(rows * lanes)])
    unpaired = min(lanes % num_places, -lanes % num_places)
    for a_set, share in enumerate(shares):
        bound = largest_departure(places_of(shares), a_set) * num_places
        for lane in range(lanes):
            assert np.ptp(departures(found[lane::lanes] == a_set, share, num_places)) <= bound
        assert np.ptp(departures(found == a_set, share, num_places)) <= (2 + unpaired) * bound


def departures(is_of_set: NDArray[np.bool_], share: int, num_places: int) -> NDArray[np.int64]:
    """Count less share of every beginning, in 1/num_places samples; a window's is the difference of two of these."""
    return np.concatenate([[0], np.cumsum(is_of_set * num_places - share)])


# each set's own order

mixes = st.integers(1, 4).flatmap(
    lambda num_sets: st.tuples(
        st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), min_size=num_sets, max_size=num_sets),
        st.lists(st.sampled_from([1, 2, 3, 5, 0.5, 0.25, 1.2]), min_size=num_sets, max_size=num_sets),
    )
)


@settings(deadline=None, max_examples=80)
@given(
    mixed=mixes,
    lanes=st.integers(1, 8),
    block=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
    first=st.one_of(st.just(0), st.integers(0, FAR)),
    data=st.data(),
)
def test_every_lane_reads_each_set_in_its_own_order(
    mixed: tuple[list[list[int]], list[float]], lanes: int, block: int, seed: int, first: int, data: st.DataObject
) -> None:
    counts, weights = mixed
    lanes = min(lanes, *map(sum, counts))
    first -= first % lanes
    stop = first + lanes * 60
    world = data.draw(st.sampled_from([w for w in range(1, lanes + 1) if lanes % w == 0]), label="world")

    def make() -> Mix:
        return Mix([Order(of_set, seed, lanes, block) for of_set in counts], tuple(weights))

    whole = read(make(), first, stop)
    shared: dict[int, Place] = {}  # as ranks read it that know nothing of one another
    for rank in range(world):
        mix = make()
        lists = rank_batches(first, stop, global_batch=lanes, micro_batch=1, rank=rank, num_ranks=world)
        shared |= {p: mix(p) for positions in lists for p in positions}
    assert [shared[p] for p in range(first, stop)] == whole

    orders = [Order(of_set, seed, lanes, block) for of_set in counts]
    in_lanes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for position, (a_set, shard, row) in zip(range(first, stop), whole, strict=True):
        in_lanes[a_set, position % lanes].append((shard, row))
    for (a_set, lane), places in in_lanes.items():
        # Whatever came before, the lane has read some number of the set's samples; it goes on with the next ones.
        before = taken_before(make(), first, a_set, lane)
        own = [orders[a_set](i * lanes + lane) for i in range(before, before + len(places))]
        assert places == own


def taken_before(mix: Mix, first: int, a_set: int, lane: int) -> int:
    """Samples of a set that a lane has read before a position: counted over one turn, and the turns counted."""
    lanes, turn = mix.lanes, len(mix._pattern)
    rows = first // lanes
    kinds = [mix(row * lanes + lane)[0] == a_set for row in range(turn)]
    return rows // turn * sum(kinds) + sum(kinds[: rows % turn])


def test_no_sample_is_lost_or_comes_twice_but_the_tail() -> None:
    """Whole epochs of each set, though the sets' epochs end at different places."""
    lanes, orders = 3, sets(3)
    mix = Mix(orders, (3, 1, 2))
    drawn: list[list[list[tuple[int, int]]]] = [[[] for _ in range(lanes)] for _ in orders]
    for position in range(3000):
        a_set, shard, row = mix(position)
        drawn[a_set][position % lanes].append((shard, row))
    for order, counts, in_lanes in zip(orders, UNEVEN, drawn, strict=False):
        every = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
        epochs = min(map(len, in_lanes)) // order.lane_length
        assert epochs >= 10
        for epoch in range(epochs):
            begin = epoch * order.lane_length
            places = [place for of_lane in in_lanes for place in of_lane[begin : begin + order.lane_length]]
            assert len(set(places)) == len(places) == len(every) - len(every) % lanes
            assert set(places) <= every


@pytest.mark.parametrize("shares", [(3, 1), (5, 8), (1, 1)])
def test_lanes_of_two_sets_keep_abreast(shares: tuple[float, ...]) -> None:
    """At any position no lane has read more than one sample of a set more than another: their epochs end together."""
    lanes = 6
    mix = Mix(sets(2, lanes), shares)
    taken = np.zeros((2, lanes), dtype=int)
    for position in range(200 * lanes):
        taken[mix(position)[0], position % lanes] += 1
        if position % lanes == lanes - 1:
            assert np.ptp(taken, axis=1).max() <= 1


# nothing but the position


def test_a_mix_does_not_depend_on_what_was_asked_before() -> None:
    weights = (0.5, 0.3, 0.2)
    mix = Mix(sets(3), weights)
    positions = np.random.default_rng(0).integers(0, FAR, 200).tolist()
    assert [mix(p) for p in positions] == [Mix(sets(3), weights)(p) for p in positions]


def test_seeds_differ() -> None:
    one, other = (Mix(sets(2, seed=seed), (3, 1)) for seed in (1, 2))
    assert [one(p)[0] for p in range(60)] == [other(p)[0] for p in range(60)]  # shares are not a matter of luck
    assert read(one, 0, 60) != read(other, 0, 60)
