"""Any number of processes writes the same bytes, and what a killed prepare left is gone on with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline import files
from pipeline.__main__ import main
from pipeline.data import prepare
from pipeline.data.index import ShardSet
from pipeline.data.prepare import even_sizes, prepare_digits, prepare_folder
from pipeline.errors import UsageError

ARGUMENTS: dict[str, Any] = {"size": 64, "seed": 0, "validation_share": 0.2}
SLOW = """
import sys, time
from functools import partial
from pathlib import Path
from pipeline.data import prepare, sources

def slowly(draw, item):
    time.sleep(0.002)
    return draw(item)

made = sources.digits(64)
object.__setattr__(made, "draw", partial(slowly, made.draw))
prepare.write_sets(Path(sys.argv[1]), made, seed=0, validation_share=0.2, workers=int(sys.argv[2]))
"""


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared in one go by this process."""
    out = tmp_path_factory.mktemp("whole")
    prepare_digits(out, **ARGUMENTS)
    return out


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path, whole: Path, workers: int) -> None:
    prepare_digits(tmp_path, **ARGUMENTS, workers=workers)
    assert content(tmp_path) == content(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_prepare_is_gone_on_with(tmp_path: Path, whole: Path, workers: int) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(out), str(workers)], stderr=subprocess.DEVNULL)
    try:
        wait_for((out / "train" / "000001.tar").exists)
        children = psutil.Process(process.pid).children()
    finally:
        process.kill()
    assert process.wait(10) == -signal.SIGKILL
    assert len(children) == workers
    assert not psutil.wait_procs(children, timeout=10)[1]  # they don't outlive it
    said = files.read_json(out / "train" / "dataset.json")
    assert said["complete"] is False and "num_samples" not in said
    kept = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*.tar"))}
    assert 2 <= len(kept) < 7
    with pytest.raises(UsageError, match="not indexed"):
        ShardSet(out / "train", open_shards=1)
    prepare_digits(out, **ARGUMENTS)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert {name: data for name, data in content(out).items() if not name.endswith(".part")} == content(whole)


def wait_for(happens: Any) -> None:
    until = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.01)


def broken_off(out: Path, whole: Path) -> Path:
    """What lies there when the last shard of train was about to be written."""
    for name, data in content(whole).items():
        if name.startswith("train/0") and not name.endswith("000006.tar"):
            files.write_text(out / name, "")
            (out / name).write_bytes(data)
    for path in (whole / "train" / "index").glob("*.prepared.json"):
        files.write_text(out / "train" / "index" / path.name, path.read_text())
    said = files.read_json(whole / "train" / "dataset.json")
    half = {name: said[name] for name in ("format", "kind", "made_by")} | {"complete": False}
    files.write_json(out / "train" / "dataset.json", half)
    return out


def test_other_arguments_do_not_go_on_with_it(tmp_path: Path, whole: Path) -> None:
    out = broken_off(tmp_path, whole)
    with pytest.raises(UsageError, match=r"train: holds a set made by .*; choose another folder"):
        prepare_digits(out, **ARGUMENTS | {"seed": 1})


@pytest.mark.parametrize("damage", ["short", "no record", "record of another set"])
def test_a_shard_that_is_not_as_noted_is_written_anew(tmp_path: Path, whole: Path, damage: str) -> None:
    out = broken_off(tmp_path, whole)
    tar, record = out / "train" / "000003.tar", out / "train" / "index" / "000003.prepared.json"
    match damage:
        case "short":
            os.truncate(tar, 512)
        case "no record":
            record.unlink()
        case _:
            files.write_json(record, files.read_json(record) | {"made_by": "another"})
    prepare_digits(out, **ARGUMENTS)
    assert content(out) == content(whole)


def test_half_a_set_is_not_indexed(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = broken_off(tmp_path, whole)
    assert main(["index", str(out / "train")]) == 2
    assert "half made; run the command that makes it again" in capsys.readouterr().err


def test_an_error_in_a_process_comes_back_and_is_gone_on_from(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / "pictures" / "one").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8))
        image.save(tmp_path / "pictures" / "one" / f"{i:02d}.png")
    bad = tmp_path / "pictures" / "one" / "31.png"
    good = bad.read_bytes()
    bad.write_bytes(b"x" * len(good))
    with pytest.raises(UsageError, match=r"31\.png: not a readable"):
        prepare_folder(tmp_path / "pictures", tmp_path / "out", **ARGUMENTS, workers=2)
    bad.write_bytes(good)
    prepare_folder(tmp_path / "pictures", tmp_path / "out", **ARGUMENTS, workers=2)
    prepare_folder(tmp_path / "pictures", tmp_path / "at_once", **ARGUMENTS)
    assert content(tmp_path / "out") == content(tmp_path / "at_once")


@pytest.mark.parametrize(("total", "sizes"), [(1, [1]), (1000, [1000]), (2001, [1000, 1000, 1])])
def test_shards_hold_a_thousand_images(total: int, sizes: list[int]) -> None:
    assert even_sizes(total) == sizes
    assert prepare.SHARD_IMAGES == 1000
