"""Pictures of image sets for people: labelled grids, samples beside training images, what an autoencoder gives back."""

from collections.abc import Sequence
from fractions import Fraction
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.metrics.arrays import Images, check_images, check_same_size

# All in pixels.
_MARGIN, _GAP = 24, 4  # around the picture; between tiles
_TITLE_GAP, _LABEL_GAP, _HEADING_GAP, _COLUMN_GAP = 24, 16, 10, 20  # below, beside, below, beside
_GROUP_GAP = 20  # between groups of rows
_TITLE_SIZE, _TEXT_SIZE, _LINE = 22, 16, 20
_BACKGROUND, _TITLE_COLOR, _TEXT_COLOR = (255, 255, 255), (20, 20, 20), (90, 90, 90)

_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]],
    scale: int = 2,
    title: str | None = None,
    *,
    columns: Sequence[str] = (),
    group_rows: int | None = None,
) -> Image.Image:
    """One row of images under another, each with its label at the left, on white.

    rows: (label, images uint8 [H, W, 3]); all images of one size, rows may differ in length. Every pixel
    becomes scale × scale pixels, unsmoothed. columns: what stands above each column, lines parted by newlines; columns
    become as wide as that. group_rows: rows that belong together; a wider gap parts them from the next ones.
    Texts are set in Pillow's own font: Latin letters only.
    Raises ValueError for no rows, a row without images, an image of another size or type, a scale or group_rows below
    1, or more or less columns than images in the longest row.
    """
    if not rows:
        raise ValueError("a grid needs at least one row")
    for label, images in rows:
        if not len(images):
            raise ValueError(f"row {label!r} has no images")
    num_columns = max(len(images) for _, images in rows)
    if columns and len(columns) != num_columns:
        raise ValueError(f"{len(columns)} columns came, one for each of {num_columns} images is wanted")
    if group_rows is not None and group_rows < 1:
        raise ValueError(f"group_rows must be at least 1, got {group_rows}")
    reference = rows[0][1][0][None]  # [1, H, W, 3]: the first image's size is everyone's
    for label, images in rows:
        for image in images:
            check_images(image[None], f"row {label!r}")
            check_same_size(image[None], reference, f"row {label!r}")
    tile_h, tile_w = _tile_size(reference, scale)
    text_font = _font(_TEXT_SIZE)
    lines = max((text.count("\n") + 1 for text in columns), default=0)
    heading_h = lines * _LINE + _HEADING_GAP - (_LINE - _TEXT_SIZE) if lines else 0
    top = _MARGIN + _title_height(title) + heading_h
    left = _MARGIN + max(_width(text_font, label) for label, _ in rows)
    left += _LABEL_GAP if left > _MARGIN else 0  # unlabelled rows start at the margin
    column_w = max(tile_w, *(_width(text_font, line) for text in columns for line in text.split("\n")), 0)
    row_h = max(tile_h, _TEXT_SIZE if left > _MARGIN else 0)  # labels of tiny tiles must not touch
    num_gaps = (len(rows) - 1) // group_rows if group_rows else 0
    right = left + num_columns * (column_w + _GAP) - _GAP
    bottom = top + len(rows) * (row_h + _GAP) - _GAP + num_gaps * (_GROUP_GAP - _GAP)
    canvas, draw = _canvas(right, bottom, title)
    for column, text in enumerate(columns):
        for line, words in enumerate(text.split("\n")):
            x, baseline = left + column * (column_w + _GAP) + column_w // 2, top - heading_h + line * _LINE
            draw.text((x, baseline + _cap_height(text_font)), words, _TEXT_COLOR, text_font, anchor="ms")
    for row, (label, images) in enumerate(rows):
        group = row // group_rows if group_rows else 0
        middle = top + row * (row_h + _GAP) + group * (_GROUP_GAP - _GAP) + row_h // 2
        y = middle - tile_h // 2
        draw.text((left - _LABEL_GAP, middle), label, _TEXT_COLOR, text_font, anchor="rm")
        for column, image in enumerate(images):
            x = left + column * (column_w + _GAP) + (column_w - tile_w) // 2
            canvas.paste(_tile(image, scale), (x, y))
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


def reconstructions_picture(
    originals: Images, reconstructions: Images, columns: Sequence[str], title: str | None = None
) -> Image.Image:
    """Originals, what came back of them, and the difference around mid grey: an image and its caption for each column.

    originals, reconstructions uint8 [N, H, W, 3]; columns: N captions.
    Raises ValueError for arrays or captions that don't fit one another.
    """
    difference, factor = amplified_difference(originals, reconstructions)
    rows = [
        ("original", list(originals)),
        ("reconstruction", list(reconstructions)),
        (f"{factor}x difference", list(difference)),
    ]
    return labelled_grid(rows, readable_scale(originals), title, columns=columns)


def amplified_difference(originals: Images, reconstructions: Images) -> tuple[Images, int]:
    """Reconstruction less original, times a factor, around mid grey (128): brighter where too bright; and the factor.

    The factor is the largest power of two up to 64 at which at most one value of a hundred is cut.
    uint8 [N, H, W, 3] each.  Raises ValueError for arrays that don't fit one another.
    """
    check_images(originals, "originals")
    check_images(reconstructions, "reconstructions")
    if reconstructions.shape != originals.shape:
        raise ValueError(f"reconstructions {list(reconstructions.shape)} came, wanted {list(originals.shape)}")
    difference = reconstructions.astype(np.int32) - originals  # levels
    factor = 64
    while factor > 1 and np.mean(np.abs(difference) * factor > 127) > 0.01:
        factor //= 2
    return (128 + factor * difference).clip(0, 255).astype(np.uint8), factor


def interpolations_picture(
    decoded: NDArray[np.uint8], blended: NDArray[np.uint8], title: str | None = None
) -> Image.Image:
    """Lines between pairs of images: one in latent space, decoded, and under it one of the pixels, at equal places.

    decoded, blended: uint8 [P, S, H, W, 3], S places from 0 to 1 on each of P lines.
    Raises ValueError for arrays that don't fit one another, and less than two places.
    """
    if decoded.ndim != 5 or decoded.shape != blended.shape or decoded.shape[1] < 2:
        came = f"{list(decoded.shape)} and {list(blended.shape)}"
        raise ValueError(f"lines must both have one shape [P, S, H, W, 3] with S at least 2, got {came}")
    rows = [row for pair in zip(decoded, blended, strict=True) for row in zip(("latents", "pixels"), pair, strict=True)]
    last = decoded.shape[1] - 1
    columns = [str(Fraction(place, last)) for place in range(last + 1)]
    return labelled_grid(rows, readable_scale(decoded[0]), title, columns=columns, group_rows=2)


def readable_scale(images: Images) -> int:
    """How many times larger images [N, H, W, 3] are shown, so that small ones are about 96 pixels wide."""
    return max(1, round(96 / images.shape[2]))


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
