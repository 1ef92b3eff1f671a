"""A pass through a shard: what the index promised comes, key by key, and anything else ends it."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.index import ShardSet, build_index
from pipeline.data.sequential import read_through
from pipeline.errors import RunError, UsageError

SAMPLES: list[dict[str, Any]] = [
    {"__key__": "a/0", "png": b"an image", "cls": b"3"},
    {"__key__": "ü " + "long" * 60, "txt": b"no image", "seg.png": b""},
    {"__key__": "c", "png": b"", "jpg": bytes(30_000)},
]


@pytest.fixture
def folder(tmp_path: Path, write_tar: Callable[..., Path]) -> Path:
    write_tar(tmp_path / "set" / "000.tar", SAMPLES[:2], format="GNU_FORMAT")
    with tarfile.open(tmp_path / "set" / "001.tar", "w") as tar:  # parts not in the order of their names
        for part in ("png", "jpg"):
            member = tarfile.TarInfo(f"c.{part}")
            member.size = len(SAMPLES[2][part])
            tar.addfile(member, io.BytesIO(SAMPLES[2][part]))
    write_tar(tmp_path / "set" / "002.tar", [])
    build_index(tmp_path / "set")
    return tmp_path / "set"


def read_all(folder: Path, shard: int = 0) -> list[tuple[str, dict[str, bytes]]]:
    return list(read_through(ShardSet(folder, open_shards=1), shard))


def test_it_reads_what_random_access_reads(folder: Path) -> None:
    shards = ShardSet(folder, open_shards=1)
    for shard, count in enumerate(shards.counts):
        passed, wanted = list(read_through(shards, shard)), [shards.read(shard, row) for row in range(count)]
        assert passed == wanted
        assert [list(parts) for _, parts in passed] == [list(parts) for _, parts in wanted]
    assert shards.counts == [2, 1, 0]


def change(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "content": lambda data: change(data, b"an image", b"an imagE"),
    "garbage": lambda data: b"\xff" * len(data),
    "zeros": lambda data: bytes(len(data)),
    "padding": lambda data: data[:-1] + b"x",
    "a member's name": lambda data: data.replace(b"a/0.png", b"b/0.png"),
    "a torn header": lambda data: data[:1024] + b"\xff" * 512 + data[1536:],
    "compressed": lambda data: gzip.compress(data).ljust(len(data), b"\0"),
}


@pytest.mark.parametrize("made", CHANGES.values(), ids=CHANGES.keys())
def test_a_shard_that_changed_is_refused(folder: Path, made: Callable[[bytes], bytes]) -> None:
    """Its size is the same, so opening the set does not tell."""
    path = folder / "000.tar"
    path.write_bytes(made(path.read_bytes()))
    with pytest.raises(UsageError, match=r"000\.tar: changed since it was indexed; restore it"):
        read_all(folder)


def test_a_compressed_shard_is_not_unpacked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes could become terabytes."""
    path = folder / "001.tar"
    path.write_bytes(gzip.compress(path.read_bytes()).ljust(path.stat().st_size, b"\0"))
    monkeypatch.setattr("zlib.decompressobj", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(UsageError, match="changed since"):
        read_all(folder, 1)


def test_a_name_is_not_a_command(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """webdataset would run what follows pipe: in a URL, and expand braces."""
    monkeypatch.chdir(tmp_path)
    for name in ("pipe:touch trace", "{a,b}"):
        folder.rename(tmp_path / name)
        folder = Path(name)
        assert [key for key, _ in read_all(folder)] == [sample["__key__"] for sample in SAMPLES[:2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["{a,b}"]


class Failing:
    """A file on a disk that fails behind the first block."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __enter__(self) -> "Failing":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, size: int) -> bytes:
        if not self.data:
            raise OSError(5, "Input/output error")
        taken, self.data = self.data[:size], b""
        return taken


def test_a_failing_disk_is_told_as_such(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(folder, open_shards=1)
    whole = (folder / "000.tar").read_bytes()
    monkeypatch.setattr(shards, "open_shard", lambda shard: Failing(whole[:512]))
    with pytest.raises(RunError) as told:
        list(read_through(shards, 0))
    assert str(told.value) == f"{folder}/000.tar: Input/output error"


def test_a_shard_that_went_away_is_told(folder: Path) -> None:
    shards = ShardSet(folder, open_shards=1)
    (folder / "000.tar").unlink()
    with pytest.raises(RunError, match=r"000\.tar: No such file or directory"):
        list(read_through(shards, 0))
