"""Work over processes gives what a plain map gives, in its order."""

import os
import time

import pytest

from pipeline.data.processes import in_order
from pipeline.errors import RunError


def slow_first(number: int) -> int:
    """Its square; the first ones take longest."""
    time.sleep(0.02 if number < 2 else 0)
    return number * number


def refuse_five(number: int) -> int:
    if number == 5:
        raise ValueError("five came")
    return number


def die_at_five(number: int) -> int:
    if number == 5:
        os._exit(1)
    return number


@pytest.mark.parametrize("workers", [0, 1, 3, 50])
@pytest.mark.parametrize("chunk_items", [1, 4, 100])
def test_results_come_in_order(workers: int, chunk_items: int) -> None:
    items = list(range(11))
    assert list(in_order(slow_first, items, workers, chunk_items=chunk_items)) == [i * i for i in items]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_items_no_results(workers: int) -> None:
    assert list(in_order(slow_first, [], workers, chunk_items=1)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_at_its_turn(workers: int) -> None:
    results = in_order(refuse_five, list(range(9)), workers, chunk_items=1)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="five came"):
        next(results)


def test_a_process_that_dies_ends_the_work() -> None:
    with pytest.raises(RunError, match="a worker process was killed, most likely for want of memory"):
        list(in_order(die_at_five, list(range(9)), 2, chunk_items=1))
