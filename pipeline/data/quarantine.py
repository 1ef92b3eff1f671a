"""Samples that can't be read: each keeps its slot, is written down, and too many of them end the run.

They are counted in order of position, whatever rank met them, so a run that is resumed, or resumed over another number
of ranks, counts and ends as the undisturbed one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.config import QuarantineConfig
from pipeline.errors import UsageError

NAME = "quarantine.jsonl"


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read, and what took its slot."""

    position: int
    shard: str
    key: str
    reason: str
    substitute: str | None = None  # the key of the sample that was read instead; None: its slot was left out

    def to_json(self) -> dict[str, Any]:
        """As JSON values, without a substitute where there is none."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Count:
    """How many samples were replaced so far, and how many of them in a row up to position `last`."""

    total: int = 0
    consecutive: int = 0
    last: int = -1

    def after(self, position: int) -> Count:
        """With one more at a later position."""
        in_a_row = self.consecutive + 1 if position == self.last + 1 else 1
        return Count(self.total + 1, in_a_row, position)


class Quarantine:
    """FOLDER/quarantine.jsonl and the budgets.  Every rank counts, `is_main` writes."""

    def __init__(
        self, folder: Path, budget: QuarantineConfig, *, position: int, count: Count, is_main: bool = True
    ) -> None:
        """Go on at `position` with the count that a checkpoint has: rows from there on belong to work that was lost."""
        self.path, self.budget, self.count, self.is_main = folder / NAME, budget, count, is_main
        if is_main and self.path.exists():
            kept = [row for row in files.whole_lines(self.path) if json.loads(row)["position"] < position]
            files.write_text(self.path, "".join(f"{row}\n" for row in kept))

    def add(self, found: list[BadSample]) -> None:
        """Write down and count.  Raises UsageError at the first one beyond a budget.

        `found`: all that were met at the positions since the last call, in any order.
        """
        for bad in sorted(found, key=lambda bad: bad.position):
            if self.is_main:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(bad.to_json(), ensure_ascii=False) + "\n")
            self.count = self.count.after(bad.position)
            self._check(bad)

    def _check(self, bad: BadSample) -> None:
        for key, count, told in (
            ("max_consecutive", self.count.consecutive, "in a row"),
            ("max_total", self.count.total, "in all"),
        ):
            most = getattr(self.budget, key)
            if count > most:
                raise UsageError(
                    f"data.quarantine.{key}: {count} samples {told} could not be read, up to position "
                    f"{bad.position}; at most {most} may. The last: {bad.shard}: sample {bad.key!r}: {bad.reason}. "
                    f"All are in {self.path}: mend or leave out these samples, or allow more"
                )
