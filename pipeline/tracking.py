"""What a run writes down: metrics.jsonl, evaluations.jsonl; TensorBoard and W&B through Accelerate beside them."""

from __future__ import annotations

import fcntl
import json
import secrets
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.tracking import TensorBoardTracker, WandBTracker
from accelerate.utils import is_wandb_available

from pipeline import files
from pipeline.config_evaluation import TrackingConfig
from pipeline.errors import UsageError, blame

EVALUATIONS = "evaluations.jsonl"
DRAWN_BY = ("num_inference_steps", "num_images", "asked")
ROW_KEYS = ("step", "ema", "guidance_scale", *DRAWN_BY, "references", "held_out")  # whose row it is

Row = dict[str, Any]


class Tracker:
    """Rows of numbers by step, written by rank 0 alone.  A resumed run goes on where its checkpoint was."""

    def __init__(self, folder: Path, config: TrackingConfig, *, after_step: int, is_main: bool) -> None:
        """Rows later than `after_step` belong to work that was lost: they are cut off.

        Raises UsageError, on every rank, where Weights & Biases is asked for and not installed.
        """
        self.file, self.boards = None, list[Any]()
        if config.wandb is not None and not is_wandb_available():
            raise UsageError(
                "tracking.wandb: its package is not installed; pip install latent-diffusion-pipeline[wandb], or null"
            )
        if not is_main:
            return
        path = folder / "metrics.jsonl"
        pairs = zip(files.whole_lines(path), read_rows(path), strict=True)
        files.write_text(path, "".join(f"{line}\n" for line, row in pairs if row["step"] <= after_step))
        forget_evaluations(folder, after_step)
        self.file = path.open("a", encoding="utf-8")
        if config.tensorboard:
            self.boards.append(TensorBoardTracker("tensorboard", str(folder), purge_step=after_step + 1))
        if config.wandb is not None:
            self.boards.append(_wandb(folder, config.wandb))
        for board in self.boards:
            board.start()

    def write(self, row: Row) -> None:
        """Add a row; `step` is one of its numbers."""
        if self.file is not None:
            self.file.write(json.dumps(row, allow_nan=False) + "\n")
            self.file.flush()
        for board in self.boards:
            board.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def close(self) -> None:
        """Flush what is open."""
        if self.file is not None:
            self.file.close()
        for board in self.boards:
            board.finish()


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file, each with its step.  Raises UsageError where a line is broken."""
    rows: list[Row] = []
    for number, line in enumerate(files.whole_lines(path), start=1):
        with blame(f"{path}: line {number}: a JSON object with a step was wanted; mend it, or remove it"):
            rows.append(files.as_object(line.encode(), "the line"))
            if "step" not in rows[-1]:
                raise ValueError("it has no step")
    return rows


def _wandb(folder: Path, project: str) -> Any:
    """Accelerate's tracker for one run there, whose id lies in the folder.

    Rows of steps that it has already, which a resumed run takes again alike, W&B itself passes over.
    """
    named = folder / "wandb-id.txt"
    if not named.exists():
        files.write_text(named, secrets.token_hex(8))
    return WandBTracker(project, id=named.read_text(), name=folder.name, dir=str(folder), resume="allow")


# evaluations.jsonl --------------------------------------------------------------------------------


def read_evaluations(run: Path) -> list[Row]:
    """The rows of RUN/evaluations.jsonl, in order of step and guidance."""
    return read_rows(run / EVALUATIONS)


def write_evaluation(run: Path, row: Row) -> None:
    """Add a row to RUN/evaluations.jsonl, in the place of one of the same model, drawn and compared alike."""
    with _alone(run):
        kept = [each for each in read_evaluations(run) if any(each.get(key) != row[key] for key in ROW_KEYS)]
        _write(run, sorted([*kept, row], key=lambda each: (each["step"], each["guidance_scale"])))


def forget_evaluations(run: Path, after_step: int) -> None:
    """Drop the rows of later steps: they belong to work that was lost."""
    if (run / EVALUATIONS).exists():
        with _alone(run):
            _write(run, [row for row in read_evaluations(run) if row["step"] <= after_step])


def _write(run: Path, rows: Sequence[Row]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    files.write_text(run / EVALUATIONS, "".join(lines))


@contextmanager
def _alone(run: Path) -> Generator[None]:
    """Let no other process change the file: a person may evaluate a run that trains."""
    with (run / f".{EVALUATIONS}.lock").open("a") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
