"""A checkpoint is whole or not there, whoever wrote it; what is broken is found and named; nothing is a pickle."""

from __future__ import annotations

import json
import pickle
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from small_run import Run, moments_of_unet

from pipeline import checkpoint, files
from pipeline.checkpoint import MOMENTS, weights_stem
from pipeline.errors import RunError, UsageError
from pipeline.saving import Saver, plan_files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with checkpoints of step 1 and 2."""
    run = Run()
    for step in (1, 2):
        run.step(step)
        run.save(tmp_path, step)
    return tmp_path


def test_what_is_loaded_goes_on_bit_by_bit(saved: Path) -> None:
    found, wrong = checkpoint.newest(saved)
    assert found is not None and not wrong and found.step == 2
    resumed, straight = Run(seed=99), Run()
    resumed.take_up(found)
    for step in (1, 2):
        straight.step(step)
    for step in (3, 4):
        straight.step(step)
        resumed.step(step)
    for (stem, name, tensor), (stem2, name2, tensor2) in zip(straight.tensors(), resumed.tensors(), strict=True):
        assert (stem, name) == (stem2, name2) and torch.equal(tensor, tensor2)


@pytest.mark.parametrize("max_file_bytes", [1 << 30, 4000])
def test_its_model_folders_open_in_diffusers(tmp_path: Path, max_file_bytes: int) -> None:
    run = Run()
    run.step(1)
    run.save(tmp_path, 1, max_file_bytes)
    found = checkpoint.verify(tmp_path / "step-000000001")
    assert len(list((found.path / "unet").glob("*.safetensors"))) == (1 if max_file_bytes > 4000 else 29)
    for folder in ("unet", "ema/decay-0.9", "ema/decay-0.99"):
        opened = UNet2DConditionModel.from_pretrained(found.path / folder)
        tensors = found.tensors(weights_stem(folder))
        assert opened.state_dict().keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in opened.state_dict().items())
        with found.reading(weights_stem(folder)) as read:
            assert all(torch.equal(read(name), tensor) for name, tensor in tensors.items())


def test_its_files_are_named_as_promised(saved: Path) -> None:
    names = {p.relative_to(saved / "step-000000002").as_posix() for p in (saved / "step-000000002").rglob("*.*")}
    assert {"state.json", "manifest.json", "unet/config.json", "optimizer/unet/exp_avg.safetensors"} <= names
    assert not [name for name in names if Path(name).suffix not in (".json", ".safetensors", ".9", ".99")]
    state = json.loads((saved / "step-000000002" / "state.json").read_text())
    assert state["step"] == 2 and state["data"] == {"position": 20} and "torch" in state["versions"]


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_ranks_write_it_together_as_one_writes_it_alone(tmp_path: Path, num_ranks: int) -> None:
    run = Run()
    run.step(1)
    alone, together = tmp_path / "alone", tmp_path / "together"
    run.save(alone, 1, max_file_bytes=4000)
    ready = threading.Barrier(num_ranks)

    def on_main(rank: int) -> Any:
        def do(work: Any) -> None:
            if rank == 0:
                work()
            ready.wait(30)

        return do

    def save(rank: int) -> None:
        saver = Saver(together, rank=rank, num_ranks=num_ranks, max_file_bytes=4000)
        config = json.loads(run.unet.to_json_string())
        folders = ["unet", *(f"ema/{name}" for name in run.ema.shadows)]
        documents: dict[str, Any] = {f"{folder}/config.json": config for folder in folders}
        documents["state.json"] = checkpoint.state_document(1, {"data": {"position": 10}})
        shapes = dict.fromkeys(run.lists(), run.shapes)
        saver.begin(1, shapes, run.tensors(), documents, on_main=on_main(rank), done=lambda folder: None)
        saver.finish()

    threads = [threading.Thread(target=save, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    written = {p.relative_to(alone): p.read_bytes() for p in alone.rglob("*") if p.is_file()}
    assert written == {p.relative_to(together): p.read_bytes() for p in together.rglob("*") if p.is_file()}
    owners = {file.rank for of in plan_files({"a": run.shapes}, num_ranks, 4000).values() for file in of}
    assert owners == set(range(num_ranks))


def every_file() -> list[str]:
    models = ("unet", "ema/decay-0.9", "ema/decay-0.99")
    weights = [name for model in models for name in (f"{model}/config.json", f"{weights_stem(model)}.safetensors")]
    moment_files = [f"{moments_of_unet(name)}.safetensors" for name in MOMENTS]
    return [*weights, *moment_files, "state.json", "manifest.json"]


@pytest.mark.parametrize("harm", ["removed", "truncated", "bit flipped"])
@pytest.mark.parametrize("name", every_file())
def test_harm_to_any_file_is_found_and_the_older_checkpoint_used(saved: Path, name: str, harm: str) -> None:
    file = saved / "step-000000002" / name
    data = bytearray(file.read_bytes())
    match harm:
        case "removed":
            file.unlink()
        case "truncated":
            file.write_bytes(data[:-1])
        case _:
            data[len(data) // 2] ^= 4
            file.write_bytes(data)
    found, wrong = checkpoint.newest(saved)
    assert found is not None and found.step == 1
    assert len(wrong) == 1 and Path(name).name in wrong[0]


def test_a_newer_format_is_refused_and_not_passed_over(saved: Path) -> None:
    path = saved / "step-000000002" / "manifest.json"
    manifest = {"format": checkpoint.FORMAT + 1, "files": json.loads(path.read_text())["files"]}
    files.write_json(path, manifest | {"sha256": files.fingerprint(manifest)})
    with pytest.raises(UsageError, match="format 2 came"):
        checkpoint.newest(saved)


def test_a_write_that_fails_leaves_what_was_there(saved: Path) -> None:
    run = Run()
    run.step(1)
    before = sorted(p.name for p in saved.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses every longer file
    try:
        with pytest.raises(RunError, match=r"step 3: .*step-000000002.*run the same command again"):
            run.save(saved, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in saved.iterdir()) == before
    assert checkpoint.newest(saved)[0] is not None
    run.save(saved, 3)
    assert checkpoint.verify(saved / "step-000000003").step == 3


def test_a_write_that_fails_is_told_at_the_next_one_too(saved: Path) -> None:
    run = Run()
    run.step(1)
    saver = Saver(saved, rank=0, num_ranks=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        run.begin(saver, 3)
        while not saver.failed():
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(RunError, match="step 3: the checkpoint could not be written"):
        run.begin(saver, 4)


def test_a_broken_checkpoint_is_replaced_when_its_step_comes_again(saved: Path) -> None:
    (saved / "step-000000002" / "state.json").unlink()
    run = Run()
    run.step(1)
    run.save(saved, 2)
    assert checkpoint.verify(saved / "step-000000002").step == 2


def test_prune_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    for step in range(10, 110, 10):
        (tmp_path / f"step-{step:09d}").mkdir()
    (tmp_path / ".step-000000099.part").mkdir()
    checkpoint.prune(tmp_path, keep_last=2, keep_every_steps=50)
    assert sorted(int(p.name[5:]) for p in tmp_path.iterdir()) == [50, 90, 100]


def test_no_pickle_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle was read")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, poison)
    found, _ = checkpoint.newest(saved)
    assert found is not None
    run = Run(seed=5)
    run.take_up(found)
    run.step(3)
    run.save(saved, 3)


def test_what_is_saved_is_of_the_moment(tmp_path: Path) -> None:
    """The training goes on while the files are written."""
    run, saver = Run(), Saver(tmp_path, rank=0, num_ranks=1)
    run.step(1)
    before = {(stem, name): tensor.clone() for stem, name, tensor in run.tensors()}
    run.begin(saver, 1)
    for step in (2, 3):
        run.step(step)
    saver.finish()
    found = checkpoint.verify(tmp_path / "step-000000001")
    for (stem, name), tensor in before.items():
        assert torch.equal(found.tensors(stem)[name], tensor)
