"""Files are whole or absent, whatever interrupts the writing."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import files

INTERRUPTIONS = [ValueError, OSError, KeyboardInterrupt, SystemExit]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
KILLED_HALF_WAY = """
import os, signal, sys
from pathlib import Path
from pipeline import files
with files.whole(Path(sys.argv[1])) as aside:
    aside.write_text("half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def content(folder: Path) -> dict[str, str]:
    """Name → text of every file, hidden ones too."""
    return {path.name: path.read_text() for path in folder.iterdir()}


# whole --------------------------------------------------------------------------------------------


def test_a_block_that_ends_well_leaves_the_file_alone(tmp_path: Path) -> None:
    with files.whole(tmp_path / "a.txt") as aside:
        aside.write_text("new")
    assert content(tmp_path) == {"a.txt": "new"}


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    files.write_text(tmp_path / "deep" / "er" / "a.txt", "new")
    assert (tmp_path / "deep" / "er" / "a.txt").read_text() == "new"


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interrupted_block_leaves_nothing(tmp_path: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), files.whole(tmp_path / "a.txt") as aside:
        aside.write_text("half of it")
        raise interruption
    assert content(tmp_path) == {}


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interrupted_block_keeps_the_old_content(tmp_path: Path, interruption: type[BaseException]) -> None:
    files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(interruption), files.whole(tmp_path / "a.txt") as aside:
        aside.write_text("half of it")
        raise interruption
    assert content(tmp_path) == {"a.txt": "old"}


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old_content(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(FileNotFoundError), files.whole(tmp_path / "a.txt"):
        pass
    assert content(tmp_path) == {"a.txt": "old"}


def test_the_name_holds_the_old_content_until_the_block_ends(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.txt", "old")
    with files.whole(tmp_path / "a.txt") as aside:
        aside.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_reader_sees_one_version_or_the_other(tmp_path: Path) -> None:
    path, versions = tmp_path / "a.txt", ["a" * 100_000, "b" * 200_000]
    files.write_text(path, versions[0])
    ended, seen = threading.Event(), set[str]()

    def read() -> None:
        while not ended.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40):
        files.write_text(path, versions[i % 2])
    ended.set()
    reader.join()
    assert seen <= set(versions)


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    killed = subprocess.run([sys.executable, "-c", KILLED_HALF_WAY, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(content(tmp_path)) == 2  # what was left is there, under another name

    files.write_text(path, "new")
    assert content(tmp_path) == {"a.txt": "new"}


def test_what_a_killed_process_left_has_no_shards_name(tmp_path: Path) -> None:
    """A half-written tar must not be found by whoever lists the shards of a folder."""
    path = tmp_path / "000000.tar"
    subprocess.run([sys.executable, "-c", KILLED_HALF_WAY, str(path)], check=False)
    assert list(tmp_path.iterdir())
    assert list(tmp_path.glob("*.tar")) == []


# JSON ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_has_no_not_a_number(tmp_path: Path, value: float) -> None:
    files.write_json(tmp_path / "a.json", {"loss": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"loss": value})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 0.5}
    with pytest.raises(ValueError, match="JSON"):
        files.fingerprint({"loss": value})


def test_json_is_written_as_people_read_it(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"name": "größer", "steps": 3})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "größer",\n  "steps": 3\n}\n'
    assert files.read_json(tmp_path / "a.json") == {"name": "größer", "steps": 3}


@pytest.mark.parametrize("text", ["[1, 2]", '"text"', "null", "", '{"torn": '])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"object was wanted|Expecting"):
        files.read_json(tmp_path / "a.json")


# hashes -------------------------------------------------------------------------------------------


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # its table of letters is made once
@given(st.dictionaries(st.text(), JSON_VALUES, max_size=6), st.randoms(use_true_random=False))
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(value: dict[str, Any], chance: random.Random) -> None:
    keys = list(value)
    chance.shuffle(keys)
    assert files.fingerprint({key: value[key] for key in keys}) == files.fingerprint(value)
    assert files.fingerprint(json.loads(json.dumps(value))) == files.fingerprint(value)


@pytest.mark.parametrize(
    "other", [{"a": [2, 1]}, {"a": [1, 2, 3]}, {"b": [1, 2]}, {"a": ["1", 2]}, {"a": [[1, 2]]}, {}]
)
def test_another_value_has_another_fingerprint(other: dict[str, Any]) -> None:
    assert files.fingerprint(other) != files.fingerprint({"a": [1, 2]})


@pytest.mark.parametrize("size", [0, 1, 3_000_001])
def test_sha256_is_that_of_the_bytes(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "a.bin").write_bytes(data)
    assert files.sha256(tmp_path / "a.bin") == hashlib.sha256(data).hexdigest()


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "place"
    (tmp_path / ".place.part").mkdir()
    (tmp_path / ".place.part" / "left by a killed process").touch()
    for content in ("first", "second"):
        with files.whole_folder(place) as aside:
            aside.mkdir()
            (aside / "file").write_text(content)
        assert [p.name for p in place.iterdir()] == ["file"] and (place / "file").read_text() == content
    with pytest.raises(ValueError, match="no"), files.whole_folder(place) as aside:
        aside.mkdir()
        raise ValueError("no")
    assert (place / "file").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["place"]
