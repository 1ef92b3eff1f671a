"""One tar → where its samples lie: a strict scan of the headers that trusts nothing.

A shard is a WebDataset tar: members named KEY.PART, the parts of a key side by side.  A torn tar reads without
any error in most readers, so every header's checksum and both end-of-archive blocks are checked here, once, and
training reads samples by offset afterwards.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import adler32

import numpy as np
from numpy.typing import NDArray

from pipeline import files

BLOCK = 512  # bytes: tar's unit
ZEROS = bytes(BLOCK)
HEADERS_CHUNK = 1 << 14  # bytes read at once where only headers are wanted: holds the small parts after an image
WHOLE_CHUNK = 1 << 20  # bytes read at once where all of them are
ABSENT = (-1, 0)
META = re.compile(r"__[^/]*__(/|$)")  # members that webdataset passes over as metadata
OCTAL = re.compile(rb" *([0-7]*)[ \0]*")  # octal digits, with blanks before and blanks or NULs after them


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
    num_bytes: int = 0  # the tar's size
    sha256: str = ""  # of the tar's content, in hex; empty where only the headers were read

    def save(self, path: Path, mtime_ns: int | None = None) -> None:
        """Write `path` (npz, no pickle), and give the file a time of last change."""
        keys = np.array([key.encode() for key in self.keys], dtype=np.bytes_)
        parts = np.array([part.encode() for part in self.parts], dtype=np.bytes_)
        with files.whole(path) as aside:
            with aside.open("wb") as file:
                np.savez(
                    file,
                    keys=keys,
                    parts=parts,
                    offsets=self.offsets,
                    num_bytes=np.int64(self.num_bytes),
                    sha256=np.bytes_(self.sha256.encode()),
                )
            if mtime_ns is not None:
                os.utime(aside, ns=(mtime_ns, mtime_ns))

    @staticmethod
    def load(path: Path) -> ShardIndex:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return ShardIndex(
                tuple(bytes(key).decode() for key in arrays["keys"]),
                tuple(bytes(part).decode() for part in arrays["parts"]),
                arrays["offsets"],
                int(arrays["num_bytes"]) if "num_bytes" in arrays else 0,
                bytes(arrays["sha256"]).decode() if "sha256" in arrays else "",
            )


def scan(path: Path, whole: bool = False) -> ShardIndex:
    """Read a tar's headers, or, for its SHA-256 too, all of it once.

    Raises BadShardError with the byte offset of the first thing that is wrong.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    sample: dict[str, tuple[int, int]] = {}
    current: str | None = None
    with path.open("rb", buffering=0) as file:
        window = _Window(file.fileno(), whole)
        for name, offset, size in _members(path, window):
            key, part = _split(path, name, offset)
            if key != current:
                if key in samples:
                    raise BadShardError(
                        path, offset, f"the parts of key {key!r} do not lie side by side, or it comes twice"
                    )
                current, sample = key, {}
                samples[key] = sample
            if part in sample:
                raise BadShardError(path, offset, f"{name!r} comes twice")
            sample[part] = (offset, size)
    parts = sorted({part for sample in samples.values() for part in sample})
    rows = [[sample.get(part, ABSENT) for part in parts] for sample in samples.values()]
    offsets = np.array(rows, dtype=np.int64).reshape(len(samples), len(parts), 2)
    return ShardIndex(tuple(samples), tuple(parts), offsets, window.total, window.sha256())


class _Window:
    """A file's bytes, asked for by rising position: one system call gives many headers."""

    def __init__(self, descriptor: int, whole: bool) -> None:
        self.descriptor = descriptor
        self.total = os.fstat(descriptor).st_size
        self.start = 0
        self.held = b""  # the bytes from `start` on
        self.digest = hashlib.sha256() if whole else None  # has seen all bytes up to the end of `held`

    def take(self, position: int, size: int = BLOCK) -> bytes:
        """The bytes at `position`: fewer than `size` at the file's end.  No later call may ask for earlier ones."""
        at = position - self.start
        found = self.held[at : at + size]
        if len(found) == size:
            return found
        if self.digest is None:
            self.start, self.held = position, os.pread(self.descriptor, max(size, HEADERS_CHUNK), position)
            return self.held[:size]
        while at + size > len(self.held):
            chunk = os.pread(self.descriptor, WHOLE_CHUNK, self.start + len(self.held))
            if not chunk:
                break
            self.digest.update(chunk)
            passed = min(at, len(self.held))
            self.start, self.held, at = self.start + passed, self.held[passed:] + chunk, at - passed
        return self.held[at : at + size]

    def sha256(self) -> str:
        """Of all that was taken; of the whole file where its end was."""
        return self.digest.hexdigest() if self.digest else ""


def _split(path: Path, name: str, offset: int) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, dot, part = base.partition(".")  # as webdataset: the key ends at the first dot of the last name
    if not stem or not dot or not part or "\0" in name:
        raise BadShardError(path, offset, f"member {name!r} is not named KEY.PART")
    if slash and (name[0] == "/" or ".." in folder.split("/")):
        raise BadShardError(path, offset, f"member {name!r} points out of the archive")
    if (name.startswith("__") and META.match(name)) or part.startswith("__"):
        raise BadShardError(path, offset, f"member {name!r} has a name that WebDataset keeps for itself")
    return folder + slash + stem, part.lower()


def _members(path: Path, window: _Window) -> Iterator[tuple[str, int, int]]:
    """Yield (name, data offset, size) of each regular file, up to both end-of-archive blocks."""
    position = 0
    said: dict[bytes, bytes] = {}  # by an extended header, of the member after it
    while True:
        header = window.take(position)
        if len(header) < BLOCK:
            raise BadShardError(path, position, "the tar ends without its two end-of-archive blocks: it is cut short")
        if header == ZEROS:
            if window.take(position + BLOCK) != ZEROS:
                raise BadShardError(path, position, "one end-of-archive block without the second: it is cut short")
            _check_rest(path, window, position + 2 * BLOCK)
            return
        kind, size = header[156:157], _check_header(path, header, position)
        if said and kind not in b"xgL" and b"size" in said:
            size = int(said[b"size"])
        start, data, position = position, position + BLOCK, position + BLOCK + -(-size // BLOCK) * BLOCK
        if position > window.total:
            raise BadShardError(path, data, f"a member of {size} bytes reaches past the end of the file")
        match kind:
            case b"0" | b"\0":
                name, said = _name(path, header, start, said), {}
                yield name, data, size
            case b"x" | b"g" | b"L":
                new = _extended(path, kind, window.take(data, size), data)
                if kind == b"g" and new:
                    raise BadShardError(path, data, "a global header gives all members one path or size")
                said |= new
            case b"5":  # a folder
                said = {}
            case _:
                raise BadShardError(path, start, f"member of type {kind!r}: only regular files are read")


def _check_rest(path: Path, window: _Window, position: int) -> None:
    """After the end only padding may come: a hole of zeros among the members looks like an end, too."""
    while rest := window.take(position, WHOLE_CHUNK):
        if rest.count(0) != len(rest):
            at = position + len(rest) - len(rest.lstrip(b"\0"))
            raise BadShardError(path, at, "more bytes after the end-of-archive blocks: a hole, or a second archive")
        position += len(rest)


def _check_header(path: Path, header: bytes, offset: int) -> int:
    """The member's size, after the checksum has been found right (POSIX ustar, strictly)."""
    stored = _octal(header[148:156])
    if stored is None:
        raise BadShardError(path, offset, "not a tar header (its checksum field is malformed)")
    # The low half of Adler-32 is 1 + the sum of the bytes mod 65521, so of 256 bytes it is their sum, exactly; and it
    # is ten times as fast as sum().
    total = (adler32(header[:256]) & 0xFFFF) + (adler32(header[256:]) & 0xFFFF) - 2
    if stored != total - sum(header[148:156]) + 8 * ord(" "):
        raise BadShardError(path, offset, "the header's checksum is wrong")
    field = header[124:136]
    size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)  # base-256: 8 GiB and more
    if size is None:
        raise BadShardError(path, offset, f"the header's size field is not octal: {field!r}")
    return size


def _octal(field: bytes) -> int | None:
    """The number in a header's field of octal digits."""
    digits = OCTAL.fullmatch(field)
    return int(digits[1] or b"0", 8) if digits else None


def _name(path: Path, header: bytes, offset: int, said: dict[bytes, bytes]) -> str:
    name = header[:100].partition(b"\0")[0]
    if b"path" in said:
        name = said[b"path"]
    elif header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
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
