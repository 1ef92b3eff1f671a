"""Pictures of image sets for people: labelled grids, and samples beside their nearest training images."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.metrics.arrays import Images, check_images, check_same_size

# All in pixels.
_MARGIN, _GAP = 24, 4  # around the picture; between tiles
_TITLE_GAP, _LABEL_GAP, _HEADING_GAP, _COLUMN_GAP = 24, 16, 10, 20  # below, beside, below, beside
_TITLE_SIZE, _TEXT_SIZE = 22, 16
_BACKGROUND, _TITLE_COLOR, _TEXT_COLOR = (255, 255, 255), (20, 20, 20), (90, 90, 90)

_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def labelled_grid(
    rows: list[tuple[str, list[NDArray[np.uint8]]]], scale: int = 2, title: str | None = None
) -> Image.Image:
    """One row of images under another, each with its label at the left, on white.

    rows: (label, images uint8 [H, W, 3]); all images of one size, rows may differ in length. Every pixel
    becomes scale × scale pixels, unsmoothed. Texts are set in Pillow's own font: Latin letters only.
    Raises ValueError for no rows, a row without images, an image of another size or type, or a scale below 1.
    """
    if not rows:
        raise ValueError("a grid needs at least one row")
    for label, images in rows:
        if not images:
            raise ValueError(f"row {label!r} has no images")
    reference = rows[0][1][0][None]  # [1, H, W, 3]: the first image's size is everyone's
    for label, images in rows:
        for image in images:
            check_images(image[None], f"row {label!r}")
            check_same_size(image[None], reference, f"row {label!r}")
    tile_h, tile_w = _tile_size(reference, scale)
    text_font = _font(_TEXT_SIZE)
    top = _MARGIN + _title_height(title)
    left = _MARGIN + max(_width(text_font, label) for label, _ in rows)
    left += _LABEL_GAP if left > _MARGIN else 0  # unlabelled rows start at the margin
    num_columns = max(len(images) for _, images in rows)
    row_h = max(tile_h, _TEXT_SIZE if left > _MARGIN else 0)  # labels of tiny tiles must not touch
    right, bottom = left + num_columns * (tile_w + _GAP) - _GAP, top + len(rows) * (row_h + _GAP) - _GAP
    canvas, draw = _canvas(right, bottom, title)
    for row, (label, images) in enumerate(rows):
        middle = top + row * (row_h + _GAP) + row_h // 2
        y = middle - tile_h // 2
        draw.text((left - _LABEL_GAP, middle), label, _TEXT_COLOR, text_font, anchor="rm")
        for column, image in enumerate(images):
            canvas.paste(_tile(image, scale), (left + column * (tile_w + _GAP), y))
    return canvas


def neighbours_picture(
    samples: Images,
    train_images: Images,
    nearest_indices: NDArray[np.integer],
    scale: int = 2,
    title: str | None = None,
) -> Image.Image:
    """Each sample beside its nearest training images: a copied image shows as a pair of twins.

    samples uint8 [N, H, W, 3], train_images uint8 [M, H, W, 3], nearest_indices integer [N, k] as `nearest`
    gives them. Every pixel becomes scale × scale pixels, unsmoothed.
    Raises ValueError for arrays that don't fit one another, an index outside 0..M-1, or a scale below 1.
    """
    check_images(samples, "samples")
    check_images(train_images, "train_images")
    check_same_size(samples, train_images, "samples")
    if nearest_indices.ndim != 2 or len(nearest_indices) != len(samples) or nearest_indices.shape[1] == 0:
        wanted, came = f"[{len(samples)}, k]", list(nearest_indices.shape)
        raise ValueError(f"nearest_indices must have shape {wanted}, one row per sample, got {came}")
    if nearest_indices.min() < 0 or nearest_indices.max() >= len(train_images):
        raise ValueError(f"nearest_indices must be in 0..{len(train_images) - 1} (the training images)")
    tile_h, tile_w = _tile_size(samples, scale)
    text_font = _font(_TEXT_SIZE)
    headings = "sample", "nearest training images"
    sample_x = _MARGIN
    train_x = sample_x + max(tile_w, _width(text_font, headings[0])) + _COLUMN_GAP
    heading_baseline = _MARGIN + _title_height(title) + _cap_height(text_font)
    top = heading_baseline + _HEADING_GAP
    tiles_right = train_x + nearest_indices.shape[1] * (tile_w + _GAP) - _GAP
    canvas, draw = _canvas(
        max(tiles_right, train_x + _width(text_font, headings[1])),
        top + len(samples) * (tile_h + _GAP) - _GAP,
        title,
    )
    for x, heading in zip((sample_x, train_x), headings, strict=True):
        draw.text((x, heading_baseline), heading, _TEXT_COLOR, text_font, anchor="ls")
    for row, (sample, indices) in enumerate(zip(samples, nearest_indices, strict=True)):
        y = top + row * (tile_h + _GAP)
        canvas.paste(_tile(sample, scale), (sample_x, y))
        for column, index in enumerate(indices):
            canvas.paste(_tile(train_images[index], scale), (train_x + column * (tile_w + _GAP), y))
    return canvas


def _canvas(right: int, bottom: int, title: str | None) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white picture whose contents end at (right, bottom), margins around them, the title at its place."""
    font = _font(_TITLE_SIZE)
    right = max(right, _MARGIN + (_width(font, title) if title else 0))
    canvas = Image.new("RGB", (right + _MARGIN, bottom + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((_MARGIN, _MARGIN + _cap_height(font)), title, _TITLE_COLOR, font, anchor="ls")
    return canvas, draw


def _tile_size(images: Images, scale: int) -> tuple[int, int]:
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    return images.shape[1] * scale, images.shape[2] * scale


def _tile(image: NDArray[np.uint8], scale: int) -> Image.Image:
    return Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1))


def _title_height(title: str | None) -> int:
    return _cap_height(_font(_TITLE_SIZE)) + _TITLE_GAP if title else 0


def _font(size_pixels: int) -> _Font:
    return ImageFont.load_default(size=size_pixels)  # ships with Pillow: the same everywhere, no search


def _width(font: _Font, text: str) -> int:
    return int(np.ceil(font.getbbox(text)[2])) if text else 0


def _cap_height(font: _Font) -> int:
    """From the baseline to the top of a capital: what the eye takes for a line's upper edge."""
    return int(np.ceil(-font.getbbox("H", anchor="ls")[1]))
