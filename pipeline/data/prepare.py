"""Pictures → image shards: WebDataset tars with KEY.png or KEY.jpg, and KEY.cls and KEY.txt where there are such.

Same input, same bytes, for any number of processes: members carry no time, and the order is a function of the seed.
What identifies a set is written first and each shard is written whole, so a killed prepare goes on with the shards
that are missing when the same command is run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from tqdm import tqdm
from webdataset.writer import TarWriter

from pipeline import files
from pipeline.data import emoji, images, preview, sources
from pipeline.data.index import build_index
from pipeline.data.processes import in_order
from pipeline.data.sources import Picture, Source
from pipeline.data.tables import Columns
from pipeline.errors import UsageError

FORMAT = 1
REQUIRED = (images.PARTS,)
SHARD_IMAGES = 1000
CHUNK_IMAGES = 16  # what a process is given at once
ImageFormat = Literal["png", "jpg"]


def prepare_digits(out: Path, *, size: int, seed: int, validation_share: float, workers: int = 0) -> None:
    """scikit-learn's 1,797 digits → out/train and out/validation, with a label and a caption each."""
    write_sets(out, sources.digits(size), seed=seed, validation_share=validation_share, workers=workers)


def prepare_emoji(
    out: Path, *, size: int, seed: int, validation_share: float, font: Path = emoji.FONT, workers: int = 0
) -> None:
    """The emoji of a colour font, captioned with their Unicode names → out/train and out/validation."""
    write_sets(out, sources.emojis(font, size), seed=seed, validation_share=validation_share, workers=workers)


def prepare_folder(
    source: Path,
    out: Path,
    *,
    size: int,
    seed: int,
    validation_share: float,
    image_format: ImageFormat = "png",
    workers: int = 0,
) -> str:
    """A folder per class → out/train and out/validation.  Raises UsageError naming what is not a readable image.

    Gives what was passed over, in one line; "" where nothing was.
    """
    found, passed_over = sources.folder(source, size)
    write_sets(out, found, seed=seed, validation_share=validation_share, image_format=image_format, workers=workers)
    return passed_over


def prepare_table(
    table: Path,
    root: Path,
    out: Path,
    *,
    size: int,
    seed: int,
    validation_share: float,
    columns: Columns | None = None,
    image_format: ImageFormat = "png",
    workers: int = 0,
) -> None:
    """A table's images with captions, labels or both → out/train and out/validation.

    Raises UsageError naming the table and the row that can't be used.
    """
    found = sources.table(table, root, size, columns or Columns())
    write_sets(out, found, seed=seed, validation_share=validation_share, image_format=image_format, workers=workers)


def write_sets(
    out: Path,
    source: Source,
    *,
    seed: int,
    validation_share: float,
    image_format: ImageFormat = "png",
    workers: int = 0,
) -> None:
    """Split a source by the seed and write both parts.

    `workers`: processes that draw and encode; 0: this one does.  Raises UsageError where another set lies there.
    """
    made_by = {**source.made_by, "seed": seed, "validation_share": validation_share}
    if image_format != "png":
        made_by["image_format"] = image_format
    folders = (out / "train", out / "validation")
    complete = [_is_complete(folder, made_by) for folder in folders]
    if all(complete):
        return
    split = _split(source, seed, validation_share)
    sizes = [
        uneven_sizes(len(rows), num) if num else even_sizes(len(rows))
        for rows, num in zip(split, source.num_shards or (0, 0), strict=True)
    ]
    for folder, of_folder in zip(folders, sizes, strict=True):
        _refuse_strays(folder, of_folder)
    draws = (source.draw, source.draw_held_out or source.draw)
    for folder, rows, of_folder, is_there, draw in zip(folders, split, sizes, complete, draws, strict=True):
        if not is_there:
            encode = partial(_encode, draw, image_format)
            items = [source.items[int(row)] for row in rows]
            write_set(folder, items, encode, sizes=of_folder, made_by=made_by, workers=workers)


def _split(source: Source, seed: int, validation_share: float) -> list[NDArray[np.int64]]:
    """Rows to train on and rows held out."""
    rows = np.arange(len(source.items))
    try:
        split: Any = train_test_split(rows, test_size=validation_share, random_state=seed, stratify=source.classes)
    except ValueError as error:
        raise UsageError(
            f"{source.name}: {len(rows)} images, {validation_share} of them for validation: {error}"
        ) from None
    return split


def even_sizes(total: int) -> list[int]:
    """Shards of 1,000 images, and the rest."""
    whole_shards, rest = divmod(total, SHARD_IMAGES)
    return [SHARD_IMAGES] * whole_shards + ([rest] if rest else [])


def uneven_sizes(total: int, num_shards: int) -> list[int]:
    """Shard sizes in the proportion 1 : 2 : … : n that add up to `total`."""
    weights = np.arange(1, num_shards + 1)
    ends = np.rint(np.cumsum(weights) / weights.sum() * total).astype(int)
    return np.diff(ends, prepend=0).tolist()


def write_set(
    folder: Path,
    items: Sequence[Any],
    encode: Callable[[Any], dict[str, bytes]],
    *,
    sizes: list[int],
    made_by: dict[str, Any],
    workers: int,
) -> None:
    """Write the shards that are not there yet, their index, the contact sheet, and last that the set is complete."""
    names = _shard_names(sizes)
    said = {"format": FORMAT, "kind": "images", "complete": False, "made_by": made_by}
    files.write_json(folder / "dataset.json", said)
    firsts = np.cumsum([0, *sizes]).tolist()
    missing = [shard for shard, name in enumerate(names) if _record(folder, name, made_by) is None]
    wanted = [range(firsts[shard], firsts[shard + 1]) for shard in missing]
    samples = in_order(encode, [items[i] for keys in wanted for i in keys], workers, chunk_items=CHUNK_IMAGES)
    with tqdm(total=len(items), desc=f"prepare {folder}", unit=" images", dynamic_ncols=True) as bar:
        bar.update(len(items) - sum(map(len, wanted)))
        for shard, keys in zip(missing, wanted, strict=True):
            with files.whole(folder / names[shard]) as aside:
                labels = _write_shard(aside, keys, islice(samples, len(keys)), bar)
                # Before the tar takes its name: a tar that is there has its record.
                made = {"made_by": files.fingerprint(made_by), "bytes": aside.stat().st_size}
                files.write_json(_record_path(folder, names[shard]), {**made, "labels": labels})
    build_index(folder, REQUIRED, made_by)
    preview.write_preview(folder, made_by["size"])
    total: Counter[int] = Counter()
    for name in names:
        record = _record(folder, name, made_by) or {"labels": {}}
        total.update({int(label): count for label, count in record["labels"].items()})
    of_labels = {str(label): total[label] for label in sorted(total)}
    done = {"complete": True, "num_samples": len(items), "label_counts": of_labels}
    files.write_json(folder / "dataset.json", said | done)


def _write_shard(path: Path, keys: range, samples: Iterator[dict[str, bytes]], bar: tqdm[Any]) -> dict[str, int]:
    """Write one tar; give how many samples it has of each label."""
    labels: Counter[str] = Counter()
    with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        for key, sample in zip(keys, samples, strict=True):
            if "cls" in sample:
                labels[sample["cls"].decode()] += 1
            writer.write({"__key__": f"{key:08d}", **sample})
            bar.update()
    return dict(sorted(labels.items()))


def _record_path(folder: Path, name: str) -> Path:
    return folder / "index" / f"{name.removesuffix('.tar')}.prepared.json"


def _record(folder: Path, name: str, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """What was noted of a shard; nothing where it is missing, or another than was noted."""
    try:
        said = files.read_json(_record_path(folder, name))
        num_bytes = (folder / name).stat().st_size
    except (OSError, ValueError):
        return None
    return said if (said.get("made_by"), said.get("bytes")) == (files.fingerprint(made_by), num_bytes) else None


def _encode(draw: Callable[[Any], Picture], image_format: ImageFormat, item: Any) -> dict[str, bytes]:
    """An item → the parts of its sample."""
    picture = draw(item)
    encode = images.encode_png if image_format == "png" else images.encode_jpeg
    parts = {image_format: encode(picture.image)}
    if picture.label is not None:
        parts["cls"] = str(picture.label).encode()
    if picture.caption is not None:
        parts["txt"] = picture.caption.encode()
    return parts


def _shard_names(sizes: list[int]) -> list[str]:
    return [f"{shard:06d}.tar" for shard in range(len(sizes))]


def _refuse_strays(folder: Path, sizes: list[int]) -> None:
    """Raise UsageError where the folder holds other tars."""
    if stray := sorted({path.name for path in folder.glob("*.tar")} - set(_shard_names(sizes))):
        raise UsageError(f"{folder}: holds {stray[0]}, which does not belong to this set; choose another folder")


def _is_complete(folder: Path, made_by: dict[str, Any]) -> bool:
    """Whether this very set lies there, whole.  Raises UsageError where another one does, whole or begun."""
    if not (folder / "dataset.json").exists():
        return False
    said = files.read_json(folder / "dataset.json")
    if said.get("made_by") != made_by:
        was = said.get("made_by")
        raise UsageError(f"{folder}: holds a set made by {was}, {made_by} was asked for; choose another folder")
    return said.get("complete") is True
