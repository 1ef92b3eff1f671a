"""Snapshots of the power averages: RUN/ema/step-000001000/, beside the checkpoints, which they outlast.

    power-0.05/       a diffusers folder: config.json and fp32 weights; it opens with from_pretrained
    state.json        the checkpoint's: step, data position and fingerprints, what made the latents
    manifest.json     size and SHA-256 of every file

A snapshot is what a checkpoint holds of them, under names of its own (hard links): no byte is written twice, and a
checkpoint that is removed leaves them.  It is verified and read as a checkpoint is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline import checkpoint, files
from pipeline.checkpoint import BrokenError, Checkpoint
from pipeline.ema import Power, power_of
from pipeline.errors import RunError, UsageError

STATE = "state.json"


def folder_of(run: Path) -> Path:
    """Where a run's snapshots lie, each under its checkpoint's name."""
    return run / "ema"


def is_due(step: int, every_steps: int | None) -> bool:
    """Whether the checkpoint of this step leaves a snapshot.  `every_steps`: ema.snapshot_every_steps."""
    return every_steps is not None and step % every_steps == 0


def keep_snapshot(found: Path, run: Path) -> Path:
    """Let the power averages of a whole checkpoint outlast it; the snapshot's folder.  Another of its step is replaced.

    Raises RunError where it can't be written; ValueError for a checkpoint without power averages.
    """
    listed = files.read_json(found / "manifest.json")["files"]
    # from their name in the checkpoint to that in the snapshot: ema/power-0.05/config.json → power-0.05/config.json
    names = {name: name.removeprefix("ema/") for name in listed if name.startswith("ema/power-")}
    if not names:
        raise ValueError(f"{found}: no power average in it; ema.sigma_rels asks for them")
    names[STATE] = STATE
    final = folder_of(run) / found.name
    aside = final.with_name(f".{final.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        for source, name in names.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            _link(found / source, aside / name)
        checkpoint.publish(aside, final, {name: listed[source] for source, name in names.items()})
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(
            f"{final}: the snapshot of the averages could not be written: {error}. The checkpoint {found.name} is "
            "whole: make room or mend the disk, then run the same command again"
        ) from error
    return final


def continue_from(found: Path | None, run: Path, every_steps: int | None) -> list[Path]:
    """Make the snapshots those of a run that goes on from the checkpoint `found`, or begins (None).

    A kill between checkpoint and snapshot may have left out the one that is due: it is made.  Those of later steps,
    which a run that was set back will make again, are removed, and given back by their former names.  Raises UsageError
    where a run begins that has snapshots, which can't be its own.
    """
    present = checkpoint.list_steps(folder_of(run))
    for left in folder_of(run).glob(".step-*.part"):  # of a killed process
        shutil.rmtree(left, ignore_errors=True)
    if found is None:
        if present:
            raise UsageError(
                f"{folder_of(run)}: has snapshots of averages, but the run has no checkpoint to go on from; move them "
                "away to begin anew"
            )
        return []
    later = [path for path in present if path.name > found.name]
    for path in later:  # a folder loses its name before its files
        aside = path.with_name(f".{path.name}.part")
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    if is_due(_step(found), every_steps) and not (folder_of(run) / found.name).exists():
        keep_snapshot(found, run)
    return later


def find(run: Path, step: int | None) -> list[Path]:
    """The snapshots up to one of `step` (None: the newest), by step, the last one being of it.

    Raises UsageError, naming what there is, where there is none.
    """
    folder = folder_of(run)
    present = sorted(checkpoint.list_steps(folder))
    if not present:
        raise UsageError(
            f"{folder}: no snapshots of averages; train with ema.sigma_rels=[0.05,0.1] and ema.snapshot_every_steps"
        )
    wanted = _step(present[-1]) if step is None else step
    found = [path for path in present if _step(path) <= wanted]
    if not found or _step(found[-1]) != wanted:
        near = sorted(sorted(map(_step, present), key=lambda other: abs(other - wanted))[:2])
        raise UsageError(f"{folder}: no snapshot of step {wanted}; nearest: {' and '.join(map(str, near))}")
    return found


def open_whole(paths: Sequence[Path]) -> list[Checkpoint]:
    """The snapshots, every byte of them checked.

    Raises RunError naming the file that is broken, or a snapshot that is not of the same course of the training.
    """
    found: list[Checkpoint] = []
    for path in paths:
        try:
            snapshot = checkpoint.verify(path)
        except BrokenError as error:
            raise RunError(f"{error}; move {path} away to do without it") from None
        # Positions only go up: one that was drawn later at an earlier step is of a run that was set back.
        if found and _position(snapshot) <= _position(found[-1]):
            raise RunError(
                f"{path}: was made at position {_position(snapshot)}, {found[-1].path.name} at "
                f"{_position(found[-1])}: not of the same course of the training; move it away to do without it"
            )
        found.append(snapshot)
    return found


def averages(snapshot: Path) -> list[Power]:
    """The power profiles that a snapshot holds, by σ_rel."""
    named = (power_of(folder.name) for folder in snapshot.iterdir() if folder.is_dir())
    return sorted((profile for profile in named if profile is not None), key=lambda profile: profile.sigma_rel)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _position(snapshot: Checkpoint) -> int:
    return int(snapshot.state["data"]["position"])


def _link(source: Path, name: Path) -> None:
    """A second name for a file, or a copy where the disks are not the same or know no links."""
    try:
        os.link(source, name)
    except OSError:
        shutil.copyfile(source, name)
        files.flush(name)
