"""A shard from its first sample to its last, in one pass, as webdataset reads it."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.data.index import ShardSet
from pipeline.errors import RunError, UsageError

CHUNK = 1 << 20  # bytes


def read_through(shards: ShardSet, shard: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and parts of each sample of a shard, in order.

    The shard must be what was indexed, key by key as it is read and in its SHA-256 at the end: UsageError.  RunError
    where the disk or the network fails.
    """
    keys = [shards.key(shard, row) for row in range(shards.counts[shard])]
    changed = (
        f"{shards.path(shard)}: changed since it was indexed; restore it, or index its folder again and encode anew"
    )
    try:
        opened = shards.open_shard(shard)
    except OSError as error:
        raise RunError(f"{shards.path(shard)}: {error.strerror or error}") from error
    with opened as file:
        hashed = _Hashed(file, shards.path(shard))
        # The stream is opened here, not by webdataset: it would take a name like pipe:... for a command to run.
        members = tar_file_expander([{"url": shards.path(shard), "stream": hashed}])
        row = 0
        try:
            for sample in group_by_keys(members):
                if row == len(keys) or sample["__key__"] != keys[row]:
                    raise UsageError(changed)
                # By name, as ShardSet.read gives them: of several images both take the same one.
                yield keys[row], {name: sample[name] for name in sorted(sample) if not name.startswith("__")}
                row += 1
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise UsageError(changed) from error
        except RunError as error:
            raise RunError(hashed.trouble) from error  # webdataset adds the stream to what an error says
        if row != len(keys) or hashed.rest() != shards.sha256(shard):
            raise UsageError(changed)


class _Hashed:
    """A file that is read once, and hashed meanwhile; it refuses to be anything but a plain tar."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        self.digest = hashlib.sha256()
        self.begun = False
        self.trouble = ""  # of the disk or the network

    def read(self, size: int) -> bytes:
        """At most `size` bytes."""
        try:
            data = self.file.read(size)
        except (OSError, RunError) as error:
            self.trouble = f"{self.name}: {(error.strerror if isinstance(error, OSError) else None) or error}"
            raise RunError(self.trouble) from error
        if not self.begun and not _is_header(data[:512]):
            raise tarfile.ReadError("not a tar")  # tarfile would unpack a compressed one, however large it gets
        self.begun = True
        self.digest.update(data)
        return data

    def rest(self) -> str:
        """Read to the end; the SHA-256 of all, in hex."""
        while self.read(CHUNK):
            pass
        return self.digest.hexdigest()


def _is_header(block: bytes) -> bool:
    if not any(block):  # a tar of nothing
        return True
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
