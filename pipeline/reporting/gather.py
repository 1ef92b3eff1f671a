"""All that a run's folder tells, as plain data; what is missing or broken is left out."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pipeline import environment, files
from pipeline.config import Config
from pipeline.config_file import load_config, without_secrets
from pipeline.data.index import ShardSet
from pipeline.errors import UsageError
from pipeline.reporting.rows import Table, read_objects, read_table
from pipeline.run_folder import STATUS, is_live

Json = dict[str, Any]
ROWS_SHOWN = 50  # of a list of troubles: the last ones


@dataclass(frozen=True)
class Set:
    """A set of images or latents that a config names."""

    location: str
    num_samples: int | None  # None: it is not to be found from here
    described: Json  # its dataset.json


@dataclass(frozen=True)
class Listed:
    """A JSONL list of troubles: how many there are, and the last of them."""

    count: int
    rows: list[Json]


@dataclass(frozen=True)
class Gathered:
    """What a run's files say."""

    run: Path
    config: Config | None
    config_text: str  # without secrets
    config_error: str | None
    status: Json
    live: bool  # whether a process works on it now
    table: Table
    evaluations: list[Json]
    scores: Json
    bound: Json
    state: Json  # of the newest checkpoint
    num_parameters: int | None  # of its U-Net
    latent_shape: tuple[int, int, int] | None
    train_sets: list[Set]
    validation_set: Set | None
    vae_run: Path | None
    vae_scores: Json
    vae_table: Table
    quarantine: Listed
    spikes: Listed
    alarms: Listed
    environment: Json


def gather(run: Path) -> Gathered:
    """Read a run's folder, whoever writes it at the same time.  Raises UsageError where it is none."""
    if not (run / "config.yaml").exists():
        raise UsageError(f"{run}: no run here (no config.yaml); train makes one")
    config_text = without_secrets((run / "config.yaml").read_text(encoding="utf-8", errors="replace"))
    config, config_error = None, None
    try:
        config = load_config(run / "config.yaml")
    except UsageError as error:  # of another version of this code
        config_error = str(error).splitlines()[0]
    newest = max((path.parent for path in run.glob("checkpoints/step-*/state.json")), default=None)
    unet = read(newest / "unet" / "config.json") if newest else {}
    vae_run = Path(config.vae.run_dir) if config else None
    return Gathered(
        run=run,
        config=config,
        config_text=config_text,
        config_error=config_error,
        status=read(run / STATUS),
        live=is_live(run),
        table=read_table(run / "metrics.jsonl"),
        evaluations=[row for row in read_objects(run / "evaluations.jsonl") if row is not None],
        scores=read(run / "scores.json"),
        bound=read(run / "evaluation" / "bound.json"),
        state=read(newest / "state.json") if newest else {},
        num_parameters=num_parameters(newest / "unet") if newest else None,
        latent_shape=shape_of(unet),
        train_sets=[open_set(location) for location in config.data.train_images] if config else [],
        validation_set=open_set(config.data.validation_images) if config and config.data.validation_images else None,
        vae_run=vae_run,
        vae_scores=read(vae_run / "measured" / "scores.json") if vae_run else {},
        vae_table=read_table(vae_run / "metrics.jsonl") if vae_run and vae_run != run else Table(),
        quarantine=read_list(run / "quarantine.jsonl"),
        spikes=read_list(run / "spikes.jsonl"),
        alarms=read_list(*(folder / "alarms.jsonl" for folder in (run, vae_run) if folder)),
        environment=read(run / environment.NAME),
    )


def read(path: Path) -> Json:
    """A JSON object; an empty one where there is none."""
    try:
        return files.read_json(path)
    except (OSError, ValueError):
        return {}


def read_list(*paths: Path) -> Listed:
    """JSONL lists, one after another."""
    rows = [row for path in dict.fromkeys(paths) for row in read_objects(path) if row is not None]
    return Listed(len(rows), rows[-ROWS_SHOWN:])


def open_set(location: str) -> Set:
    """A set on this machine; one elsewhere is not asked."""
    folder = Path(location)
    described = read(folder / "dataset.json")
    num_samples: int | None = None
    if folder.is_dir():
        with suppress(UsageError, OSError, ValueError):
            num_samples = len(ShardSet(location, open_shards=1))
    count = described.get("num_samples")
    return Set(
        location, num_samples if num_samples is not None else count if isinstance(count, int) else None, described
    )


def num_parameters(model: Path) -> int | None:
    """Of a model's safetensors files, from their headers: 8 bytes of length, then JSON."""
    total = 0
    with suppress(OSError, ValueError, struct.error, KeyError, TypeError):
        for path in model.glob("*.safetensors"):
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header: Mapping[str, Any] = json.loads(file.read(length))
            total += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total or None


def shape_of(unet: Json) -> tuple[int, int, int] | None:
    """[C,h,w] of the latents that a U-Net's config speaks of."""
    channels, side = unet.get("in_channels"), unet.get("sample_size")
    return (channels, side, side) if isinstance(channels, int) and isinstance(side, int) else None
