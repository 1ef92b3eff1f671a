"""A lock is one process's, until that ends in whatever way."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from pipeline.locks import Locks

HOLD = """
import sys, time
from pathlib import Path
from pipeline.locks import Locks
with Locks(Path(sys.argv[1])).alone(int(sys.argv[2])) as taken:
    print(taken, flush=True)
    time.sleep(float(sys.argv[3]))
"""


def hold(path: Path, number: int, seconds: float = 60) -> tuple[subprocess.Popen[str], bool]:
    """A process that has a lock, and whether it got it."""
    words = [sys.executable, "-c", HOLD, str(path), str(number), str(seconds)]
    other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    return other, other.stdout.readline() == "True\n"


def test_one_process_has_it_until_it_is_killed(tmp_path: Path) -> None:
    locks = Locks(tmp_path / "lock")
    other, taken = hold(tmp_path / "lock", 5)
    assert taken
    with locks.alone(5) as mine:
        assert not mine
    with locks.alone(6) as mine:
        assert mine
    other.kill()
    other.wait()
    with locks.alone(5) as mine:
        assert mine
        refused, taken = hold(tmp_path / "lock", 5, 0)
        assert not taken
        refused.wait()
    freed, taken = hold(tmp_path / "lock", 5, 0)
    assert taken
    freed.wait()


def test_it_waits(tmp_path: Path) -> None:
    other, _ = hold(tmp_path / "lock", 0, 1.0)
    began = time.monotonic()
    with Locks(tmp_path / "lock").alone(0, wait=True) as mine:
        assert mine and time.monotonic() - began > 0.2
    other.wait()


def test_a_removed_file_locks_nothing(tmp_path: Path) -> None:
    """Who has opened it before takes the lock on the file that is there."""
    early, late = Locks(tmp_path / "lock"), Locks(tmp_path / "lock")
    with early.alone(1):
        pass
    with late.alone(0, wait=True):
        late.remove()
    assert not (tmp_path / "lock").exists()
    with early.alone(1) as mine:
        assert mine and (tmp_path / "lock").exists()
        other, taken = hold(tmp_path / "lock", 1, 0)
        assert not taken
        other.wait()


def test_without_locks_all_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, "No locks available")

    locks = Locks(tmp_path / "lock")
    monkeypatch.setattr(fcntl, "lockf", refuse)
    for wait in (False, True):
        with locks.alone(1, wait=wait) as mine:
            assert mine and not locks.work
