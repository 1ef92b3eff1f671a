"""A contact sheet of a set: its first images in a grid, each with its label and caption below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline import files
from pipeline.data import images, latents
from pipeline.data.index import ShardSet

NUM_IMAGES, NUM_COLUMNS = 48, 8
NUM_LATENTS, BATCH_LATENTS = 16, 4  # decoding takes its time, and at 512 pixels some GiB an image
# All in pixels.
TILE, MARGIN, GAP, TEXT_GAP, TEXT_SIZE, LINE = 144, 24, 16, 8, 14, 18
MAX_LINES = 3  # of a caption
MOST_CHARACTERS = 300  # of a caption are looked at: far more than three lines
BACKGROUND, FRAME, TEXT_COLOR = (255, 255, 255), (225, 225, 225), (70, 70, 70)

_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def write_preview(folder: Path, size: int) -> None:
    """FOLDER/preview.png: the first images of an indexed set, `size` pixels each, as they lie in its shards."""
    cells: list[tuple[NDArray[np.uint8], str]] = []
    for parts in _first(folder, NUM_IMAGES):
        picture = next(data for part, data in parts.items() if part in images.PARTS)
        cells.append((_enlarged(images.decode(picture, min(size, TILE))), _told(parts)))
    with files.whole(folder / "preview.png") as aside:
        contact_sheet(cells).save(aside, format="PNG")


def write_latents_preview(
    folder: Path, decode: Callable[[NDArray[np.float32]], NDArray[np.uint8]], writer: int = 0
) -> None:
    """FOLDER/preview.png: what the autoencoder makes of the first latents of an indexed set.

    `decode`: means float32 [B,C,h,w] → images uint8 [B,H,W,3].
    """
    cells: list[tuple[NDArray[np.uint8], str]] = []
    first = _first(folder, NUM_LATENTS)
    while some := list(islice(first, BATCH_LATENTS)):
        moments = np.stack([latents.moments_from_bytes(parts[latents.PART]) for parts in some])  # [B,2C,h,w]
        decoded = decode(moments[:, : moments.shape[1] // 2].astype(np.float32))
        cells += [(_enlarged(pixels), _told(parts)) for pixels, parts in zip(decoded, some, strict=True)]
    with files.whole(folder / "preview.png", writer) as aside:
        contact_sheet(cells).save(aside, format="PNG")


def _first(folder: Path, limit: int) -> Iterator[dict[str, bytes]]:
    """The parts of the first samples of a set."""
    shards = ShardSet(folder, open_shards=1)
    places = ((shard, row) for shard, count in enumerate(shards.counts) for row in range(count))
    for (shard, row), _ in zip(places, range(limit), strict=False):
        yield shards.read(shard, row)[1]


def _told(parts: dict[str, bytes]) -> str:
    return ": ".join(parts[part].decode() for part in ("cls", "txt") if part in parts)


def _enlarged(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Small pixels are shown as they are, unsmoothed."""
    scale = max(1, TILE // len(pixels))
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def contact_sheet(cells: list[tuple[NDArray[np.uint8], str]]) -> Image.Image:
    """Square images of one size, uint8 [H,H,3], in rows of eight, each in a thin frame with its text below.

    Texts are set in Pillow's own font: Latin letters only.  A row is as high as its longest text wants, at most
    three lines.
    """
    font = ImageFont.load_default(size=TEXT_SIZE)  # ships with Pillow: the same everywhere, no search
    tile = len(cells[0][0])
    column_width = max(tile, TILE)  # texts want room where images are small
    texts = [_lines(font, text, column_width) for _, text in cells]
    rows = [range(first, min(first + NUM_COLUMNS, len(cells))) for first in range(0, len(cells), NUM_COLUMNS)]
    heights = [tile + TEXT_GAP + LINE * max(len(texts[i]) for i in row) for row in rows]
    width = 2 * MARGIN + min(len(cells), NUM_COLUMNS) * (column_width + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + sum(heights) + GAP * (len(rows) - 1)), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            middle = MARGIN + column * (column_width + GAP) + column_width // 2
            left = middle - tile // 2
            pen.rectangle((left - 1, top - 1, left + tile, top + tile), outline=FRAME)
            sheet.paste(Image.fromarray(cells[i][0]), (left, top))
            for number, line in enumerate(texts[i]):
                pen.text((middle, top + tile + TEXT_GAP + number * LINE), line, TEXT_COLOR, font, anchor="ma")
        top += height + GAP
    return sheet


def _lines(font: _Font, text: str, width: int) -> list[str]:
    """A text broken between words into lines of `width` pixels; what does not fit is cut off, with dots."""
    lines: list[str] = []
    words = text[:MOST_CHARACTERS].split()
    while words and len(lines) < MAX_LINES:
        taken = next((n for n in range(len(words), 1, -1) if font.getlength(" ".join(words[:n])) <= width), 1)
        lines.append(_cut(font, " ".join(words[:taken]), width))
        words = words[taken:]
    if words:
        lines[-1] = _cut(font, f"{lines[-1]} {' '.join(words)}", width)
    return lines


def _cut(font: _Font, line: str, width: int) -> str:
    cut = line
    while cut and font.getlength(cut if cut == line else f"{cut}…") > width:
        cut = cut[:-1]
    return cut if cut == line else f"{cut.rstrip()}…"
