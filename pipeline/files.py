"""Files that are whole or absent: written aside, flushed to the disk, hashed, then renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast


@contextmanager
def whole(path: Path, writer: int = 0) -> Generator[Path]:
    """Give a path to write to; when the block ends well, that file is flushed and takes the name `path`.

    A reader sees the old content or the new, never a part of one.  When the block fails, nothing is left.
    The name aside is fixed, so that what a killed process left is overwritten by the next try; `writer` tells apart
    processes that may write the same file at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{writer}.part")
    try:
        yield aside
        flush(aside)
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextmanager
def whole_folder(path: Path) -> Generator[Path]:
    """Give the name of a folder to make; when the block ends well, it takes the place of the folder `path`."""
    aside, former = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.former")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
        for file in aside.rglob("*"):
            flush(file)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(former, ignore_errors=True)
    if path.exists():  # a folder can't be renamed over another: for a moment neither has the name
        path.rename(former)
    aside.rename(path)
    flush(path.parent)
    shutil.rmtree(former, ignore_errors=True)


def flush(path: Path) -> None:
    """fsync a file, or a folder after a rename in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str, writer: int = 0) -> None:
    """Write a whole text file (UTF-8)."""
    with whole(path, writer) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, writer: int = 0) -> None:
    """Write a whole JSON file; not-a-number is refused, as JSON has none."""
    write_text(path, json_text(value), writer)


def json_text(value: Any) -> str:
    """The text that `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def whole_lines(path: Path) -> list[str]:
    """The lines of a JSONL file, none where there is no file; the last one is dropped where a kill tore it."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return text.split("\n")[:-1]  # not splitlines, which splits at what JSON leaves in strings


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.  Raises OSError where it can't be read, ValueError where it is not one."""
    return as_object(path.read_bytes(), str(path))


def as_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object that bytes (UTF-8) hold.  Raises ValueError where they hold something else."""
    value: object = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a JSON object was wanted, {type(value).__name__} came")
    return cast(dict[str, Any], value)


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form: equal values give equal fingerprints."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
