"""Where pictures come from: scikit-learn's digits, a folder per class, the rows of a table, an emoji font.

A source lists its items at once and draws each only when it is asked for, in whichever process asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from pipeline import files
from pipeline.data import emoji, images
from pipeline.data.tables import Columns, Row, number_labels, read_table
from pipeline.errors import UsageError

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = ("a handwritten digit {}", "the digit {}, written by hand", "a handwritten {}", "a scan of the digit {}")


@dataclass(frozen=True)
class Picture:
    """One image on its way into a shard."""

    image: NDArray[np.uint8]  # [H,W] or [H,W,3]
    label: int | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Source:
    """Pictures to be drawn.  `items` and `draw` travel to other processes, so both can be pickled."""

    name: str  # for messages
    items: Sequence[Any]
    draw: Callable[[Any], Picture]  # one item → its picture; raises UsageError naming what can't be read
    made_by: dict[str, Any]  # what the pictures are a function of
    classes: NDArray[np.int64] | None = None  # by item: the split keeps their shares
    num_shards: tuple[int, int] | None = None  # of train and validation, of uneven size; None: 1,000 images a shard


def digits(size: int) -> Source:
    """scikit-learn's digits (Alpaydin & Kaynak 1998): 1,797 grey images of 8×8, scaled to `size` pixels (bicubic).

    The split keeps the share of every class: a split by order would put other writers into the validation set.
    """
    loaded: Any = load_digits()
    items = [(image, int(label), row) for row, (image, label) in enumerate(zip(*_arrays(loaded), strict=True))]
    made_by = {"prepare": "digits", "size": size}
    return Source("digits", items, partial(_draw_digit, size), made_by, classes=loaded.target, num_shards=(7, 3))


def _arrays(loaded: Any) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    return loaded.images, loaded.target


def _draw_digit(size: int, item: tuple[NDArray[np.float64], int, int]) -> Picture:
    image, label, row = item  # 8×8 in 0..16
    grey = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))
    scaled = np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC))
    return Picture(scaled, label, WORDINGS[row % len(WORDINGS)].format(DIGIT_NAMES[label]))


def folder(source: Path, size: int) -> Source:
    """A folder per class.  Classes are numbered by name; the name is the caption.

    Raises UsageError where there are none, or no images.
    """
    classes = sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
    suffixes = {f".{part}" for part in images.PARTS}
    found = [
        (path, label)
        for label, of_class in enumerate(classes)
        for path in sorted(of_class.rglob("*"))
        if path.suffix.lower() in suffixes
    ]
    if len(classes) < 1 or len(found) < 2:
        raise UsageError(
            f"{source}: {len(classes)} folders with {len(found)} images came; a folder per class was wanted"
        )
    names = [path.name for path in classes]
    seen = files.fingerprint([[path.relative_to(source).as_posix(), path.stat().st_size] for path, _ in found])
    items = [(path, str(path), label, names[label]) for path, label in found]
    made_by = {"prepare": "folder", "size": size, "classes": names, "files": seen}
    return Source(str(source), items, partial(_read_file, size), made_by)


def table(path: Path, root: Path, size: int, columns: Columns) -> Source:
    """The rows of a CSV, JSONL or Parquet table: image paths under `root` with captions, labels or both.

    Labels that are names are numbered by name.  Raises UsageError naming the table and the row.
    """
    rows = read_table(path, columns)
    labels, names = number_labels(path, rows)
    sizes = [_bytes_of(path, row, root) for row in rows]
    items = [
        (root / row.path, f"{path}: row {row.number}: {root / row.path}", label, row.caption)
        for row, label in zip(rows, labels, strict=True)
    ]
    seen = [[row.path, size, row.caption, label] for row, size, label in zip(rows, sizes, labels, strict=True)]
    made_by: dict[str, Any] = {"prepare": "table", "size": size, "rows": files.fingerprint(seen)}
    if names:
        made_by["classes"] = names
    return Source(str(path), items, partial(_read_file, size), made_by)


def _bytes_of(table_path: Path, row: Row, root: Path) -> int:
    try:
        if (root / row.path).is_file():
            return (root / row.path).stat().st_size
        raise FileNotFoundError("no such image file")
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"{table_path}: row {row.number}: {root / row.path}: {said}") from None


def _read_file(size: int, item: tuple[Path, str, int | None, str | None]) -> Picture:
    path, where, label, caption = item
    try:
        return Picture(images.decode(path.read_bytes(), size), label, caption)
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from None


def emojis(font: Path, size: int) -> Source:
    """Every emoji that a colour font draws, with its Unicode name as the caption and no label."""
    found = emoji.list_emojis(font)
    made_by = {"prepare": "emoji", "size": size, "font": files.sha256(font), "names": files.fingerprint(found)}
    return Source(str(font), found, partial(_draw_emoji, font, size), made_by, num_shards=(7, 3))


def _draw_emoji(font: Path, size: int, item: tuple[str, str]) -> Picture:
    character, name = item
    return Picture(emoji.draw(font, character, size), caption=name)
