"""What a run writes down: metrics.jsonl first, TensorBoard through Accelerate's tracker beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline import files


class Tracker:
    """Rows of numbers by step, written by rank 0 alone.  A resumed run goes on where its checkpoint was."""

    def __init__(self, folder: Path, *, after_step: int, tensorboard: bool, is_main: bool) -> None:
        """Rows later than `after_step` belong to work that was lost: they are cut off."""
        self.file = self.board = None
        if not is_main:
            return
        path = folder / "metrics.jsonl"
        keep = [line for line in files.whole_lines(path) if json.loads(line)["step"] <= after_step]
        files.write_text(path, "".join(f"{line}\n" for line in keep))
        self.file = path.open("a", encoding="utf-8")
        if tensorboard:
            from accelerate.tracking import TensorBoardTracker

            self.board = TensorBoardTracker("tensorboard", str(folder), purge_step=after_step + 1)
            self.board.start()

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; `step` is one of its numbers."""
        if self.file is not None:
            self.file.write(json.dumps(row, allow_nan=False) + "\n")
            self.file.flush()
        if self.board is not None:
            self.board.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        """Flush what is open."""
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.finish()
