"""Emoji as image–text pairs: a colour font's pictures and their Unicode names."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.errors import UsageError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # where Debian and Ubuntu put it
PACKAGE = "fonts-noto-color-emoji"
END = 0x20000  # beyond it are only more ideographs
PIXELS = 109  # the one size that Noto's bitmaps have; they are 136×128


def list_emojis(font: Path) -> list[tuple[str, str]]:
    """(character, lower-cased Unicode name) of all single characters that the font draws, in code point order.

    Characters without a glyph and blank ones are left out.  Raises UsageError where the font is missing or has no
    colour bitmaps of 109 pixels.
    """
    found: list[tuple[str, str]] = []
    for character in map(chr, range(ord(" "), END)):
        name = unicodedata.name(character, "")
        if name and _has_extent(font, character) and (_glyph(font, character) < 255).any():
            found.append((character, name.lower()))
    if not found:
        raise UsageError(f"{font}: draws no character that has a Unicode name; a colour emoji font was wanted")
    return found


def draw(font: Path, character: str, size: int) -> NDArray[np.uint8]:
    """The emoji in the middle of a white square, uint8 [size,size,3] (bicubic, antialiased)."""
    glyph = Image.fromarray(_glyph(font, character))
    side = max(glyph.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def _has_extent(font: Path, character: str) -> bool:
    left, top, right, bottom = _open(font).getbbox(character)
    return right > left and bottom > top  # a missing glyph has a width, but no height


def _glyph(font: Path, character: str) -> NDArray[np.uint8]:
    """uint8 [H,W,3], as large as the font draws it, on white; blank where the glyph has no colours of its own."""
    left, top, right, bottom = (int(edge) for edge in _open(font).getbbox(character))
    canvas = Image.new("RGB", (right - left, bottom - top), "white")
    ImageDraw.Draw(canvas).text((-left, -top), character, "white", _open(font), embedded_color=True)
    return np.asarray(canvas)


@lru_cache(maxsize=1)
def _open(font: Path) -> ImageFont.FreeTypeFont:
    if not font.is_file():
        raise UsageError(
            f"{font}: no such font; run: apt-get install --no-install-recommends {PACKAGE}, or name one by --font"
        )
    try:
        # Laid out without raqm: one character needs no shaping, and raqm is not everywhere.
        return ImageFont.truetype(font, PIXELS, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise UsageError(f"{font}: not a font with bitmaps of {PIXELS} pixels ({error})") from None
