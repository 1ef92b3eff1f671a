"""Pictures of a run as parts of a page: bounded in number, in pixels and in bytes."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

MAX_BYTES = 400_000  # of a picture in the page
MAX_SIDE = 1800  # pixels
MAX_FRAMES = 24  # of the samples over time
WEBP_QUALITY = 82


@dataclass(frozen=True)
class Embedded:
    """A picture in a page: its bytes as a data URI, its size, and what it was made smaller from."""

    uri: str
    width: int
    height: int
    shrunk_from: tuple[int, int] | None = None


def embed(path: Path) -> Embedded | None:
    """A picture file as it is, where it is small enough, else scaled down as WebP; None where there is none whole."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
            opened.load()
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    if len(data) <= MAX_BYTES and max(picture.size) <= MAX_SIDE:
        return Embedded(_uri("png", data), *picture.size)
    was, side = picture.size, MAX_SIDE
    while True:
        scaled = picture.copy()
        scaled.thumbnail((side, side), Image.Resampling.LANCZOS)
        made = io.BytesIO()
        scaled.save(made, format="WEBP", quality=WEBP_QUALITY, method=4)
        if made.tell() <= MAX_BYTES or side < 200:
            shrunk = was if scaled.size != was else None
            return Embedded(_uri("webp", made.getvalue()), *scaled.size, shrunk_from=shrunk)
        side = int(side * 0.8)


def evenly(paths: list[Path], limit: int = MAX_FRAMES) -> list[Path]:
    """At most `limit` of them, evenly spaced, the first and the last among them."""
    if len(paths) <= limit:
        return paths
    return [paths[round(i * (len(paths) - 1) / (limit - 1))] for i in range(limit)]


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
