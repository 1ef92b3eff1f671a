"""One checkpoint for every engine and world size (law 2).

    step-000001000/
      MODEL/            a diffusers folder: config.json and fp32 weights; it opens with from_pretrained
      ema/PROFILE/      the same for each average
      optimizer/MODEL/  one safetensors file per moment, under the same parameter names
      state.json        step, data position and fingerprints, versions
      manifest.json     size and SHA-256 of every file; written last

Weights and moments of over 2 GiB lie in several files, numbered as diffusers numbers them.  A folder is written aside
(saving.py), flushed, hashed and renamed, so a name that is there is whole; the hashes are checked again before anything
is resumed from it.  Nothing here is or reads a pickle.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline import files
from pipeline.environment import versions
from pipeline.errors import UsageError

FORMAT = 1
WEIGHTS = "diffusion_pytorch_model"  # diffusers' name of a model's weights, without its ending
MOMENTS = ("exp_avg", "exp_avg_sq")
Read = Callable[[str], Tensor]  # parameter name → fp32 tensor


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

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """Parameter name → fp32 tensor of all in the files STEM*.safetensors, such as `unet_stem("unet")`."""
        return {name: tensor for file in self._files(stem) for name, tensor in load_file(file).items()}

    @contextmanager
    def reading(self, stem: str) -> Generator[Read]:
        """The same, one at a time as they are asked for: a big model is never in memory whole."""
        with ExitStack() as opened:
            where: dict[str, Any] = {}
            for file in self._files(stem):
                handle: Any = opened.enter_context(safe_open(file, framework="pt"))
                where |= dict.fromkeys(handle.keys(), handle)
            yield lambda name: where[name].get_tensor(name)

    def shapes(self, stem: str) -> dict[str, torch.Size]:
        """Parameter name → shape, from the files' headers alone."""
        found: dict[str, torch.Size] = {}
        for file in self._files(stem):
            with safe_open(file, framework="pt") as opened:
                found |= {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        return found

    def has(self, stem: str) -> bool:
        """Whether there are such tensors."""
        return bool(self._files(stem))

    def profiles(self) -> list[str]:
        """The averages' names."""
        return sorted(folder.name for folder in (self.path / "ema").glob("*"))

    def _files(self, stem: str) -> list[Path]:
        folder, name = (self.path / stem).parent, Path(stem).name
        return [*folder.glob(f"{name}.safetensors"), *sorted(folder.glob(f"{name}-*-of-*.safetensors"))]


def weights_stem(model: str) -> str:
    """Where the weights of a model lie, such as "unet" or "ema/decay-0.9999"."""
    return f"{model}/{WEIGHTS}"


def moment_stem(model: str, moment: str) -> str:
    """Where a moment of a model's optimizer lies."""
    return f"optimizer/{model}/{moment}"


def seal(path: Path) -> dict[str, Any]:
    """Flush a file, and give what the manifest says of it."""
    files.flush(path)
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}


def publish(aside: Path, final: Path, listed: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of a folder whose files are `listed`, and give it its name."""
    for inner in [p for p in aside.rglob("*") if p.is_dir()]:
        files.flush(inner)
    manifest = {"format": FORMAT, "files": dict(sorted(listed.items()))}
    files.write_json(aside / "manifest.json", {**manifest, "sha256": files.fingerprint(manifest)})
    if final.exists():  # a broken one of this step, which resuming passed over
        shutil.rmtree(final)
    aside.rename(final)
    files.flush(final.parent)


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


def state_document(step: int, state: dict[str, Any]) -> dict[str, Any]:
    """What state.json holds: JSON, with the format, the step and the libraries' versions."""
    return {"format": FORMAT, "step": step, **state, "versions": versions()}
