"""One checkpoint for every engine and world size (law 2).

    step-000001000/
      MODEL/            a diffusers folder: config.json and fp32 weights; it opens with from_pretrained
      ema/PROFILE/      the same for each average
      optimizer/MODEL/  one safetensors file per moment, under the same parameter names
      state.json        step, data position and fingerprints, versions
      manifest.json     size and SHA-256 of every file; written last

A folder is written aside, flushed, hashed and renamed, so a name that is there is whole; the hashes are checked again
before anything is resumed from it.  Nothing here is or reads a pickle.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import files
from pipeline.errors import RunError, UsageError

FORMAT = 1
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name
Tensors = Mapping[str, Tensor]


class BrokenError(Exception):
    """A checkpoint that is not what its manifest says: file and reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return int(self.state["step"])

    def weights(self, model: str) -> dict[str, Tensor]:
        """Parameter name → fp32 tensor of a model or of `ema/PROFILE`."""
        return load_file(self.path / model / WEIGHTS)

    def moments(self, model: str) -> dict[str, dict[str, Tensor]]:
        """Moment → parameter name → fp32 tensor."""
        return {file.stem: load_file(file) for file in sorted((self.path / "optimizer" / model).glob("*.safetensors"))}

    def ema(self) -> dict[str, dict[str, Tensor]]:
        """Profile name → parameter name → fp32 tensor."""
        return {folder.name: self.weights(f"ema/{folder.name}") for folder in sorted((self.path / "ema").glob("*"))}


def save(
    folder: Path,
    step: int,
    *,
    name: str,
    model: ModelMixin,
    moments: Mapping[str, Tensors],
    ema: Mapping[str, Tensors],
    state: dict[str, Any],
) -> Path:
    """Write `folder`/step-N whole, or raise RunError and leave all that was there as it was.

    `name`: the model's folder, such as "unet"; `moments` and `ema` are keyed by moment and by profile, then by
    parameter name; `state`: JSON, the step and versions are added.  Call it on one rank.
    """
    final = folder / f"step-{step:09d}"
    aside = folder / f".{final.name}.part"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        _write_model(aside / name, model, model.state_dict())
        for profile, tensors in ema.items():
            _write_model(aside / "ema" / profile, model, tensors)
        for moment, tensors in moments.items():
            _write_tensors(aside / "optimizer" / name / f"{moment}.safetensors", tensors)
        files.write_json(aside / "state.json", {"format": FORMAT, "step": step, **state, "versions": _versions()})
        _seal(aside)
        if final.exists():  # a broken one of this step, which resuming passed over
            shutil.rmtree(final)
        aside.rename(final)
        files.flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        older = [path.name for path in list_steps(folder)]
        raise RunError(
            f"step {step}: the checkpoint could not be written to {final}: {error}. "
            f"Nothing saved before is lost ({older[0] if older else 'there is none yet'}): "
            "make room or mend the disk, then run the same command again"
        ) from error
    return final


def _write_model(folder: Path, model: ModelMixin, tensors: Tensors) -> None:
    folder.mkdir(parents=True)
    model.save_config(folder)
    _write_tensors(folder / WEIGHTS, tensors)


def _write_tensors(path: Path, tensors: Tensors) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Copies: views of one storage (a tied weight) may not share it in safetensors.
    whole = {name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})


def _seal(folder: Path) -> None:
    """Flush and hash every file, and write the manifest last."""
    listed: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files.flush(path)
        listed[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    for inner in [p for p in folder.rglob("*") if p.is_dir()]:
        files.flush(inner)
    manifest = {"format": FORMAT, "files": listed}
    files.write_json(folder / "manifest.json", {**manifest, "sha256": files.fingerprint(manifest)})


def verify(path: Path) -> Checkpoint:
    """Check every file against the manifest.

    Raises BrokenError naming the file and the reason; UsageError for a checkpoint in a newer format.
    """
    manifest = _read_manifest(path / "manifest.json")
    for name, wanted in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise BrokenError(f"{file}: missing")
        if file.stat().st_size != wanted["bytes"]:
            raise BrokenError(f"{file}: {file.stat().st_size} bytes came, {wanted['bytes']} were written")
        if files.sha256(file) != wanted["sha256"]:
            raise BrokenError(f"{file}: its content is not what was written (SHA-256 differs)")
    return open_verified(path)


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, once it is what was written to the last byte: it carries its own hash."""
    try:
        manifest = files.read_json(path)
        whole = path.read_text(encoding="utf-8") == files.json_text(manifest)
    except (OSError, ValueError) as error:
        raise BrokenError(f"{path}: {error}") from None
    said = manifest.pop("sha256", None)
    if not whole or said != files.fingerprint(manifest):
        raise BrokenError(f"{path}: its content is not what was written (SHA-256 differs)")
    if manifest["format"] > FORMAT:
        raise UsageError(f"{path}: format {manifest['format']} came, this program reads up to {FORMAT}; update it")
    return manifest


def open_verified(path: Path) -> Checkpoint:
    """A checkpoint that this or another rank has verified."""
    return Checkpoint(path, files.read_json(path / "state.json"))


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with each newer one that doesn't."""
    wrong: list[str] = []
    for path in list_steps(folder):
        try:
            return verify(path), wrong
        except BrokenError as error:
            wrong.append(str(error))
    return None, wrong


def list_steps(folder: Path) -> list[Path]:
    """The checkpoint folders, newest first, unverified."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def prune(folder: Path, *, keep_last: int, keep_every_steps: int | None) -> None:
    """Remove old checkpoints and what killed processes left.  A folder loses its name before its files."""
    for path in list_steps(folder)[keep_last:]:
        step = int(path.name.removeprefix("step-"))
        if keep_every_steps is None or step % keep_every_steps:
            path.rename(path.with_name(f".{path.name}.part"))
    for left in folder.glob(".step-*.part"):
        shutil.rmtree(left, ignore_errors=True)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "diffusers", "accelerate", "safetensors", "numpy", "latent-diffusion-pipeline")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
