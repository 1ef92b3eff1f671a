"""Which live process works on what: locks that are free again when a process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


class Locks:
    """Numbered locks, each a byte of one file; they hold between nodes where the file system's record locks do.

    Where a file system has no locks every one is had at once, and `work` is False.  A process may have one object for a
    file, not two: closing one would free the locks of the other.
    """

    def __init__(self, path: Path) -> None:
        """The file is made when a lock is first asked for."""
        self.path = path
        self.work = True
        self._descriptor: int | None = None

    @contextmanager
    def alone(self, number: int, *, wait: bool = False) -> Generator[bool]:
        """Whether this process has the lock until the block ends.  `wait`: until it has."""
        taken = self._take(number, wait)
        try:
            yield taken
        finally:
            if taken and self.work and self._descriptor is not None:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)

    def remove(self) -> None:
        """Remove the file, when nothing is left to be locked.  Who waits for it makes another."""
        self.path.unlink(missing_ok=True)
        self._close()

    def _take(self, number: int, wait: bool) -> bool:
        while True:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
            except (BlockingIOError, PermissionError):
                return False
            except OSError:
                self.work = False
                return True
            if self._is_there():
                return True
            self._close()  # removed while we waited

    def _is_there(self) -> bool:
        assert self._descriptor is not None
        with suppress(FileNotFoundError):
            return os.path.samestat(self.path.stat(), os.fstat(self._descriptor))
        return False

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None
