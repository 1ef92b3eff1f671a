"""What a user can do wrong, said in one line: where, what came, what was wanted, what to do."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


class UsageError(Exception):
    """The same command will fail again until a setting or the data changes.  Programs exit with 2."""


class SampleError(UsageError):
    """A sample can't be used.  Only the rank that read it knows."""


class RunError(Exception):
    """The work stopped half-way for a reason that can be named (a full disk, a NaN).  Programs exit with 1."""


class PreemptedError(Exception):
    """The work was told to stop, and has saved all that it had.  Programs exit with 1."""


@contextmanager
def blame(where: str) -> Generator[None]:
    """Let a UsageError from the block begin with `where`, and make one of an OSError, ValueError or ImportError.

    A model library knows that a file is missing; only its caller knows which setting named the file.
    """
    try:
        yield
    except (UsageError, OSError, ValueError, ImportError) as error:
        said = str(error)
        kind = type(error) if isinstance(error, UsageError) else UsageError
        raise kind(said if said.startswith(where) else f"{where}: {said}") from error
