"""Bytes → pixels: decode what is allowed, never more than a limit, scale the short side, cut the centre."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
PARTS = frozenset({"jpg", "jpeg", "png", "webp"})  # WebDataset part names that hold an image
MAX_PIXELS = 64_000_000  # a 12 KB PNG can decode to 100 megapixels


def decode(data: bytes, size: int) -> NDArray[np.uint8]:
    """Decode a JPEG, PNG or WebP to uint8 [size, size, 3], RGB.

    Turned as its EXIF says, laid on white where it is transparent, short side scaled to `size` (bicubic,
    antialiased), centre cut.  Raises ValueError for anything that is not such an image or has over 64 megapixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}×{image.height} pixels came, at most {MAX_PIXELS:,} are read")
                return np.asarray(_square(_rgb(ImageOps.exif_transpose(image)), size))
    except (OSError, SyntaxError, Warning, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable {', '.join(FORMATS)} image: {error}") from None


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """uint8 [H,W,3] or [H,W] → the bytes of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def to_unit(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [..., H, W, 3] → float32 [..., 3, H, W] in [-1, 1], what the VAE reads."""
    return np.moveaxis(images.astype(np.float32) / np.float32(127.5) - np.float32(1), -1, -3)


def to_pixels(x: Any) -> NDArray[np.uint8]:
    """Tensor or array [..., 3, H, W] in [-1, 1] → uint8 [..., H, W, 3], rounded to nearest, clipped."""
    array = np.moveaxis(np.asarray(x, dtype=np.float32), -3, -1)
    return np.rint((array + 1) * 127.5).clip(0, 255).astype(np.uint8)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
