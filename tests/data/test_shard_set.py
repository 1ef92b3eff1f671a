"""The index of a folder says what is there; a set that changed since is refused; what is read is what was written."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from pipeline import files
from pipeline.data.index import ShardSet, build_index
from pipeline.data.tar import BLOCK
from pipeline.errors import UsageError

IMAGE = (frozenset({"jpg", "png"}),)
Samples = dict[str, dict[str, bytes]]  # key → part → bytes


def write(path: Path, samples: Samples) -> None:
    with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        for key, parts in samples.items():
            writer.write({"__key__": key} | parts)


def samples_by_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    reader: Any = WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [(s["__key__"], {name: data for name, data in s.items() if not name.startswith("__")}) for s in reader]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of 3, 0 and 2 samples, indexed."""
    made = tmp_path / "set"
    made.mkdir()
    rng = np.random.default_rng(0)
    for shard, count in enumerate((3, 0, 2)):
        rows = {f"{shard}-{row}": {"png": rng.bytes(100 * row + 3), "cls": b"%d" % row} for row in range(count)}
        write(made / f"{shard:03d}.tar", rows)
    build_index(made, IMAGE, {"made": "by hand"})
    return made


def manifest(folder: Path) -> dict[str, Any]:
    return files.read_json(folder / "index" / "manifest.json")


def test_manifest_says_what_is_there(folder: Path) -> None:
    said = manifest(folder)
    assert said["format"] == 1 and said["source"] == {"made": "by hand"}
    assert said["shards"] == [
        {
            "name": f"{shard:03d}.tar",
            "bytes": (folder / f"{shard:03d}.tar").stat().st_size,
            "samples": count,
            "parts": ["cls", "png"] if count else [],
            "sha256": files.sha256(folder / f"{shard:03d}.tar"),
        }
        for shard, count in enumerate((3, 0, 2))
    ]
    assert said["fingerprint"] == files.fingerprint(said["shards"])
    assert sorted(path.name for path in (folder / "index").iterdir()) == [
        "000.npz",
        "001.npz",
        "002.npz",
        "manifest.json",
    ]


def test_fingerprint_does_not_depend_on_time_or_folder(folder: Path, tmp_path: Path) -> None:
    before = manifest(folder)["fingerprint"]
    os.utime(folder / "000.tar", (1, 1))
    build_index(folder)
    assert manifest(folder)["fingerprint"] == before
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("index"))
    build_index(tmp_path / "copy")
    assert manifest(tmp_path / "copy")["fingerprint"] == before


def flip_a_data_byte(folder: Path) -> None:
    data = bytearray((folder / "000.tar").read_bytes())
    data[BLOCK] ^= 1  # in the first part's data: same size, same offsets
    (folder / "000.tar").write_bytes(data)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "content": flip_a_data_byte,
    "name": lambda folder: (folder / "000.tar").rename(folder / "003.tar"),
    "one less": lambda folder: (folder / "001.tar").unlink(),
    "one more": lambda folder: shutil.copy(folder / "001.tar", folder / "003.tar"),
    "padding": lambda folder: (folder / "000.tar").write_bytes((folder / "000.tar").read_bytes() + bytes(BLOCK)),
    "samples": lambda folder: write(folder / "001.tar", {"x": {"png": b""}}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_fingerprint_changes_with_the_shards(folder: Path, change: Callable[[Path], Any]) -> None:
    before = manifest(folder)["fingerprint"]
    change(folder)
    build_index(folder)
    assert manifest(folder)["fingerprint"] != before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "index").glob("*"))}


def test_all_bad_shards_are_named_and_nothing_is_written(folder: Path) -> None:
    before = contents(folder)
    write(folder / "000.tar", {"new": {"png": b""}})
    (folder / "001.tar").write_bytes(b"")
    write(folder / "002.tar", {"a": {"cls": b"1"}})
    write(folder / "003.tar", {"../a": {"png": b""}})
    with pytest.raises(UsageError) as told:
        build_index(folder, IMAGE)
    lines = str(told.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(folder / f"00{i}.tar") for i in (1, 2, 3)]
    assert all(": at byte " in line for line in lines)
    assert contents(folder) == before


def test_bad_shards_leave_no_new_index(folder: Path) -> None:
    shutil.rmtree(folder / "index")
    (folder / "001.tar").write_bytes(b"")
    with pytest.raises(UsageError):
        build_index(folder)
    assert not (folder / "index").exists()


def test_each_required_set_needs_one_of_its_parts(tmp_path: Path) -> None:
    required = (frozenset({"jpg", "png"}), frozenset({"cls"}))
    tar = tmp_path / "a.tar"
    write(tar, {"0": {"png": b"", "cls": b""}, "1": {"jpg": b"", "cls": b""}})
    build_index(tmp_path, required)
    write(tar, {"0": {"png": b"", "cls": b""}, "1": {"cls": b""}})
    with pytest.raises(UsageError, match=r"a\.tar: at byte 1536: sample '1' has no part jpg or png"):
        build_index(tmp_path, required)
    write(tar, {"0": {"webp": b""}})
    with pytest.raises(UsageError, match=r"sample '0' has no part jpg or png"):
        build_index(tmp_path, required)
    write(tar, {"0": {"png": b""}})
    with pytest.raises(UsageError, match=r"sample '0' has no part cls"):
        build_index(tmp_path, required)


def test_same_shards_same_index(folder: Path) -> None:
    before = manifest(folder)
    build_index(folder, IMAGE, {"made": "by hand"})
    assert manifest(folder) == before


def all_samples(shards: ShardSet) -> list[tuple[str, dict[str, bytes]]]:
    return [shards.read(shard, row) for shard, count in enumerate(shards.counts) for row in range(count)]


def test_reads_the_exact_bytes(folder: Path) -> None:
    shards = ShardSet(folder, open_shards=1)
    assert len(shards) == 5 and shards.counts == [3, 0, 2]
    wanted = [sample for path in sorted(folder.glob("*.tar")) for sample in samples_by_webdataset(path)]
    assert all_samples(shards) == wanted
    assert all_samples(shards)[::-1] == wanted[::-1]
    assert shards.where(2, 1) == f"{folder / '002.tar'}: sample '2-1'"


def test_a_part_that_a_sample_lacks_is_absent(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"0": {"png": b"x", "cls": b""}, "1": {"png": b"y"}})
    build_index(tmp_path)
    shards = ShardSet(tmp_path, open_shards=1)
    assert shards.read(0, 0) == ("0", {"png": b"x", "cls": b""})
    assert shards.read(0, 1) == ("1", {"png": b"y"})


def test_few_shards_stay_open(tmp_path: Path) -> None:
    for shard in range(8):
        write(tmp_path / f"{shard}.tar", {"0": {"png": b"%d" % shard}})
    build_index(tmp_path)
    shards = ShardSet(tmp_path, open_shards=3)
    assert [parts["png"] for _, parts in all_samples(shards)] == [b"%d" % shard for shard in range(8)]
    links = [path.resolve() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert sorted(path.name for path in links if path.parent == tmp_path) == ["5.tar", "6.tar", "7.tar"]


class Raw(Dataset[Any]):
    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self.places = [(shard, row) for shard, count in enumerate(shards.counts) for row in range(count)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[str, dict[str, bytes]]:
        return self.shards.read(*self.places[i])


def test_reads_the_same_after_pickling_and_in_loader_processes(folder: Path) -> None:
    shards = ShardSet(folder, open_shards=2)
    wanted = all_samples(shards)  # the files are open now, and the loader's processes inherit them
    copied = pickle.loads(pickle.dumps(shards))
    assert all_samples(copied) == wanted and copied.fingerprint == shards.fingerprint
    loader: Any = DataLoader(Raw(shards), batch_size=None, num_workers=2)
    assert [(key, parts) for key, parts in loader] == wanted


def remove(path: Path) -> None:
    path.unlink()


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(BLOCK))


CHANGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda folder: shutil.rmtree(folder / "index"), "{folder}: not indexed; run: {command}"),
    "broken manifest": (lambda folder: (folder / "index/manifest.json").write_text("{"), "not indexed; run: {command}"),
    "other format": (
        lambda folder: files.write_json(folder / "index/manifest.json", {"format": 9}),
        "{folder}/index: format 9 came, 1 was wanted; run: {command}",
    ),
    "a shard removed": (
        lambda folder: remove(folder / "001.tar"),
        "{folder}/001.tar: missing came, 10240 bytes were indexed; restore it, or run: {command}",
    ),
    "a shard grown": (
        lambda folder: grow(folder / "002.tar"),
        "{folder}/002.tar: 10752 bytes came, 10240 bytes were indexed; restore it, or run: {command}",
    ),
    "a shard more": (
        lambda folder: shutil.copy(folder / "001.tar", folder / "003.tar"),
        "{folder}/003.tar: not indexed; move it away, or run: {command}",
    ),
}


@pytest.mark.parametrize(("change", "said"), CHANGED.values(), ids=CHANGED.keys())
def test_a_changed_set_is_refused_with_what_to_run(folder: Path, change: Callable[[Path], Any], said: str) -> None:
    change(folder)
    with pytest.raises(UsageError) as told:
        ShardSet(folder, open_shards=1)
    assert said.format(folder=folder, command=f"python -m pipeline index {folder}") in str(told.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    for use in (lambda: ShardSet(tmp_path / "none", open_shards=1), lambda: build_index(tmp_path / "none")):
        with pytest.raises(UsageError, match="none: no such folder of shards"):
            use()


def test_a_folder_without_tars_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").touch()
    for use in (lambda: ShardSet(tmp_path, open_shards=1), lambda: build_index(tmp_path)):
        with pytest.raises(UsageError, match=r"no \*\.tar in this folder"):
            use()


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4 torn", b"\x93NUMPY"], ids=["gone", "empty", "torn", "other"])
def test_an_unreadable_sidecar_is_named_with_the_command_to_run(folder: Path, content: bytes | None) -> None:
    sidecar = folder / "index" / "002.npz"
    if content is None:
        sidecar.unlink()
    else:
        sidecar.write_bytes(content)
    shards = ShardSet(folder, open_shards=1)
    shards.read(0, 0)
    with pytest.raises(UsageError, match=rf"002\.npz: unreadable .*; run: python -m pipeline index {folder}"):
        shards.read(2, 0)


def test_a_sidecar_of_other_shards_is_refused(folder: Path) -> None:
    shutil.copy(folder / "index" / "000.npz", folder / "index" / "002.npz")
    with pytest.raises(UsageError, match=r"002\.npz: 3 samples came, the manifest says 2; run: "):
        ShardSet(folder, open_shards=1).read(2, 0)


def test_a_short_read_is_named(folder: Path) -> None:
    shards = ShardSet(folder, open_shards=1)
    os.truncate(folder / "002.tar", BLOCK)
    with pytest.raises(OSError, match=r"002\.tar: 1 bytes wanted at 512: short read"):
        shards.read(2, 0)
