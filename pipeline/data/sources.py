"""Where pictures come from: scikit-learn's digits, a folder per class, the rows of a table, an emoji font.

A source lists its items at once and draws each only when it is asked for, in whichever process asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from pipeline import files
from pipeline.data import emoji, images
from pipeline.data.tables import Columns, Row, number_labels, read_table
from pipeline.errors import UsageError

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LEFT_BY_SYSTEMS = frozenset({"Thumbs.db", "desktop.ini"})
SUFFIXES = frozenset(f".{part}" for part in images.PARTS)
WORDINGS = ("a handwritten digit {}", "the digit {}, written by hand", "a handwritten {}", "a scan of the digit {}")
HELD_OUT_WORDINGS = (  # of held-out images: what no training image's caption says in these words
    *("the handwritten digit {}", "a scan of a handwritten {}", "the digit {}", "a digit {}, written by hand"),
    *("a handwritten scan of {}", "a {} written by hand", "{}", "the scan of a digit, {}"),
)


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
    draw_held_out: Callable[[Any], Picture] | None = None  # where held-out items are drawn in another way
    num_shards: tuple[int, int] | None = None  # of train and validation, of uneven size; None: 1,000 images a shard


def digits(size: int) -> Source:
    """scikit-learn's digits (Alpaydin & Kaynak 1998): 1,797 grey images of 8×8, scaled to `size` pixels (bicubic).

    The split keeps the share of every class: a split by order would put other writers into the validation set.  The
    held-out images' captions are worded as no training image's is.
    """
    loaded: Any = load_digits()
    items = [(image, int(label), row) for row, (image, label) in enumerate(zip(*_arrays(loaded), strict=True))]
    made_by = {"prepare": "digits", "size": size}
    return Source(
        "digits",
        items,
        partial(_draw_digit, size, WORDINGS),
        made_by,
        classes=loaded.target,
        draw_held_out=partial(_draw_digit, size, HELD_OUT_WORDINGS),
        num_shards=(7, 3),
    )


def _arrays(loaded: Any) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    return loaded.images, loaded.target


def _draw_digit(size: int, wordings: Sequence[str], item: tuple[NDArray[np.float64], int, int]) -> Picture:
    image, label, row = item  # 8×8 in 0..16
    grey = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))
    scaled = np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC))
    return Picture(scaled, label, wordings[row % len(wordings)].format(DIGIT_NAMES[label]))


def folder(source: Path, size: int) -> tuple[Source, str]:
    """A folder per class.  Classes are numbered by name; the name is the caption.

    Names that begin with a dot are nobody's pictures.  With the source comes what else was passed over, in one line;
    "" where nothing was.  Raises UsageError where there are no classes, or no images.
    """
    top = [path for path in source.iterdir() if _is_seen(path.name)] if source.is_dir() else []
    classes = sorted(path for path in top if path.is_dir())
    within = [(path, label) for label, of_class in enumerate(classes) for path in _files_below(of_class)]
    found = [(path, label) for path, label in within if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    kept = {path for path, _ in found}
    unread = [path for path, _ in within if path not in kept] + sorted(path for path in top if not path.is_dir())
    passed_over = _say_unread(source, unread)
    if len(classes) < 1 or len(found) < 2:
        raise UsageError(
            f"{source}: {len(classes)} folders with {len(found)} images came; a folder per class was wanted"
            + (f"; {passed_over}" if passed_over else "")
        )
    names = [path.name for path in classes]
    if empty := sorted(set(range(len(classes))) - {label for _, label in found}):
        bare = f"classes without an image: {len(empty):,} (such as {names[empty[0]]})"
        passed_over = f"{passed_over}; {bare}" if passed_over else bare
    seen = files.fingerprint([[path.relative_to(source).as_posix(), _num_bytes(path)] for path, _ in found])
    items = [(path, str(path), label, names[label]) for path, label in found]
    made_by = {"prepare": "folder", "size": size, "classes": names, "files": seen}
    return Source(str(source), items, partial(_read_file, size), made_by), passed_over


def _is_seen(name: str) -> bool:
    return not name.startswith(".") and name not in LEFT_BY_SYSTEMS


def _files_below(folder: Path) -> list[Path]:
    """All files in a folder and those within it, sorted, and links to folders, which are not followed."""
    found: list[Path] = []
    for at, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = filter(_is_seen, folders)
        linked = [name for name in folders if Path(at, name).is_symlink()]
        found += [Path(at, name) for name in (*filter(_is_seen, names), *linked)]
    return sorted(found)


def _say_unread(source: Path, unread: list[Path]) -> str:
    """How many files of each ending are not read, with an example; "" where there are none."""
    kinds: dict[str, list[Path]] = {}
    for path in unread:
        ending = path.suffix.lower()
        if path.is_dir():
            kind = "linked folder"
        elif ending in SUFFIXES:
            kind = f"{ending} in no class folder"
        else:
            kind = ending or "without an ending"
        kinds.setdefault(kind, []).append(path)
    told = [f"{len(of):,} {kind} (such as {of[0].relative_to(source)})" for kind, of in sorted(kinds.items())]
    return f"passed over: {', '.join(told)}; JPEG, PNG and WebP in class folders are read" if told else ""


def _num_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    raise UsageError(f"{error.filename}: {error.strerror}") from None


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
