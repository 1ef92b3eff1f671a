"""A run's JSONL files as they lie there, also while somebody writes them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.reporting.thin import Row


@dataclass(frozen=True)
class Table:
    """metrics.jsonl by column: one value for each row, NaN where the row has none."""

    step: Row = field(default_factory=lambda: np.empty(0))
    columns: dict[str, Row] = field(default_factory=dict[str, Row])
    num_unread: int = 0  # lines that are no JSON object with a step

    def __len__(self) -> int:
        return len(self.step)

    def training_s(self, global_batch_images: int) -> float:
        """Seconds that the logged steps took, by the throughput that each row tells of the steps before it."""
        throughput = self.columns.get("images_per_s")
        if throughput is None:
            return 0.0
        there = ~np.isnan(throughput) & (throughput > 0)
        num_steps = np.diff(self.step[there], prepend=0)
        return float((np.maximum(num_steps, 0) * global_batch_images / throughput[there]).sum())


def read_objects(path: Path) -> Iterator[dict[str, Any] | None]:
    """The JSON objects of a JSONL file, line by line; None for a line that is none, nothing for a torn last one."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        for line in file:
            if not line.endswith(b"\n"):
                return  # half written: by a process that goes on, or was killed there
            try:
                value: object = json.loads(line)
            except ValueError:
                value = None
            yield value if isinstance(value, dict) else None


def read_table(path: Path) -> Table:
    """A metrics.jsonl, one column after another; a million rows take seconds."""
    step, columns, num_unread = array("d"), dict[str, "array[float]"](), 0
    for row in read_objects(path):
        at = None if row is None else row.get("step")
        if row is None or not isinstance(at, int | float) or not isfinite(at):
            num_unread += 1
            continue
        before = len(step)
        step.append(at)
        for name, value in row.items():
            if name == "step" or not isinstance(value, int | float) or not isfinite(value):
                continue
            column = columns.get(name)
            if column is None:
                column = columns[name] = array("d")
            if len(column) < before:
                column.extend([nan] * (before - len(column)))
            column.append(value)
    for column in columns.values():
        column.extend([nan] * (len(step) - len(column)))
    order = np.argsort(np.array(step), kind="stable")  # rows of figures found beside a step come a little late
    return Table(np.array(step)[order], {name: np.array(column)[order] for name, column in columns.items()}, num_unread)
