"""Tables of image paths with captions, labels or both: CSV, JSONL and Parquet, told by the name's end."""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError

Cells = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read; others are left alone."""

    path: str = "path"
    caption: str = "caption"
    label: str = "label"


@dataclass(frozen=True)
class Row:
    """One image as a table names it."""

    number: int  # counted from 1; in a CSV the line of names is not counted
    path: str
    caption: str | None  # None: the table has no captions
    label: int | str | None  # None: the table has no labels


def read_table(table: Path, columns: Columns) -> list[Row]:
    """Every row of a table.  Raises UsageError naming the table, and the row where it is one row's fault."""
    match table.suffix.lower():
        case ".csv":
            numbered = _csv(table)
        case ".jsonl":
            numbered = _jsonl(table)
        case ".parquet":
            numbered = _parquet(table)
        case suffix:
            raise UsageError(f"{table}: {suffix or 'no ending'} came, .csv, .jsonl or .parquet was wanted")
    rows: list[Row] = []
    try:
        has_caption = has_label = False
        for number, cells in numbered:
            if not rows:  # the first row tells which columns there are
                has_caption, has_label = columns.caption in cells, columns.label in cells
                _check_columns(table, cells, columns)
            rows.append(_row(table, number, cells, columns, has_caption=has_caption, has_label=has_label))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{table}: not readable ({error})") from None
    if len(rows) < 2:
        raise UsageError(f"{table}: {len(rows)} rows came, at least 2 were wanted")
    return rows


def number_labels(table: Path, rows: list[Row]) -> tuple[list[int | None], list[str]]:
    """A class id for each row, and the names that were numbered, sorted; no names where the labels are integers.

    Raises UsageError where some labels are integers and some are names.
    """
    first = rows[0]
    for row in rows:
        if type(row.label) is not type(first.label):
            raise UsageError(
                f"{table}: row {row.number}: label {row.label!r} came, row {first.number} has {first.label!r}: "
                f"integers or names were wanted, not both"
            )
    names = sorted({row.label for row in rows if isinstance(row.label, str)})
    ids = {name: i for i, name in enumerate(names)}
    return [ids[row.label] if isinstance(row.label, str) else row.label for row in rows], names


def _check_columns(table: Path, cells: Cells, columns: Columns) -> None:
    told = ", ".join(str(name) for name in cells) or "none"
    if columns.path not in cells:
        raise UsageError(f"{table}: no column {columns.path!r}; its columns: {told}")
    if columns.caption not in cells and columns.label not in cells:
        raise UsageError(f"{table}: no column {columns.caption!r} and no {columns.label!r}; its columns: {told}")


def _row(table: Path, number: int, cells: Cells, columns: Columns, *, has_caption: bool, has_label: bool) -> Row:
    try:
        path = cells.get(columns.path)
        if not isinstance(path, str) or not path or "\0" in path:
            raise ValueError(f"{columns.path} {path!r} came, the path of an image was wanted")
        for column, expected in ((columns.caption, has_caption), (columns.label, has_label)):
            if column in cells and not expected:
                raise ValueError(f"{column} came, which the first row does not have")
        caption = cells.get(columns.caption)
        if has_caption and not isinstance(caption, str):
            raise ValueError(f"{columns.caption} {caption!r} came, a text was wanted")
        label = _label(columns.label, cells.get(columns.label)) if has_label else None
    except ValueError as error:
        raise UsageError(f"{table}: row {number}: {error}") from None
    return Row(number, path, caption if has_caption else None, label)


def _label(column: str, label: Any) -> int | str:
    if isinstance(label, str):
        label = label.strip()
        if re.fullmatch(r"[+-]?[0-9]+", label):
            label = int(label)
    if isinstance(label, int) and not isinstance(label, bool) and label >= 0:
        return label
    # 3.0 in a CSV is an integer that met a missing value on its way, not a name.
    if isinstance(label, str) and label and not re.fullmatch(r"[+-]?[0-9]*\.[0-9]*|nan", label.lower()):
        return label
    raise ValueError(f"{column} {label!r} came, an integer of 0 or more, or a name, was wanted")


def _csv(table: Path) -> Iterator[tuple[int, Cells]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        number = 0
        try:
            for number, cells in enumerate(reader, start=1):
                if None in cells or None in cells.values():  # too many, too few
                    raise UsageError(
                        f"{table}: row {number}: {_num_fields(cells)} fields came, {len(reader.fieldnames or ())} "
                        f"were wanted"
                    )
                yield number, cells
        except csv.Error as error:
            raise UsageError(f"{table}: row {number + 1}: not CSV: {error}") from None


def _num_fields(cells: Cells) -> int:
    return sum(len(value) if isinstance(value, list) else value is not None for value in cells.values())


def _jsonl(table: Path) -> Iterator[tuple[int, Cells]]:
    with table.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{table}: row {number}: not JSON: {error}") from None
            if not isinstance(cells, dict):
                raise UsageError(f"{table}: row {number}: {type(cells).__name__} came, a JSON object was wanted")
            yield number, cells


def _parquet(table: Path) -> Iterator[tuple[int, Cells]]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UsageError(
            f"{table}: pyarrow is not installed, which reads Parquet; run: pip install pyarrow, or write a CSV or JSONL"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(table) as opened:
            for batch in opened.iter_batches():
                for cells in batch.to_pylist():
                    number += 1
                    yield number, cells
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise UsageError(f"{table}: not readable Parquet ({error})") from None
