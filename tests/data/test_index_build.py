"""An index made in pieces, in parallel, again or after a kill is the index made in one go."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import files
from pipeline.data.index import ShardSet, build_index
from pipeline.data.tar import BLOCK
from pipeline.errors import UsageError

WriteTar = Callable[..., Path]
REQUIRED = (frozenset({"png"}),)
LONG_AGO_NS = 1_600_000_000_123_456_789
BAD = b"no tar"


def write_shard(write_tar: WriteTar, path: Path, count: int = 3, seed: int = 0) -> None:
    """A shard that was written long ago, so that its time says whether it has changed."""
    rng = np.random.default_rng(seed)
    samples = [
        {"__key__": f"{path.stem}-{row}", "png": rng.bytes(700), "cls": b"1", "txt": b"a caption"}
        for row in range(count)
    ]
    write_tar(path, samples)
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))


@pytest.fixture
def folder(tmp_path: Path, write_tar: WriteTar) -> Path:
    """Six shards of different sizes, one of them empty; no index."""
    for shard, count in enumerate((3, 0, 5, 1, 40, 2)):
        write_shard(write_tar, tmp_path / "set" / f"{shard:03d}.tar", count, seed=shard)
    return tmp_path / "set"


def contents(folder: Path) -> dict[str, bytes]:
    assert not (folder / ".index.part").exists()
    return {path.name: path.read_bytes() for path in sorted((folder / "index").iterdir())}


def in_one_go(folder: Path, **settings: Any) -> dict[str, bytes]:
    """The index of a copy that was never indexed, made by one worker."""
    copy = folder.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("index", ".index.part"))
    build_index(copy, REQUIRED, **({"workers": 1} | settings))
    return contents(copy)


def flip_in_place(path: Path, at: int) -> None:
    """A bit that rots: neither size nor time of last change tell."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def was_read(folder: Path, **settings: Any) -> set[str]:
    """Index; the shards that were read for it: their sidecars are new files."""
    before = {path.name: path.stat().st_ino for path in (folder / "index").glob("*.npz")}
    build_index(folder, REQUIRED, **settings)
    after = {path.name: path.stat().st_ino for path in (folder / "index").glob("*.npz")}
    return {name.replace("npz", "tar") for name in after if after[name] != before.get(name)}


@pytest.mark.parametrize("workers", [2, 5, 16, None])
def test_parallel_equals_serial(folder: Path, workers: int | None) -> None:
    build_index(folder, REQUIRED, workers=workers)
    assert contents(folder) == in_one_go(folder)


def test_an_index_in_pieces_is_the_index_in_one_go(folder: Path) -> None:
    away = folder.with_name("away")
    away.mkdir()
    shards = sorted(folder.glob("*.tar"))
    for path in shards:
        path.rename(away / path.name)
    for step in ((4,), (0, 5), (1, 2, 3)):
        for shard in step:
            (away / shards[shard].name).rename(shards[shard])
        build_index(folder, REQUIRED)
        assert contents(folder) == in_one_go(folder)


def test_only_new_shards_are_read_and_removed_ones_drop_out(folder: Path, write_tar: WriteTar) -> None:
    build_index(folder, REQUIRED)
    (folder / "index" / "000.encoded.json").write_text("{}")  # encode keeps its records there
    flip_in_place(folder / "004.tar", BLOCK)  # would be seen, were it read again
    before = files.read_json(folder / "index" / "manifest.json")["shards"]
    write_shard(write_tar, folder / "006.tar", 4)
    (folder / "000.tar").unlink()
    assert was_read(folder) == {"006.tar"}
    after = files.read_json(folder / "index" / "manifest.json")["shards"]
    assert after[:-1] == before[1:] and after[-1]["name"] == "006.tar" and after[-1]["samples"] == 4
    assert not (folder / "index" / "000.npz").exists() and (folder / "index" / "000.encoded.json").exists()
    assert was_read(folder) == set()


def test_nothing_is_read_when_nothing_changed(folder: Path) -> None:
    build_index(folder, REQUIRED)
    before = contents(folder)
    assert was_read(folder) == set()
    assert contents(folder) == before


def test_another_time_makes_no_other_index(folder: Path) -> None:
    build_index(folder, REQUIRED)
    before = contents(folder)
    os.utime(folder / "002.tar", ns=(LONG_AGO_NS, LONG_AGO_NS + 1))
    assert was_read(folder) == {"002.tar"}
    assert contents(folder) == before
    assert was_read(folder) == set()


def test_a_shard_written_just_now_is_read_again(folder: Path) -> None:
    """Within one tick of the file system's clock it may change once more and keep its time."""
    (folder / "003.tar").touch()
    build_index(folder, REQUIRED)
    before = contents(folder)
    assert before == in_one_go(folder)
    assert was_read(folder) == {"003.tar"}
    assert contents(folder) == before


def test_a_changed_shard_is_noticed(folder: Path, write_tar: WriteTar) -> None:
    build_index(folder, REQUIRED)
    before = contents(folder)
    flip_in_place(folder / "002.tar", BLOCK)
    os.utime(folder / "002.tar", ns=(LONG_AGO_NS, LONG_AGO_NS + 10**9))  # same size, another time
    assert was_read(folder) == {"002.tar"}
    write_shard(write_tar, folder / "005.tar", 60)  # same time, another size
    assert was_read(folder) == {"005.tar"}
    assert contents(folder) == in_one_go(folder) != before
    (folder / "004.tar").write_bytes(BAD)
    with pytest.raises(UsageError, match=r"004\.tar: at byte 0: "):
        build_index(folder, REQUIRED)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 torn", "older"], ids=["empty", "torn", "without a SHA-256"])
def test_a_sidecar_that_says_nothing_is_made_again(folder: Path, content: bytes | str) -> None:
    build_index(folder, REQUIRED)
    before = contents(folder)
    sidecar = folder / "index" / "002.npz"
    if isinstance(content, bytes):
        sidecar.write_bytes(content)
    else:
        with np.load(sidecar) as arrays:
            kept = {name: arrays[name] for name in ("keys", "parts", "offsets")}
        np.savez(sidecar, **kept)
    os.utime(sidecar, ns=(LONG_AGO_NS, LONG_AGO_NS))
    assert was_read(folder) == {"002.tar"}
    assert contents(folder) == before


def test_what_is_required_is_asked_of_unchanged_shards_too(folder: Path) -> None:
    build_index(folder, REQUIRED)
    before = contents(folder)
    with pytest.raises(UsageError) as told:
        build_index(folder, (frozenset({"json"}),))
    lines = str(told.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(folder / f"00{i}.tar") for i in (0, 2, 3, 4, 5)]
    assert contents(folder) == before


@pytest.mark.parametrize("workers", [1, 4])
def test_all_bad_shards_are_named_in_order_and_the_good_ones_are_kept(folder: Path, workers: int) -> None:
    good = {name: (folder / name).read_bytes() for name in ("000.tar", "003.tar")}
    for name, data in good.items():
        (folder / name).write_bytes(BAD + data)
    with pytest.raises(UsageError) as told:
        build_index(folder, REQUIRED, workers=workers)
    lines = str(told.value).splitlines()
    assert [line.split(": at byte 0: ")[0] for line in lines] == [str(folder / name) for name in good]
    assert not (folder / "index").exists()
    flip_in_place(folder / "004.tar", BLOCK)  # it was read already, and is not again
    for name, data in good.items():
        (folder / name).write_bytes(data)
    build_index(folder, REQUIRED, workers=workers)
    flip_in_place(folder / "004.tar", BLOCK)
    assert contents(folder) == in_one_go(folder)


def test_what_can_not_be_read_is_named_with_the_bad(folder: Path) -> None:
    (folder / "000.tar").write_bytes(BAD)
    (folder / "006.tar").mkdir()
    (folder / "007.tar").symlink_to("nowhere")
    with pytest.raises(UsageError) as told:
        build_index(folder, REQUIRED)
    assert [line.removeprefix(f"{folder}/") for line in str(told.value).splitlines()][1:] == [
        "006.tar: unreadable (Is a directory)",
        "007.tar: unreadable (No such file or directory)",
    ]


def test_a_shard_put_back_as_it_was_keeps_its_own_sidecar(folder: Path, write_tar: WriteTar) -> None:
    """What waits in .index.part may be of a version of the shard that has gone again."""
    build_index(folder, REQUIRED)
    before = contents(folder)
    data = (folder / "002.tar").read_bytes()
    write_shard(write_tar, folder / "002.tar", 9)
    os.utime(folder / "002.tar", ns=(LONG_AGO_NS, LONG_AGO_NS + 1))
    (folder / "005.tar").rename(folder / "away")
    (folder / "005.tar").write_bytes(BAD)
    with pytest.raises(UsageError):
        build_index(folder, REQUIRED)
    (folder / "away").rename(folder / "005.tar")
    (folder / "002.tar").write_bytes(data)
    os.utime(folder / "002.tar", ns=(LONG_AGO_NS, LONG_AGO_NS))
    build_index(folder, REQUIRED)
    assert contents(folder) == before


@pytest.mark.parametrize("at", [BLOCK, BLOCK + 300, 3 * BLOCK + 600], ids=["label", "padding", "image"])
def test_verify_finds_a_flipped_bit(folder: Path, at: int) -> None:
    build_index(folder, REQUIRED)
    before = contents(folder)
    flip_in_place(folder / "002.tar", at)
    build_index(folder, REQUIRED)
    assert contents(folder) == before  # what is recorded was believed
    with pytest.raises(UsageError, match=rf"^{folder}/002\.tar: SHA-256 .* it is damaged; restore it, or touch it"):
        build_index(folder, REQUIRED, verify=True)
    assert (folder / "index" / "manifest.json").read_bytes() == before["manifest.json"]
    (folder / "002.tar").touch()
    build_index(folder, REQUIRED)
    assert contents(folder) == in_one_go(folder) != before


def test_verify_reads_everything_and_changes_nothing(folder: Path) -> None:
    build_index(folder, REQUIRED)
    before = contents(folder)
    assert was_read(folder, verify=True) == {f"00{i}.tar" for i in range(6)}
    assert contents(folder) == before
    assert was_read(folder) == set()


def test_a_sidecar_newer_than_the_manifest_is_refused(folder: Path) -> None:
    """As a kill between the two would leave it; the shard has the size and number of samples it had."""
    build_index(folder, REQUIRED)
    manifest = (folder / "index" / "manifest.json").read_bytes()
    flip_in_place(folder / "002.tar", BLOCK)
    (folder / "002.tar").touch()
    build_index(folder, REQUIRED)
    (folder / "index" / "manifest.json").write_bytes(manifest)
    shards = ShardSet(folder, open_shards=1)
    shards.read(0, 0)
    with pytest.raises(UsageError, match=r"002\.npz: of a shard with SHA-256 .*; run: python -m pipeline index"):
        shards.read(2, 0)


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline", "index", str(folder), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def test_a_killed_run_goes_on_with_the_rest(tmp_path: Path, write_tar: WriteTar) -> None:
    folder = tmp_path / "set"
    for shard in range(60):
        write_shard(write_tar, folder / f"{shard:03d}.tar", 300, seed=shard)
    process = start(folder, "--workers", "1")
    waiting = folder / ".index.part"
    until = time.monotonic() + 60
    while len(list(waiting.glob("[0-9]*.npz"))) < 3 and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = {path.name: path.stat().st_ino for path in waiting.glob("[0-9]*.npz")}
    assert 3 <= len(done) < 60 and not (folder / "index").exists()
    again = start(folder)
    said = again.communicate()[1].decode()
    assert again.returncode == 0 and "18,000 samples in 60 shards" in said
    kept = {name for name, inode in done.items() if (folder / "index" / name).stat().st_ino == inode}
    assert kept == set(done)
    assert contents(folder) == in_one_go(folder)


@pytest.mark.parametrize("workers", ["0", "-1"])
def test_no_workers_are_refused(folder: Path, workers: str) -> None:
    process = start(folder, f"--workers={workers}")
    said = process.communicate()[1].decode()
    assert process.returncode == 2
    assert said == f"error: --workers: {workers} came, at least 1 was wanted\n"
