"""tar → offsets: a header-only scan that trusts nothing, kept beside the shards.

A shard is a WebDataset tar: members named KEY.PART, the parts of a key side by side.  A torn tar reads without
any error in most readers, so every header's checksum and both end-of-archive blocks are checked here, once, and
training reads samples by offset afterwards.  `index/manifest.json` lists the shards with size, count and SHA-256;
`index/NAME.npz` holds a shard's keys and offsets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline import files
from pipeline.errors import UsageError

BLOCK = 512  # bytes: tar's unit
FORMAT = 1
ABSENT = (-1, 0)


class BadShardError(ValueError):
    """A tar that can't be trusted: name, byte offset and reason."""

    def __init__(self, path: Path, offset: int, reason: str) -> None:
        super().__init__(f"{path}: at byte {offset}: {reason}")


@dataclass(frozen=True)
class ShardIndex:
    """Where the parts of each sample lie in one tar."""

    keys: tuple[str, ...]
    parts: tuple[str, ...]  # sorted names of all parts that occur, such as ("cls", "png")
    offsets: NDArray[np.int64]  # [samples, parts, 2]: byte offset and size; (-1, 0) where a sample lacks a part

    def save(self, path: Path) -> None:
        """Write `path` (npz, no pickle)."""
        keys = np.array([key.encode() for key in self.keys], dtype=np.bytes_)
        parts = np.array([part.encode() for part in self.parts], dtype=np.bytes_)
        with files.whole(path) as aside, aside.open("wb") as file:
            np.savez(file, keys=keys, parts=parts, offsets=self.offsets)

    @staticmethod
    def load(path: Path) -> ShardIndex:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return ShardIndex(
                tuple(bytes(key).decode() for key in arrays["keys"]),
                tuple(bytes(part).decode() for part in arrays["parts"]),
                arrays["offsets"],
            )


def scan(path: Path) -> ShardIndex:
    """Read a tar's headers only.  Raises BadShardError with the byte offset of the first thing that is wrong."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    current: str | None = None
    with path.open("rb") as file:
        for name, offset, size in _members(path, file):
            key, part = _split(path, name, offset)
            if key != current and key in samples:
                raise BadShardError(
                    path, offset, f"the parts of key {key!r} do not lie side by side, or it comes twice"
                )
            current = key
            if part in samples.setdefault(key, {}):
                raise BadShardError(path, offset, f"{name!r} comes twice")
            samples[key][part] = (offset, size)
    parts = sorted({part for sample in samples.values() for part in sample})
    offsets = np.full((len(samples), len(parts), 2), ABSENT, dtype=np.int64)
    for row, sample in enumerate(samples.values()):
        for part, place in sample.items():
            offsets[row, parts.index(part)] = place
    return ShardIndex(tuple(samples), tuple(parts), offsets)


def _split(path: Path, name: str, offset: int) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, dot, part = base.partition(".")  # as webdataset: the key ends at the first dot of the last name
    if not stem or not dot or not part:
        raise BadShardError(path, offset, f"member {name!r} is not named KEY.PART")
    if name.startswith("/") or ".." in folder.split("/"):
        raise BadShardError(path, offset, f"member {name!r} points out of the archive")
    return folder + slash + stem, part.lower()


def _members(path: Path, file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Yield (name, data offset, size) of each regular file, up to both end-of-archive blocks."""
    total = path.stat().st_size
    position = 0
    long_name: str | None = None
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise BadShardError(path, position, "the tar ends without its two end-of-archive blocks: it is cut short")
        if not any(header):
            if file.read(BLOCK) != bytes(BLOCK):
                raise BadShardError(path, position, "one end-of-archive block without the second: it is cut short")
            return
        size = _check_header(path, header, position)
        data, position = position + BLOCK, position + BLOCK + -(-size // BLOCK) * BLOCK
        if position > total:
            raise BadShardError(path, data, f"a member of {size} bytes reaches past the end of the file")
        match header[156:157]:
            case b"0" | b"\0":
                name, long_name = long_name or _name(path, header, data - BLOCK), None
                yield name, data, size
            case b"x" | b"L":
                file.seek(data)
                long_name = _long_name(path, header[156:157], file.read(size), data) or long_name
            case b"g" | b"5":  # global remarks; folders
                continue
            case kind:
                raise BadShardError(path, data - BLOCK, f"member of type {kind!r}: only regular files are read")


def _check_header(path: Path, header: bytes, offset: int) -> int:
    """The member's size, after the checksum has been found right (POSIX ustar, strictly)."""
    stored = header[148:156]
    digits = stored[:6]
    if stored[6:] not in (b"\0 ", b" \0", b"\0\0") or not digits.isdigit():
        raise BadShardError(path, offset, "not a tar header (its checksum field is malformed)")
    if int(digits, 8) != sum(header) - sum(stored) + 8 * ord(" "):
        raise BadShardError(path, offset, "the header's checksum is wrong")
    field = header[124:136]
    if field[0] & 0x80:  # base-256, for members of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise BadShardError(path, offset, f"the header's size field is not octal: {field!r}") from None


def _name(path: Path, header: bytes, offset: int) -> str:
    name, prefix = header[:100].split(b"\0")[0], b""
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0")[0]
    try:
        return (prefix + b"/" + name if prefix else name).decode()
    except UnicodeDecodeError:
        raise BadShardError(path, offset, f"the member's name is not UTF-8: {name!r}") from None


def _long_name(path: Path, kind: bytes, record: bytes, offset: int) -> str | None:
    """The name in a GNU long-name member, or the path in a pax header."""
    try:
        if kind == b"L":
            return record.split(b"\0")[0].decode()
        while record:
            length = int(record.split(b" ", 1)[0])
            key, _, value = record[: length - 1].split(b" ", 1)[1].partition(b"=")
            if key == b"path":
                return value.decode()
            if length <= 0:
                raise ValueError
            record = record[length:]
    except (ValueError, IndexError):
        raise BadShardError(path, offset, "a malformed extended header") from None
    return None


def build_index(folder: Path, required: tuple[frozenset[str], ...] = (), source: dict[str, Any] | None = None) -> None:
    """Scan every tar of a folder and write `index/`.

    `required`: of each set of part names, every sample must have one.  `source`: what made the shards, kept in the
    manifest.  Raises UsageError naming every bad shard, in one line each, before anything is written.
    """
    shards = list_shards(folder)
    wrong: list[str] = []
    entries: list[dict[str, Any]] = []
    for path in shards:
        try:
            index = scan(path)
            check_parts(path, index, required)
        except BadShardError as error:
            wrong.append(str(error))
            continue
        index.save(_sidecar(folder, path.name))
        entries.append(
            {
                "name": path.name,
                "bytes": path.stat().st_size,
                "samples": len(index.keys),
                "parts": list(index.parts),
                "sha256": files.sha256(path),
            }
        )
    if wrong:
        raise UsageError("\n".join(wrong))
    manifest = {"format": FORMAT, "fingerprint": files.fingerprint(entries), "shards": entries, "source": source}
    files.write_json(folder / "index" / "manifest.json", manifest)


def check_parts(path: Path, index: ShardIndex, required: tuple[frozenset[str], ...]) -> None:
    """Raise BadShardError where a sample has none of a required set of parts."""
    for wanted in required:
        columns = [i for i, part in enumerate(index.parts) if part in wanted]
        lacking = np.flatnonzero((index.offsets[:, columns, 0] < 0).all(axis=1))
        if lacking.size:
            row = int(lacking[0])
            at = int(index.offsets[row, :, 0].max())
            raise BadShardError(path, at, f"sample {index.keys[row]!r} has no part {' or '.join(sorted(wanted))}")


def list_shards(folder: Path) -> list[Path]:
    """The tars of a folder by name.  Raises UsageError where the folder is missing or has none."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of shards")
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UsageError(f"{folder}: no *.tar in this folder")
    return shards


def _sidecar(folder: Path, name: str) -> Path:
    return folder / "index" / f"{name.removesuffix('.tar')}.npz"


class ShardSet:
    """An indexed folder: samples by (shard, row), read with pread through few open files."""

    def __init__(self, folder: Path, open_shards: int) -> None:
        """Raises UsageError where the folder, its index or a shard is missing, or a shard changed since."""
        self.folder = folder
        list_shards(folder)
        try:
            manifest = files.read_json(folder / "index" / "manifest.json")
        except (OSError, ValueError):
            raise UsageError(f"{folder}: not indexed; run: python -m pipeline index {folder}") from None
        if manifest.get("format") != FORMAT:
            raise UsageError(
                f"{folder}/index: format {manifest.get('format')!r} came, {FORMAT} was wanted; "
                f"run: python -m pipeline index {folder}"
            )
        self.fingerprint: str = manifest["fingerprint"]
        self.names: list[str] = [entry["name"] for entry in manifest["shards"]]
        self.counts: list[int] = [entry["samples"] for entry in manifest["shards"]]
        for entry in manifest["shards"]:
            path = folder / entry["name"]
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                raise UsageError(
                    f"{path}: {'missing' if size is None else f'{size} bytes'} came, {entry['bytes']} bytes were "
                    f"indexed; restore it, or run: python -m pipeline index {folder}"
                )
        self._index = lru_cache(maxsize=open_shards)(lambda shard: ShardIndex.load(_sidecar(folder, self.names[shard])))
        self._file = lru_cache(maxsize=open_shards)(lambda shard: (folder / self.names[shard]).open("rb", buffering=0))

    def __len__(self) -> int:
        return sum(self.counts)

    def read(self, shard: int, row: int) -> tuple[str, dict[str, bytes]]:
        """Key and parts of a sample.  A short read raises OSError with the shard's name."""
        index: ShardIndex = self._index(shard)
        descriptor = self._file(shard).fileno()
        parts: dict[str, bytes] = {}
        for part, (offset, size) in zip(index.parts, index.offsets[row].tolist(), strict=True):
            if offset >= 0:
                parts[part] = os.pread(descriptor, size, offset)
                if len(parts[part]) != size:
                    raise OSError(f"{self.folder / self.names[shard]}: {size} bytes wanted at {offset}: short read")
        return index.keys[row], parts

    def where(self, shard: int, row: int) -> str:
        """A sample's place, for error messages."""
        return f"{self.folder / self.names[shard]}: sample {self._index(shard).keys[row]!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "open_shards": self._index.cache_info().maxsize}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)
