"""Latent shards: posterior moments, and where they came from."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import files
from pipeline.errors import UsageError

PART = "moments.npy"  # WebDataset part name: fp16 [2C,h,w], mean over logvar
FORMAT = 1


def moments_to_bytes(moments: NDArray[Any]) -> bytes:
    """[2C,h,w] → the bytes of an fp16 .npy.  Raises ValueError where a value is not finite in fp16."""
    with np.errstate(over="ignore"):
        half = moments.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("the moments are not finite in fp16")
    buffer = io.BytesIO()
    np.save(buffer, half, allow_pickle=False)
    return buffer.getvalue()


def moments_from_bytes(data: bytes) -> NDArray[np.float32]:
    """The bytes of an fp16 .npy → float32 [2C,h,w].  Raises ValueError; runs no pickle."""
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)  # np.load would open a zip, too
    except MemoryError as error:
        raise ValueError(f"a broken .npy header: {error}") from None
    if array.dtype != np.float16 or array.ndim != 3 or array.shape[0] % 2:
        raise ValueError(f"fp16 [2C,h,w] was wanted, {array.dtype} {list(array.shape)} came")
    if not np.isfinite(array).all():
        raise ValueError("the moments are not finite")
    return array.astype(np.float32)


@dataclass(frozen=True)
class Origin:
    """What the latents depend on.  Another value of any of these makes other latents."""

    vae_sha256: str
    image_size: int  # pixels
    crop: str
    flip: bool
    precision: str
    batch_images: int  # the last digits of a moment depend on how many images the VAE saw at once
    source_fingerprint: str


def describe(folder: Path) -> dict[str, Any]:
    """A set's `dataset.json`.  Raises UsageError where it is missing or broken."""
    try:
        return files.read_json(folder / "dataset.json")
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: no readable dataset.json ({error})") from None


def open_latents(folder: Path, vae_sha256: str, image_size: int) -> dict[str, Any]:
    """A latent set's `dataset.json`, once it is found complete and made by this VAE at this size (law: refuse)."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of latents; run encode with this config first")
    said = describe(folder)
    if said.get("kind") != "latents" or said.get("format") != FORMAT:
        raise UsageError(
            f"{folder}: {said.get('kind')!r} of format {said.get('format')!r} came, latents of format {FORMAT} wanted"
        )
    if not said.get("complete"):
        raise UsageError(f"{folder}: encode did not finish here; run the same encode command again")
    origin = said["origin"]
    if origin["vae_sha256"] != vae_sha256:
        raise UsageError(
            f"{folder}: these latents were made by the VAE {origin['vae_sha256'][:12]}, vae.path names the VAE "
            f"{vae_sha256[:12]}; encode again into another folder, or name the VAE that made them"
        )
    if origin["image_size"] != image_size:
        raise UsageError(
            f"{folder}: these latents were made from {origin['image_size']} px images, data.image_size is {image_size}"
        )
    indexed = files.read_json(folder / "index" / "manifest.json")["fingerprint"]
    if indexed != said["fingerprint"]:
        raise UsageError(f"{folder}: its shards are not those that encode wrote; restore them, or remove it and encode")
    return said


def check_same_origin(folder: Path, said: dict[str, Any], origin: Origin) -> None:
    """Raise UsageError where a folder that encode writes to already holds latents of another origin."""
    was = said.get("origin", {})
    differing = [field.name for field in fields(origin) if was.get(field.name) != asdict(origin)[field.name]]
    if said.get("kind") != "latents" or differing:
        told = "; ".join(f"{name} was {was.get(name)!r}, now {asdict(origin)[name]!r}" for name in differing)
        raise UsageError(f"{folder}: holds something else ({told}); choose another folder or remove this one")
