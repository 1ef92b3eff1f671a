"""How a program starts and ends: arguments in; one line per error, status.json and an exit code out."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from pipeline.config import Config
from pipeline.config_file import find_config, load_config, raw_config
from pipeline.engine import leave
from pipeline.errors import PreemptedError, RunError, SampleError, UsageError
from pipeline.run_folder import STATUS, InUseError, State, in_use, launched_rank, read_status, write_status
from pipeline.stopping import SIGNALS

DONE, FAILED, USAGE = 0, 1, 2
LET_MAIN_SPEAK_S = 3.0  # seconds that other ranks wait before they end for a reason that rank 0 says
Folder = Callable[[dict[str, Any]], Any]  # raw config → the folder whose status.json tells this program's outcome


class Parser(argparse.ArgumentParser):
    """argparse that says one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """Print one line; exit with 2."""
        if launched_rank() == 0:
            say(f"{self.prog}: {message}; --help shows what is known")
        raise SystemExit(USAGE)


def parser(verb: str, purpose: str) -> Parser:
    """A verb's parser.  `purpose`: the program's docstring."""
    made = Parser(
        prog=f"python -m pipeline {verb}",
        description=purpose,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a new option would give another meaning to what people wrote
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def config_parser(verb: str, purpose: str) -> Parser:
    """A verb's parser that takes CONFIG.yaml and overrides."""
    made = parser(verb, purpose)
    made.add_argument("config", metavar="CONFIG.yaml", help="the run's settings, or the name of a shipped file")
    made.add_argument(
        "overrides", nargs="*", default=[], metavar="dotted.key=value", help="settings laid over the file's"
    )
    return made


def run_config(
    made: Parser,
    argv: Sequence[str] | None,
    story: Callable[[Config, argparse.Namespace], None],
    folder: Folder | None,
    status_name: Callable[[argparse.Namespace], str] = lambda args: STATUS,
) -> int:
    """Parse, load the config, tell the story; the exit code.

    `folder`: where its status.json lies, if it has one; `status_name`: of that file, where it goes by another.
    """
    args = _parse(made, argv)
    if isinstance(args, int):
        return args
    where: list[Path] = []

    def work() -> None:
        if folder is not None and launched_rank() == 0:  # every rank finds the same wrong: one writes it down
            where.extend(found / status_name(args) for found in _status_folder(args, folder))
        config = load_config(args.config, args.overrides)
        if folder is not None:
            where[:] = [Path(found) / status_name(args) for found in [folder(config.model_dump())] if found]
        story(config, args)

    return _guard(work, args.debug, where)


def run_plain(made: Parser, argv: Sequence[str] | None, story: Callable[[argparse.Namespace], None]) -> int:
    """Parse and tell the story of a program that needs no config; the exit code."""
    args = _parse(made, argv)
    return args if isinstance(args, int) else _guard(lambda: story(args), args.debug, [])


def end(code: int) -> NoReturn:
    """Leave the process: the last call of a program started as a file."""
    leave(code)


def say(line: str) -> None:
    """One line to the person at the terminal (progress bars share this stream)."""
    print(line, file=sys.stderr, flush=True)


def _parse(made: Parser, argv: Sequence[str] | None) -> argparse.Namespace | int:
    try:
        return made.parse_intermixed_args(argv)
    except SystemExit as wish:
        return int(wish.code or 0)


def _status_folder(args: argparse.Namespace, folder: Folder) -> list[Path]:
    """The run's folder, found before the schema has been checked, so that a usage error can be told there."""
    try:
        found = folder(raw_config(find_config(args.config), args.overrides))
    except (UsageError, KeyError, TypeError, AttributeError):  # the schema will tell
        return []
    return [Path(found)] if isinstance(found, str) and found else []


def _guard(work: Callable[[], None], debug: bool, status: list[Path]) -> int:
    """Run; turn how it ends into an exit code, one line per error, and a status."""
    ender = _ender(status, os.getpid())
    before = {polite: signal.signal(polite, ender) for polite in SIGNALS}
    try:
        work()
    except InUseError as error:
        return _tell(error, USAGE, debug)
    except UsageError as error:
        _record(status, "usage", str(error), error)
        return _tell(error, USAGE, debug)
    except PreemptedError as error:
        _record(status, "preempted", str(error), error)
        if launched_rank() == 0:
            say(f"stopped by {error}; all is saved: run the same command again and it goes on")
        return FAILED
    except Exception as error:
        named = isinstance(error, RunError)
        _record(status, "failed", str(error) if named else f"{type(error).__name__}: {error}", error)
        if status and not named:
            with suppress(OSError):
                told = status[0].with_name(f"traceback-{launched_rank()}.txt")
                told.write_text(traceback.format_exc(), encoding="utf-8")
        return _tell(error, FAILED, debug)
    finally:
        for polite, handler in before.items():
            signal.signal(polite, handler)
    return DONE


def _tell(error: Exception, code: int, debug: bool = False) -> int:
    """Say an error once over all ranks."""
    if debug:
        traceback.print_exception(error)
    told_by_main = _is_echo(error) or (isinstance(error, UsageError) and not isinstance(error, SampleError))
    if told_by_main and launched_rank() != 0:
        time.sleep(LET_MAIN_SPEAK_S)  # a launcher ends all ranks when the first of them does
        return code
    named = isinstance(error, UsageError | RunError)
    prefix = "error" if launched_rank() == 0 else f"error: rank {launched_rank()}"
    for line in str(error).splitlines() or [""]:
        say(f"{prefix}: {line if named else f'{type(error).__name__}: {line}'}")
        if not named:
            break
    return code


def _record(status: list[Path], state: State, reason: str, error: Exception | None = None) -> None:
    """Write the status, unless that is for another to do: rank 0, or the live process that has the folder."""
    if not status or _is_echo(error) or (launched_rank() == 0 and in_use(status[0].parent)):
        return
    try:
        write_status(status[0].parent, state, reason=reason, name=status[0].name)
    except OSError as problem:
        if str(status[0].parent) not in reason:  # else the error is about the folder itself
            say(f"error: {status[0]} could not be written: {problem}")


def _is_echo(error: Exception | None) -> bool:
    """Whether rank 0 raised this first (Engine.main_does)."""
    return "echo" in getattr(error, "__notes__", ())


def _ender(status: list[Path], program: int) -> Callable[[int, object], NoReturn]:
    """A signal handler that ends the program where it stands, as a kill would, but says so.

    Nothing is unwound: whatever is being written is whole or absent without that.
    """

    def end_here(signum: int, frame: object) -> NoReturn:
        if os.getpid() == program and launched_rank() == 0:
            if status and read_status(status[0].parent, status[0].name).get("state") == "running":
                _record(status, "preempted", signal.Signals(signum).name)
            say("\ninterrupted; run the same command again and it goes on")
        os._exit(FAILED)

    return end_here
