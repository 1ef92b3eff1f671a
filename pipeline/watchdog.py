"""A run that hangs says where: when no step ends for too long, every rank writes down the stacks of all its threads."""

from __future__ import annotations

import faulthandler
import math
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline import program

CHECK_S = 1.0
HUNG = 1  # exit code


class Watchdog:
    """Ends this process with its stacks in RUN/stacks-RANK.txt when `fed` was not called for `limit_s` seconds."""

    def __init__(self, run: Path, rank: int, limit_s: float | None, tell: Callable[[str], None]) -> None:
        """`limit_s` None: never.  `tell`: is given the reason before the process ends."""
        self.path, self.limit_s, self.tell = run / f"stacks-{rank}.txt", limit_s, tell
        self._last = time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.limit_s is not None:
            self.fed()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def fed(self) -> None:
        """Something went on."""
        self._last = time.monotonic()

    @contextmanager
    def suspended(self) -> Generator[None]:
        """For honest work of unknown length, such as scores of 50,000 images that one rank counts for all.

        Given up with it: a rank that hangs in here is noticed by nobody before the ranks' patience with one another
        (engine.PATIENCE) or the job's own limit ends.
        """
        self._last = math.inf
        try:
            yield
        finally:
            self.fed()

    def _watch(self) -> None:
        assert self.limit_s is not None
        while not self._over.wait(min(CHECK_S, self.limit_s / 4)):
            silent_s = time.monotonic() - self._last
            if silent_s < self.limit_s:
                continue
            with self.path.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            reason = f"no step has ended for {silent_s:.0f} s (train.hang_timeout_s={self.limit_s:g})"
            with suppress(OSError):
                self.tell(reason)
            program.say(
                f"error: {reason}; what every thread was doing is in {self.path}. Run the same command again and it "
                "goes on"
            )
            os._exit(HUNG)
