"""Pictures from elsewhere → image shards: WebDataset tars with KEY.png, KEY.cls and KEY.txt.

Same input, same bytes: members carry no time, and the order is a function of the seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm
from webdataset.writer import TarWriter

from pipeline import files
from pipeline.data import images
from pipeline.data.index import build_index
from pipeline.errors import UsageError

FORMAT = 1
REQUIRED = (images.PARTS,)
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = ("a handwritten digit {}", "the digit {}, written by hand", "a handwritten {}", "a scan of the digit {}")


@dataclass(frozen=True)
class Picture:
    """One image on its way into a shard."""

    image: NDArray[np.uint8]  # [H,W] or [H,W,3]
    label: int
    caption: str


def prepare_digits(out: Path, *, size: int, seed: int, validation_share: float) -> None:
    """scikit-learn's digits (Alpaydin & Kaynak 1998), 1,797 grey images of 8×8, to out/train and out/validation.

    Scaled to `size` pixels (bicubic).  The split is random and keeps the share of every class: a split by order
    would put other writers into the validation set.
    """
    made_by = {"prepare": "digits", "size": size, "seed": seed, "validation_share": validation_share}
    sets = (out / "train", out / "validation")
    if _already_made(sets, made_by):
        return
    digits: Any = load_digits()
    labels: NDArray[np.int64] = digits.target
    rows = np.arange(len(labels))
    split = _split(rows, seed, validation_share, classes=labels)
    for folder, chosen, num_shards in zip(sets, split, (7, 3), strict=True):
        pictures = (
            Picture(
                _scale_digit(digits.images[row], size),
                int(labels[row]),
                WORDINGS[int(row) % len(WORDINGS)].format(DIGIT_NAMES[int(labels[row])]),
            )
            for row in chosen
        )
        write_set(folder, pictures, uneven_sizes(len(chosen), num_shards), made_by)


def prepare_folder(source: Path, out: Path, *, size: int, seed: int, validation_share: float) -> None:
    """A folder per class → out/train and out/validation.  Classes are numbered by name; the name is the caption.

    Raises UsageError naming the file where one is not a readable image.
    """
    classes = sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
    suffixes = {f".{part}" for part in images.PARTS}
    found = [
        (path, label)
        for label, folder in enumerate(classes)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in suffixes
    ]
    if len(classes) < 1 or len(found) < 2:
        raise UsageError(
            f"{source}: {len(classes)} folders with {len(found)} images came; a folder per class was wanted"
        )
    names = [path.name for path in classes]
    made_by = {
        "prepare": "folder",
        "size": size,
        "seed": seed,
        "validation_share": validation_share,
        "classes": names,
        "files": files.fingerprint([[path.relative_to(source).as_posix(), path.stat().st_size] for path, _ in found]),
    }
    sets = (out / "train", out / "validation")
    if _already_made(sets, made_by):
        return
    rows = np.arange(len(found))
    split = _split(rows, seed, validation_share)
    for folder, chosen in zip(sets, split, strict=True):
        pictures = (_read_picture(*found[int(row)], names, size) for row in chosen)
        whole_shards, rest = divmod(len(chosen), 1000)
        write_set(folder, pictures, [1000] * whole_shards + ([rest] if rest else []), made_by)


def _split(
    rows: NDArray[np.int64], seed: int, validation_share: float, classes: NDArray[np.int64] | None = None
) -> list[NDArray[np.int64]]:
    """Rows to train on and rows held out, with the share of every class where classes are given."""
    try:
        split: Any = train_test_split(rows, test_size=validation_share, random_state=seed, stratify=classes)
    except ValueError as error:
        raise UsageError(f"{len(rows)} images, {validation_share} of them for validation: {error}") from None
    return split


def _read_picture(path: Path, label: int, names: list[str], size: int) -> Picture:
    try:
        return Picture(images.decode(path.read_bytes(), size), label, names[label])
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None


def _scale_digit(image: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """8×8 in 0..16 → size×size in 0..255."""
    grey = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC))


def uneven_sizes(total: int, num_shards: int) -> list[int]:
    """Shard sizes in the proportion 1 : 2 : … : n that add up to `total`."""
    weights = np.arange(1, num_shards + 1)
    ends = np.rint(np.cumsum(weights) / weights.sum() * total).astype(int)
    return np.diff(ends, prepend=0).tolist()


def write_set(folder: Path, pictures: Iterable[Picture], sizes: list[int], made_by: dict[str, Any]) -> None:
    """Write shards of the given sizes, their index, and `dataset.json` last, which says that the set is complete.

    Raises UsageError where the folder holds other tars.
    """
    names = [f"{shard:06d}.tar" for shard in range(len(sizes))]
    if stray := sorted({path.name for path in folder.glob("*.tar")} - set(names)):
        raise UsageError(f"{folder}: holds {stray[0]}, which does not belong to this set; choose another folder")
    counts: Counter[int] = Counter()
    bar = tqdm(total=sum(sizes), desc=f"prepare {folder}", unit=" images", dynamic_ncols=True)
    pictures = iter(pictures)
    key = 0
    for name, size in zip(names, sizes, strict=True):
        with (
            files.whole(folder / name) as aside,
            aside.open("wb") as file,
            TarWriter(file, mtime=0, encoder=False) as writer,
        ):
            for picture in islice(pictures, size):
                counts[picture.label] += 1
                writer.write(
                    {
                        "__key__": f"{key:08d}",
                        "png": images.encode_png(picture.image),
                        "cls": str(picture.label).encode(),
                        "txt": picture.caption.encode(),
                    }
                )
                key += 1
                bar.update()
    bar.close()
    build_index(folder, REQUIRED, made_by)
    files.write_json(
        folder / "dataset.json",
        {
            "format": FORMAT,
            "kind": "images",
            "num_samples": sum(counts.values()),
            "label_counts": {str(label): counts[label] for label in sorted(counts)},
            "made_by": made_by,
        },
    )


def _already_made(sets: tuple[Path, ...], made_by: dict[str, Any]) -> bool:
    """Whether these very sets lie there.  Raises UsageError where another one does."""
    made = [folder for folder in sets if (folder / "dataset.json").exists()]
    for folder in made:
        was = files.read_json(folder / "dataset.json").get("made_by")
        if was != made_by:
            raise UsageError(f"{folder}: holds a set made by {was}, {made_by} was asked for; choose another folder")
    return len(made) == len(sets)
