"""What a run is made with: libraries, machine, ranks, the commit of this code."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

NAME = "environment.json"  # in RUN: of its last start
ROOT = Path(__file__).resolve().parents[1]


@cache
def versions() -> dict[str, str]:
    """Of Python and of the libraries that a checkpoint depends on."""
    names = ("torch", "diffusers", "accelerate", "safetensors", "numpy", "latent-diffusion-pipeline")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def environment() -> dict[str, Any]:
    """All of it, as JSON."""
    import torch

    found = torch.cuda.device_count()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.node(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(found)],
        "num_ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "commit": commit(),
        "versions": versions(),
    }


def commit() -> str | None:
    """The commit of this code, with `+` where files differ from it; None where it is no checkout."""
    if not (ROOT / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
