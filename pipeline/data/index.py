"""tar → offsets: a header-only scan that trusts nothing, kept beside the shards.

A shard is a WebDataset tar: members named KEY.PART, the parts of a key side by side.  A torn tar reads without
any error in most readers, so every header's checksum and both end-of-archive blocks are checked here, once, and
training reads samples by offset afterwards.  `index/manifest.json` lists the shards with size, count and SHA-256;
`index/NAME.npz` holds a shard's keys and offsets.
"""

from __future__ import annotations

import os
import re
import zipfile
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
META = re.compile(r"__[^/]*__(/|$)")  # members that webdataset passes over as metadata


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
    if not stem or not dot or not part or "\0" in name:
        raise BadShardError(path, offset, f"member {name!r} is not named KEY.PART")
    if name.startswith("/") or ".." in folder.split("/"):
        raise BadShardError(path, offset, f"member {name!r} points out of the archive")
    if META.match(name) or part.startswith("__"):
        raise BadShardError(path, offset, f"member {name!r} has a name that WebDataset keeps for itself")
    return folder + slash + stem, part.lower()


def _members(path: Path, file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Yield (name, data offset, size) of each regular file, up to both end-of-archive blocks."""
    total = path.stat().st_size
    position = 0
    said: dict[bytes, bytes] = {}  # by an extended header, of the member after it
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise BadShardError(path, position, "the tar ends without its two end-of-archive blocks: it is cut short")
        if not any(header):
            if file.read(BLOCK) != bytes(BLOCK):
                raise BadShardError(path, position, "one end-of-archive block without the second: it is cut short")
            _check_rest(path, file)
            return
        kind, size = header[156:157], _check_header(path, header, position)
        if kind not in b"xgL" and b"size" in said:
            size = int(said[b"size"])
        start, data, position = position, position + BLOCK, position + BLOCK + -(-size // BLOCK) * BLOCK
        if position > total:
            raise BadShardError(path, data, f"a member of {size} bytes reaches past the end of the file")
        match kind:
            case b"0" | b"\0":
                name, said = _name(path, header, start, said), {}
                yield name, data, size
            case b"x" | b"g" | b"L":
                file.seek(data)
                new = _extended(path, kind, file.read(size), data)
                if kind == b"g" and new:
                    raise BadShardError(path, data, "a global header gives all members one path or size")
                said |= new
            case b"5":  # a folder
                said = {}
            case _:
                raise BadShardError(path, start, f"member of type {kind!r}: only regular files are read")


def _check_rest(path: Path, file: BinaryIO) -> None:
    """After the end only padding may come: a hole of zeros among the members looks like an end, too."""
    while rest := file.read(1 << 20):
        if any(rest):
            at = file.tell() - len(rest.lstrip(b"\0"))
            raise BadShardError(path, at, "more bytes after the end-of-archive blocks: a hole, or a second archive")


def _check_header(path: Path, header: bytes, offset: int) -> int:
    """The member's size, after the checksum has been found right (POSIX ustar, strictly)."""
    stored = _octal(header[148:156])
    if stored is None:
        raise BadShardError(path, offset, "not a tar header (its checksum field is malformed)")
    if stored != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise BadShardError(path, offset, "the header's checksum is wrong")
    field = header[124:136]
    size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)  # base-256: 8 GiB and more
    if size is None:
        raise BadShardError(path, offset, f"the header's size field is not octal: {field!r}")
    return size


def _octal(field: bytes) -> int | None:
    """The number in a header's field: octal digits, with blanks before and blanks or NULs after them."""
    digits = re.fullmatch(rb" *([0-7]*)[ \0]*", field)
    return int(digits[1] or b"0", 8) if digits else None


def _name(path: Path, header: bytes, offset: int, said: dict[bytes, bytes]) -> str:
    name = header[:100].split(b"\0")[0]
    if b"path" in said:
        name = said[b"path"]
    elif header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0")[0]):
        name = prefix + b"/" + name
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise BadShardError(path, offset, f"the member's name is not UTF-8: {name!r}") from None


def _extended(path: Path, kind: bytes, record: bytes, offset: int) -> dict[bytes, bytes]:
    """The path and size that a GNU long-name member (L) or a pax header (x, g) gives the next member."""
    if kind == b"L":
        return {b"path": record.split(b"\0")[0]}
    said: dict[bytes, bytes] = {}
    while record:  # lines "LENGTH KEY=VALUE\n", LENGTH counting the whole line (POSIX pax)
        begin = re.match(rb"(\d{1,18}) ([^=]+)=", record)
        length = int(begin[1]) if begin else 0
        if not begin or not begin.end() < length <= len(record) or record[length - 1 : length] != b"\n":
            raise BadShardError(path, offset, "a malformed extended header")
        key, value, record = begin[2], record[begin.end() : length - 1], record[length:]
        if key.startswith(b"GNU.sparse.") or (key == b"size" and not re.fullmatch(rb"\d{1,18}", value)):
            raise BadShardError(path, offset, f"an extended header with {key!r}: only regular files are read")
        if key in (b"path", b"size"):
            said[key] = value
    return said


def build_index(folder: Path, required: tuple[frozenset[str], ...] = (), source: dict[str, Any] | None = None) -> None:
    """Scan every tar of a folder and write `index/`.

    `required`: of each set of part names, every sample must have one.  `source`: what made the shards, kept in the
    manifest.  Raises UsageError naming every bad shard, in one line each, before anything is written.
    """
    shards = list_shards(folder)
    wrong: list[str] = []
    for path in shards:
        try:
            check_parts(path, scan(path), required)
        except BadShardError as error:
            wrong.append(str(error))
    if wrong:
        raise UsageError("\n".join(wrong))
    entries: list[dict[str, Any]] = []
    for path in shards:  # scanned again: the offsets of all shards may not fit in memory
        index = scan(path)
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
        found = {path.name for path in list_shards(folder)}
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
        if new := sorted(found - set(self.names)):
            raise UsageError(f"{folder / new[0]}: not indexed; move it away, or run: python -m pipeline index {folder}")
        self._index = lru_cache(maxsize=open_shards)(self._load_index)
        self._file = lru_cache(maxsize=open_shards)(lambda shard: (folder / self.names[shard]).open("rb", buffering=0))

    def __len__(self) -> int:
        return sum(self.counts)

    def _load_index(self, shard: int) -> ShardIndex:
        path = _sidecar(self.folder, self.names[shard])
        try:
            index = ShardIndex.load(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path}: unreadable ({error}); run: python -m pipeline index {self.folder}") from None
        if len(index.keys) != self.counts[shard]:
            raise UsageError(
                f"{path}: {len(index.keys)} samples came, the manifest says {self.counts[shard]}; "
                f"run: python -m pipeline index {self.folder}"
            )
        return index

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
