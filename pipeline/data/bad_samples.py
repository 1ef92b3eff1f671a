"""Every sample read once, as training reads it: those that it could not use, and why.

Shards are read in order by webdataset's own pipeline, from streams that are opened here.  It is given no URL, since it
would run the command in a `pipe:` one, and its decoders stay out, since they run pickles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tarfile import TarError
from typing import Any

from tqdm import tqdm
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline import files
from pipeline.data import images, latents
from pipeline.data.index import BAD_SAMPLES
from pipeline.data.pieces import Parts, caption, class_label, image_part
from pipeline.data.processes import in_order
from pipeline.errors import RunError

LOOK_SIZE = 64  # pixels that images are scaled to: all of a file is decoded for any
VALUE = re.compile(r"b?'[^']*'|b?\"[^\"]*\"|(?<![\w-])-?\d[\d,.]*\b")  # quoted, or a number (not that of UTF-8)


@dataclass(frozen=True)
class BadSample:
    """A sample that training would replace."""

    shard: str  # the tar's name
    key: str
    reason: str


@dataclass(frozen=True)
class Kind:
    """Bad samples whose reasons differ in numbers and quoted values alone."""

    reason: str
    count: int
    first: BadSample


def find_bad_samples(folder: Path, workers: int) -> list[BadSample]:
    """Read all samples of an indexed folder in `workers` processes; write and give the bad, by shard and key.

    FOLDER/index/bad_samples.jsonl holds one a line, and is not there where all are good.  Raises RunError where a
    shard can't be read as it was indexed.
    """
    shards = files.read_json(folder / "index" / "manifest.json")["shards"]
    names: list[str] = [entry["name"] for entry in shards]
    found: list[BadSample] = []
    with tqdm(
        total=sum(entry["samples"] for entry in shards),
        desc=f"read {folder}",
        unit=" samples",
        dynamic_ncols=True,
    ) as bar:
        results = in_order(partial(read_shard, folder), names, workers, chunk_items=1)
        for entry, (num_samples, bad) in zip(shards, results, strict=True):
            if num_samples != entry["samples"]:
                raise RunError(
                    f"{folder / entry['name']}: {num_samples} samples came, {entry['samples']} were indexed: it has "
                    f"changed; run: python -m pipeline index {folder} --verify"
                )
            found += bad
            bar.update(num_samples)
    found.sort(key=lambda bad: (bad.shard, bad.key))
    listed = folder / "index" / BAD_SAMPLES
    if found:
        files.write_text(listed, "".join(json.dumps(asdict(bad), ensure_ascii=False) + "\n" for bad in found))
    else:
        listed.unlink(missing_ok=True)
    return found


def read_shard(folder: Path, name: str) -> tuple[int, list[BadSample]]:
    """The number of samples in a shard, and the bad ones.  Raises RunError where the tar can't be read."""
    num_samples = 0
    bad: list[BadSample] = []
    try:
        for key, parts in _samples(folder / name):
            num_samples += 1
            if reason := what_is_wrong(parts):
                bad.append(BadSample(name, key, reason))
    except (OSError, ValueError, EOFError, TarError) as error:  # webdataset adds remarks of its own to the arguments
        said = error.strerror if isinstance(error, OSError) and error.strerror else error.args[0]
        raise RunError(f"{folder / name}: {type(error).__name__}: {said}") from None
    return num_samples, bad


def what_is_wrong(parts: Parts) -> str:
    """Why training can't use a sample with these parts; "" where it can."""
    try:
        if latents.PART in parts:
            latents.moments_from_bytes(parts[latents.PART])
        if images.PARTS & parts.keys() or latents.PART not in parts:
            images.decode(image_part(parts), LOOK_SIZE)
        if "cls" in parts:
            class_label(parts)
        if "txt" in parts:
            caption(parts)
    except ValueError as error:
        return str(error)
    return ""


def by_kind(found: list[BadSample]) -> list[Kind]:
    """Bad samples counted by reason, the most frequent first."""
    kinds: dict[str, list[BadSample]] = {}
    for bad in found:
        kinds.setdefault(VALUE.sub("…", bad.reason), []).append(bad)
    told = [Kind(reason, len(of_kind), of_kind[0]) for reason, of_kind in kinds.items()]
    return sorted(told, key=lambda kind: (-kind.count, kind.reason))


def _samples(path: Path) -> Iterator[tuple[str, Parts]]:
    """Key and parts of each sample; of several images the first by name is the one that training reads."""
    with path.open("rb") as stream:
        opened: list[dict[str, Any]] = [{"url": str(path), "stream": stream}]
        for sample in group_by_keys(tar_file_expander(opened)):
            names = sorted(name for name in sample if not name.startswith("__"))
            yield sample["__key__"], {name: sample[name] for name in names}
