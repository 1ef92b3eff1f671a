"""Work in portions, shared out over the ranks, that can be stopped between two rounds of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from pipeline.engine import ERRORS, Engine
from pipeline.errors import RunError, UsageError

Portion = TypeVar("Portion")
GoOn = Callable[[], bool]  # a collective: whether all ranks go on


def in_portions(
    engine: Engine, portions: Sequence[Portion], work: Callable[[Portion], Any], go_on: GoOn, bar: tqdm[Any] | None
) -> list[Any] | None:
    """work(portion) of each, JSON, in order, on every rank; None where the work was stopped.

    A UsageError or RunError on one rank is raised on all.  `go_on` is asked after each round; `bar` moves by 1.
    """
    found: list[Any] = []
    for first in range(0, len(portions), engine.num_ranks):
        at_once = portions[first : first + engine.num_ranks]
        answer: dict[str, Any] = {}
        error: Exception | None = None
        if engine.rank < len(at_once):
            try:
                answer = {"value": work(at_once[engine.rank])}
            except (UsageError, RunError) as caught:
                error, answer = caught, {"error": type(caught).__name__, "message": str(caught)}
        for rank, each in enumerate(engine.gather(answer)[: len(at_once)]):
            if "error" in each:
                told = ERRORS.get(each["error"], RunError)(each["message"])
                raise error if error is not None and rank == engine.rank else engine.common(told)
            found.append(each["value"])
        if bar is not None:
            bar.update(len(at_once))
        if first + len(at_once) < len(portions) and not go_on():
            return None
    return found
