"""Rows and curves: a resumed run goes on with each, and none overlaps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config_evaluation import TrackingConfig
from pipeline.errors import UsageError
from pipeline.tracking import Tracker, read_evaluations, write_evaluation


def write(folder: Path, config: TrackingConfig, *, after_step: int, steps: range, loss: float = 1.0) -> None:
    tracker = Tracker(folder, config, after_step=after_step, is_main=True)
    for step in steps:
        tracker.write({"step": step, "loss": loss / step})
    tracker.close()


def row_of(step: int, **other: Any) -> dict[str, Any]:
    row = {"step": step, "ema": "a", "guidance_scale": 1.0, "num_inference_steps": 5, "num_images": 10}
    row |= {"asked": "w", "validation_images": "v", "held_out": "h"}
    return row | {"references": {"net": "f"}, "scores": {"net/fid": float(step)}} | other


def test_a_resumed_run_has_each_step_once_in_rows_and_on_the_board(tmp_path: Path) -> None:
    """Killed after step 7, it goes on from a checkpoint of step 4; what came between belongs to nobody."""
    config = TrackingConfig(tensorboard=True)
    write(tmp_path, config, after_step=0, steps=range(1, 8), loss=100.0)
    write(tmp_path, config, after_step=4, steps=range(5, 10))
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == list(range(1, 10))
    assert [row["loss"] for row in found] == [*(100 / step for step in range(1, 5)), *(1 / s for s in range(5, 10))]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    events = [(event.step, event.value) for event in board.Scalars("loss")]
    assert events == [(row["step"], pytest.approx(row["loss"])) for row in found]


def test_evaluations_of_lost_steps_are_dropped_and_one_of_the_same_model_is_replaced(tmp_path: Path) -> None:
    for step in (8, 4):
        write_evaluation(tmp_path, row_of(step))
    write_evaluation(tmp_path, row_of(4, guidance_scale=2.0))
    write_evaluation(tmp_path, row_of(4, scores={"net/fid": 0.0}))
    found = read_evaluations(tmp_path)
    assert [(row["step"], row["guidance_scale"]) for row in found] == [(4, 1.0), (4, 2.0), (8, 1.0)]
    assert found[0]["scores"] == {"net/fid": 0.0}
    write_evaluation(tmp_path, row_of(4, num_images=20))
    write_evaluation(tmp_path, row_of(4, references={"net": "0"}))
    write_evaluation(tmp_path, row_of(4, asked="other wishes"))
    write_evaluation(tmp_path, row_of(4, held_out="other images"))
    assert len(read_evaluations(tmp_path)) == 7, "others are not replaced"
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 9')  # torn by a kill
    write(tmp_path, TrackingConfig(tensorboard=False), after_step=7, steps=range(8, 9))
    assert [row["step"] for row in read_evaluations(tmp_path)] == [4] * 6


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackingConfig(), after_step=0, is_main=False)
    tracker.write({"step": 1, "loss": 1.0})
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_weights_and_biases_goes_on_with_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: what would be sent lies in the folder."""
    config = TrackingConfig(tensorboard=False, wandb="demo")
    PartialState(cpu=True)  # as every program has it
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(tmp_path, config, after_step=0, steps=range(1, 8))
    write(tmp_path, config, after_step=4, steps=range(5, 10))
    name = (tmp_path / "wandb-id.txt").read_text()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert runs and {path.name.rpartition("-")[2] for path in runs} == {name}
    assert len([*(tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb")]) == len(runs)


def test_weights_and_biases_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(UsageError, match=r"tracking\.wandb: its package is not installed; pip install"):
        write(tmp_path, TrackingConfig(tensorboard=False, wandb="demo"), after_step=0, steps=range(1, 3))
    assert not list(tmp_path.iterdir())
