"""A pass over all samples finds just those that training could not use, and runs nothing that lies in a shard."""

import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus import BAD, GOOD, Touch, picture

from pipeline.data import images, latents
from pipeline.data.bad_samples import BadSample, by_kind, find_bad_samples
from pipeline.data.index import BAD_SAMPLES, build_index
from pipeline.errors import UsageError

WriteTar = Callable[..., Path]
REQUIRED = (images.PARTS | {latents.PART},)


@pytest.fixture
def folder(tmp_path: Path, write_tar: WriteTar) -> Path:
    """Good and bad in turn, with a pickle in each sample, over shards of which one is empty and one has an odd name."""
    folder = tmp_path / "set"
    pkl = pickle.dumps(Touch(tmp_path / "touched"))
    parts = {**GOOD, **{key: sample for key, (sample, _) in BAD.items()}}
    keys = sorted(parts, key=lambda key: zlib.crc32(key.encode()))
    shards = {"000.tar": keys[:7], "001.tar": [], f"pipe:touch {tmp_path.name}; #.tar": keys[7:]}
    for name, of_shard in shards.items():
        write_tar(folder / name, ({"__key__": key, "pkl": pkl, **parts[key]} for key in of_shard))
    build_index(folder, REQUIRED)
    return folder


def listed(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "index" / BAD_SAMPLES).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bad_are_found_and_the_good_are_not(folder: Path, tmp_path: Path, workers: int) -> None:
    found = find_bad_samples(folder, workers)
    assert {bad.key for bad in found} == set(BAD)
    for bad in found:
        assert bad.reason.startswith(BAD[bad.key][1]) and bad.reason
        assert "0x" not in bad.reason  # the same words each time
    assert found == sorted(found, key=lambda bad: (bad.shard, bad.key))
    assert listed(folder) == [vars(bad) for bad in found]
    assert {path.name for path in tmp_path.iterdir()} == {"set"}  # no pickle was opened, no command was run
    assert not Path(tmp_path.name).exists()


def test_it_says_the_same_for_any_number_of_workers(folder: Path) -> None:
    written: list[bytes] = []
    for workers in (1, 2, 5):
        find_bad_samples(folder, workers)
        written.append((folder / "index" / BAD_SAMPLES).read_bytes())
    assert len(set(written)) == 1


def test_a_good_set_has_no_list(tmp_path: Path, write_tar: WriteTar) -> None:
    for _ in range(2):
        write_tar(tmp_path / "0.tar", ({"__key__": key, **parts} for key, parts in GOOD.items()))
        build_index(tmp_path, REQUIRED)
        assert find_bad_samples(tmp_path, 1) == []
        assert not (tmp_path / "index" / BAD_SAMPLES).exists()
        (tmp_path / "index" / BAD_SAMPLES).write_text("of another time")


def test_a_list_lasts_as_long_as_the_shards(folder: Path, write_tar: WriteTar) -> None:
    find_bad_samples(folder, 1)
    build_index(folder, REQUIRED)
    assert listed(folder)
    write_tar(folder / "new.tar", [{"__key__": "a", "png": picture("PNG")}])
    build_index(folder, REQUIRED)
    assert not (folder / "index" / BAD_SAMPLES).exists()


def test_reasons_are_counted_without_their_values() -> None:
    bad = [BadSample("0.tar", f"{i}", f"class id -{i} came, 0 or more was wanted") for i in range(3)]
    bad.append(BadSample("1.tar", "a", ".cls holds b'x', an integer was wanted"))
    bad.append(BadSample("1.tar", "b", """.cls holds b"it's", an integer was wanted"""))
    bad.append(BadSample("1.tar", "c", ".txt is not UTF-8: invalid start byte at byte 2"))
    bad.append(BadSample("1.tar", "d", "fp16 [2C,h,w] was wanted, float32 [8, 2, 2] came"))
    assert [(kind.count, kind.reason, kind.first.key) for kind in by_kind(bad)] == [
        (3, "class id … came, … or more was wanted", "0"),
        (2, ".cls holds …, an integer was wanted", "a"),
        (1, ".txt is not UTF-8: invalid start byte at byte …", "c"),
        (1, "fp16 [2C,h,w] was wanted, float32 […, …, …] came", "d"),
    ]


def test_a_shard_of_another_size_is_named(folder: Path) -> None:
    data = (folder / "000.tar").read_bytes()
    (folder / "000.tar").write_bytes(data[: len(data) // 2 + 100])
    with pytest.raises(UsageError, match=rf"^{folder}/000\.tar: \d+ bytes came, {len(data)} bytes were indexed"):
        find_bad_samples(folder, 2)


@pytest.mark.parametrize("place", [20, 100_000])
def test_a_shard_that_changed_since_is_named(folder: Path, place: int) -> None:
    data = bytearray((folder / "000.tar").read_bytes())
    data[min(place, len(data) - 2000)] ^= 1
    (folder / "000.tar").write_bytes(data)
    with pytest.raises(UsageError, match=rf"^{folder}/000\.tar: changed since it was indexed"):
        find_bad_samples(folder, 1)
