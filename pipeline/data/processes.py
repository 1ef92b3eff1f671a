"""Work shared out over processes, its results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

from pipeline.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, *, chunk_items: int
) -> Iterator[Result]:
    """map(work, items), in order, done ahead by `workers` processes; never more results in memory than they need.

    `chunk_items`: what a process is given at once.  `workers` 0: this process does it all.  What `work` raises comes
    out at its item's turn; RunError where a process died.
    """
    chunks = [items[first : first + chunk_items] for first in range(0, len(items), chunk_items)]
    if workers == 0 or not chunks:
        yield from map(work, items)
        return
    # Forked: a process that started anew would first import all of this again.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(workers, len(chunks)), context, initializer=_end_with_parent) as pool:
        ahead: deque[Future[list[Result]]] = deque()
        try:
            for chunk in chunks:
                ahead.append(pool.submit(_work_all, work, chunk))
                if len(ahead) > 2 * workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        except BrokenExecutor:
            raise RunError(
                "a worker process was killed, most likely for want of memory; run it again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _work_all(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    return [work(item) for item in items]


def _end_with_parent() -> None:
    """A process of the pool: it leaves signals to the program, and does not outlive it."""
    for polite in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(polite, signal.SIG_IGN)

    def end() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=end, daemon=True).start()
