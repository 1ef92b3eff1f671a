"""Two ways to do the same, timed in pairs on a machine that others use too; and the lines that results consist of."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Way = Callable[[], Any]


def seconds(work: Way) -> float:
    """Of this process, all its threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def rounds(ways: Mapping[str, Way], num_rounds: int, rng: random.Random) -> list[dict[str, float]]:
    """Seconds of each way, once a round, in an order drawn anew for each."""
    found: list[dict[str, float]] = []
    for _ in range(num_rounds):
        order = rng.sample(list(ways), len(ways))
        took = {name: seconds(ways[name]) for name in order}
        found.append(took)
    return found


def ratio(found: list[dict[str, float]], one: str, other: str) -> float:
    """Median over the rounds of the time of `one` over that of `other`."""
    return statistics.median(took[one] / took[other] for took in found)


def spread(found: list[dict[str, float]], one: str, other: str) -> str:
    """The quartiles of the same."""
    low, _, high = statistics.quantiles([took[one] / took[other] for took in found], n=4)
    return f"{low:.3f} to {high:.3f}"


def say(figure: str, value: float, bound: str, holds: bool, unit: str) -> None:
    """One line of the result."""
    line = {"figure": figure, "value": float(f"{value:.4g}"), "bound": bound, "holds": holds, "unit": unit}
    print(json.dumps(line, ensure_ascii=False), flush=True)
