"""How long does the order take to plan an epoch of a huge set, and to find any position of it?

python benchmarks/order_plan.py      (a few seconds)

100,000 shards of about 10,000 samples each, uneven, 2% of them empty.  Times are of this process (process_time).
Memory is what Python and NumPy ask for at most while plans are made (tracemalloc): the process's own size would also
count libraries, and free memory that the allocator keeps.  Every seek is cold: to a random position of an epoch that
was not asked for before, half of them by a new order, as a resumed run's is.
"""

from __future__ import annotations

import json
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.data.order import Mix, Order

NUM_SHARDS, LANES, BLOCK = 100_000, 240, 1024
PLANS, SEEKS = 11, 100
MOST_MS, MOST_MB = 100, 50
FAR = 1000  # epochs that positions are drawn from
READ = 8  # positions read at each place: enough for both sets of the mix


def uneven_counts(seed: int) -> list[int]:
    """Samples of each shard: 9,210 to 11,210, or none."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(9_210, 11_211, NUM_SHARDS)
    counts[rng.random(NUM_SHARDS) < 0.02] = 0
    return counts.tolist()


def milliseconds(work: Callable[[], Any]) -> float:
    """Of this process."""
    begin = time.process_time()
    work()
    return 1e3 * (time.process_time() - begin)


def read(order: Order | Mix, position: int) -> None:
    """The first samples from a position on."""
    for offset in range(READ):
        order(position + offset)


def seeks(build: Callable[[], Order | Mix], epoch_length: int) -> list[float]:
    """Milliseconds of each of many cold seeks; where the order is new, building it is not counted: a plan is."""
    rng, kept, took = random.Random(0), build(), list[float]()
    for number, epoch in enumerate(rng.sample(range(FAR), SEEKS)):
        position = epoch * epoch_length + rng.randrange(epoch_length)
        order = kept if number % 2 else build()
        took.append(milliseconds(lambda order=order, position=position: read(order, position)))
    return took


def say(figure: str, value: float, most: float, unit: str) -> None:
    """One line of the result."""
    line = {"figure": figure, "value": round(value, 2), "bound": f"<= {most}", "holds": value <= most, "unit": unit}
    print(json.dumps(line))


def measure(name: str, build: Callable[[], Order | Mix], epoch_length: int) -> None:
    """A plan's time and memory, and what a seek takes."""
    plans = [milliseconds(lambda: read(build(), 0)) for _ in range(PLANS)]
    tracemalloc.start()
    order = build()
    read(order, 0)
    read(order, epoch_length)  # the next epoch's plan is kept beside this one's
    peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    cold = seeks(build, epoch_length)
    say(f"{name}: build and first samples, median of {PLANS}", statistics.median(plans), MOST_MS, "ms")
    say(f"{name}: memory at most, for two epochs' plans", peak_mb, MOST_MB, "MB")
    say(f"{name}: seek in another epoch, median of {SEEKS}", statistics.median(cold), MOST_MS, "ms")
    say(f"{name}: seek in another epoch, longest of {SEEKS}", max(cold), MOST_MS, "ms")


def main() -> None:
    """One set, then two mixed 3 : 1."""
    one, other = uneven_counts(0), uneven_counts(1)

    def build_one() -> Order:
        return Order(one, 0, LANES, BLOCK)

    def build_mix() -> Mix:
        return Mix([build_one(), Order(other, 0, LANES, BLOCK)], (0.75, 0.25))

    length = build_one().epoch_length
    measure(f"1e5 shards, {sum(one) / 1e9:.2f}e9 samples", build_one, length)
    measure(f"a mix of two such sets, {(sum(one) + sum(other)) / 1e9:.2f}e9 samples", build_mix, 2 * length)


if __name__ == "__main__":
    main()
