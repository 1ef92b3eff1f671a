"""Latent shards: posterior moments, and where they came from."""

from __future__ import annotations

import io
import math
import struct
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline import files
from pipeline.errors import UsageError

PART = "moments.npy"  # WebDataset part name: fp16 [2C,h,w], mean over logvar
FORMAT = 1
HEADER_BYTES = struct.Struct("<H")  # of an .npy 1.0, at its ninth byte: the length of the rest of its header
INFINITY, MINUS_INFINITY = 0x7C00, 0xFC00  # as bits of fp16


def moments_to_bytes(moments: NDArray[Any]) -> bytes:
    """[2C,h,w] → the bytes of an fp16 .npy.  Raises ValueError where a value is not finite in fp16."""
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(moments, dtype=np.float16)
    if not np.isfinite(half).all():
        raise ValueError("the moments are not finite in fp16")
    buffer = io.BytesIO()
    np.save(buffer, half, allow_pickle=False)
    return buffer.getvalue()


def moments_from_bytes(data: bytes) -> NDArray[np.float16]:
    """The bytes of an fp16 .npy → [2C,h,w], a view of them.  Raises ValueError; runs no pickle."""
    begin, shape, order = _header(data[: HEADER_BYTES.unpack_from(data, 8)[0] + 10 if len(data) >= 10 else 0])
    if len(data) - begin != 2 * math.prod(shape):
        raise ValueError(f"{len(data) - begin} bytes of moments came, {2 * math.prod(shape)} for {list(shape)} wanted")
    bits = np.frombuffer(data, np.int16, offset=begin)
    # Infinity is the first of the bit patterns that are not finite, among positive numbers (in signed order) and among
    # negative ones (in unsigned order): isfinite is ten times as slow on fp16.
    if bits.size and (np.maximum.reduce(bits) >= INFINITY or np.maximum.reduce(bits.view(np.uint16)) >= MINUS_INFINITY):
        raise ValueError("the moments are not finite")
    return bits.view(np.float16).reshape(shape, order=order)


@lru_cache(maxsize=16)
def _header(head: bytes) -> tuple[int, tuple[int, ...], Literal["C", "F"]]:
    """Where the numbers of an .npy begin, their shape and order, from its first bytes; a set's samples repeat them."""
    file = io.BytesIO(head)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of .npy came, 1.0 was wanted")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.float16 or len(shape) != 3 or shape[0] % 2:
        raise ValueError(f"fp16 [2C,h,w] was wanted, {dtype} {list(shape)} came")
    return len(head), shape, "F" if fortran_order else "C"


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
