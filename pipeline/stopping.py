"""When a training stops before its end: a signal or a limit of time, noticed here and obeyed between two steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # a batch system's and a user's
REASONS = (*(one.name for one in SIGNALS), "the limit of time")  # by code, from 1


class Stopping:
    """Says whether this rank has been asked to stop.  A second SIGTERM or SIGINT ends the program where it stands."""

    def __init__(self, limit_s: float | None) -> None:
        """`limit_s`: seconds from now after which the training stops as if it had been told to; None: never."""
        self._end = None if limit_s is None else time.monotonic() + limit_s
        self._code = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        for one in SIGNALS:
            self._before[one] = signal.signal(one, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def code(self) -> int:
        """0: go on; else the place of the reason in REASONS, from 1."""
        if self._code == 0 and self._end is not None and time.monotonic() >= self._end:
            self._code = len(REASONS)
        return self._code

    def _note(self, number: int, frame: FrameType | None) -> None:
        one = signal.Signals(number)
        before: Callable[[int, FrameType | None], Any] | Any = self._before[one]
        if self._code and one in (signal.SIGTERM, signal.SIGINT) and callable(before):
            before(number, frame)
        self._code = self._code or SIGNALS.index(one) + 1
