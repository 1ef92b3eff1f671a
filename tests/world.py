"""A whole small world on the disk: real digits, a small VAE, latents, and processes that run the real programs.

Programs run in processes forked from a server that has imported torch and diffusers once: a run that is killed and
started again costs a second, not ten.  The launcher's part (ranks, addresses) is set in the environment, as torchrun
does it; tests/system also start the real launchers.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import socket
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["pipeline.train", "pipeline.train_vae", "pipeline.encode", "pipeline.evaluate"])


def small_config(root: Path) -> dict[str, Any]:
    """The demo's config made small: every part is there, a step takes milliseconds."""
    return {
        "run_dir": str(root / "run"),
        "seed": 3,
        "data": {
            "train_images": str(root / "digits" / "validation"),
            "validation_images": str(root / "digits" / "train"),  # other ones
            "train_latents": str(root / "latents"),
            "image_size": 16,
            "lanes": 12,
            "workers": 0,
        },
        "vae": {
            "run_dir": str(root / "vae"),
            "path": str(root / "vae" / "autoencoder"),
            "model": {"block_out_channels": [8, 8], "norm_num_groups": 4},
            "train": {"steps": 8, "global_batch_images": 8, "warmup_steps": 2},
        },
        "unet": {"block_out_channels": [16, 16], "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8},
        "conditioning": {"num_classes": 10},
        "optimizer": {"learning_rate": 1.0e-3},
        "train": {"steps": 8, "global_batch_images": 12},
        "engine": {"device": "cpu"},
        "ema": {"decays": [0.9, 0.99]},
        "checkpoint": {"every_steps": 4, "keep_last": 3},
        "evaluation": {
            "every_steps": 1000,
            "num_images": 20,
            "num_inference_steps": 2,
            "batch_images": 8,
            "max_reference_images": 360,  # of the 1,437 held out, too
            "cache_dir": str(root / "cache"),
            "loss_images": 20,
            "likelihood": {"num_images": 8, "num_timesteps": 5, "ode_images": 0},
        },
        "tracking": {"every_steps": 1, "tensorboard": False},
    }


@dataclass(frozen=True)
class World:
    """A folder with a config, and the programs run on it."""

    root: Path

    @property
    def config(self) -> Path:
        """The config's file."""
        return self.root / "config.yaml"

    @property
    def run_dir(self) -> Path:
        """RUN."""
        return self.root / "run"

    def status(self, run: Path | None = None) -> dict[str, Any]:
        """RUN/status.json."""
        return json.loads(((run or self.run_dir) / "status.json").read_text())

    def start(self, verb: str, *words: str, ranks: int = 1, log: Path | None = None) -> list[BaseProcess]:
        """Start a program's ranks; they are killed with the test session if they outlive it."""
        port = free_port()
        args = (verb, [str(self.config), *words], ranks, port, str(log or self.root / "log.txt"))
        started = [FORKSERVER.Process(target=run_rank, args=(rank, *args), daemon=False) for rank in range(ranks)]
        for process in started:
            process.start()
        return started

    def do(self, verb: str, *words: str, ranks: int = 1, log: Path | None = None) -> list[int | None]:
        """Run a program to its end; the exit code of each rank."""
        started = self.start(verb, *words, ranks=ranks, log=log)
        for process in started:
            process.join(300)
            assert process.exitcode is not None, "the program did not end within five minutes"
        return [process.exitcode for process in started]

    def said(self) -> str:
        """What the last programs wrote to the terminal."""
        return (self.root / "log.txt").read_text()


def free_port() -> int:
    """A port that nobody listens on; nor will somebody before it is used.

    It lies below those that Linux hands out by itself, and each of pytest's workers has its own share of them.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 16
    while True:
        port = random.SystemRandom().randrange(10_000 + worker, 32_000, 16)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_rank(rank: int, verb: str, words: list[str], ranks: int, port: int, log: str) -> None:
    """One rank's process: what a launcher gives it, then the program."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = open(1, "w", buffering=1, closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, encoding="utf-8")  # noqa: SIM115
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if ranks > 1:
        said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in said.items()}, MASTER_ADDR="127.0.0.1")
    # A launcher's child starts its loaders as Python does by itself; a forkserver's would each import torch anew.
    multiprocessing.set_start_method(None, force=True)
    import torch

    torch.set_num_threads(1)
    from pipeline.engine import leave

    leave(importlib.import_module(f"pipeline.{verb}").main(words))


def losses(run: Path) -> list[tuple[int, int, float]]:
    """(step, position, loss) of every row of a run's metrics."""
    return [(row["step"], row["position"], row["loss"]) for row in rows(run) if "loss" in row]


def rows(run: Path) -> list[dict[str, Any]]:
    """Every row of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def sealed_again(folder: Path) -> None:
    """Give a checkpoint that was changed on purpose the manifest of what it is now."""
    from pipeline import checkpoint

    (folder / "manifest.json").unlink()
    listed = {p.relative_to(folder).as_posix(): checkpoint.seal(p) for p in folder.rglob("*") if p.is_file()}
    checkpoint.publish(folder.rename(folder.with_name("changed")), folder, listed)
