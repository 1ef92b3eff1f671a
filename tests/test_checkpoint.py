"""A checkpoint is whole or not there; what is broken is found and named; nothing is a pickle."""

from __future__ import annotations

import json
import pickle
import resource
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pipeline import checkpoint, files
from pipeline.ema import Ema
from pipeline.errors import RunError, UsageError
from pipeline.optim import build_adamw, load_moments, moments


def small_unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        num_class_embeds=3,
    )


def take_step(unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, 4, 4, 4, generator=generator)
    condition = {"class_labels": torch.tensor([0, 2]), "encoder_hidden_states": torch.zeros(2, 1, 8)}
    unet(z, torch.tensor([1, 7]), **condition).sample.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def adamw(unet: UNet2DConditionModel) -> torch.optim.Optimizer:
    return build_adamw(unet, learning_rate=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with checkpoints of step 1 and 2."""
    unet = small_unet()
    optimizer, ema = adamw(unet), Ema(unet, (0.9, 0.99))
    for step in (1, 2):
        take_step(unet, optimizer, step)
        ema.update(unet, step - 1)
        save(tmp_path, step, unet, optimizer, ema)
    return tmp_path


def save(folder: Path, step: int, unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer, ema: Ema) -> Path:
    return checkpoint.save(
        folder,
        step,
        name="unet",
        model=unet,
        moments=moments(optimizer, unet),
        ema=ema.state(),
        state={"data": {"position": 10 * step}},
    )


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_loaded_goes_on_bit_by_bit(saved: Path) -> None:
    found, wrong = checkpoint.newest(saved)
    assert found is not None and not wrong and found.step == 2
    resumed, straight = small_unet(seed=99), small_unet()
    resumed.load_state_dict(found.weights("unet"))
    resumed_optimizer, straight_optimizer = adamw(resumed), adamw(straight)
    load_moments(resumed_optimizer, resumed, found.moments("unet"), num_steps=2)
    resumed_ema, straight_ema = Ema(resumed, (0.9, 0.99)), Ema(straight, (0.9, 0.99))
    resumed_ema.load(found.ema())
    for step in (1, 2):
        take_step(straight, straight_optimizer, step)
        straight_ema.update(straight, step - 1)
    for step in (3, 4):
        for unet, optimizer, ema in (
            (straight, straight_optimizer, straight_ema),
            (resumed, resumed_optimizer, resumed_ema),
        ):
            take_step(unet, optimizer, step)
            ema.update(unet, step - 1)
    assert_equal(straight.state_dict(), resumed.state_dict())
    for profile, tensors in straight_ema.state().items():
        assert_equal(tensors, resumed_ema.state()[profile])
    for moment, tensors in moments(straight_optimizer, straight).items():
        assert_equal(tensors, moments(resumed_optimizer, resumed)[moment])


def test_its_model_folders_open_in_diffusers(saved: Path) -> None:
    found = checkpoint.verify(saved / "step-000000002")
    for folder in ("unet", "ema/decay-0.9", "ema/decay-0.99"):
        opened = UNet2DConditionModel.from_pretrained(found.path / folder)
        assert_equal(opened.state_dict(), found.weights(folder))


def test_its_files_are_named_as_promised(saved: Path) -> None:
    names = {p.relative_to(saved / "step-000000002").as_posix() for p in (saved / "step-000000002").rglob("*.*")}
    assert {"state.json", "manifest.json", "unet/config.json", "optimizer/unet/exp_avg.safetensors"} <= names
    assert not [name for name in names if Path(name).suffix not in (".json", ".safetensors", ".9", ".99")]
    state = json.loads((saved / "step-000000002" / "state.json").read_text())
    assert state["step"] == 2 and state["data"] == {"position": 20} and "torch" in state["versions"]


def every_file() -> list[str]:
    models = ("unet", "ema/decay-0.9", "ema/decay-0.99")
    weights = [f"{model}/{name}" for model in models for name in ("config.json", checkpoint.WEIGHTS)]
    moment_files = [f"optimizer/unet/{name}.safetensors" for name in ("exp_avg", "exp_avg_sq")]
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
    unet = small_unet()
    optimizer, ema = adamw(unet), Ema(unet, (0.9,))
    take_step(unet, optimizer, 1)
    before = sorted(p.name for p in saved.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses every longer file
    try:
        with pytest.raises(RunError, match=r"step 3: .*step-000000002.*run the same command again"):
            save(saved, 3, unet, optimizer, ema)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in saved.iterdir()) == before
    assert checkpoint.newest(saved)[0] is not None
    save(saved, 3, unet, optimizer, ema)
    assert checkpoint.verify(saved / "step-000000003").step == 3


def test_a_broken_checkpoint_is_replaced_when_its_step_comes_again(saved: Path) -> None:
    (saved / "step-000000002" / "state.json").unlink()
    unet = small_unet()
    optimizer = adamw(unet)
    take_step(unet, optimizer, 1)
    save(saved, 2, unet, optimizer, Ema(unet, (0.9,)))
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
    assert found.weights("unet") and found.moments("unet") and found.ema()


def test_shared_storage_is_written_whole(tmp_path: Path) -> None:
    unet = small_unet()
    ema = Ema(unet, (0.9,))
    base = torch.arange(12.0)
    views = {"a": base[:6], "b": base[3:9], "c": base.view(3, 4).t()}
    path = checkpoint.save(
        tmp_path, 1, name="unet", model=unet, moments={"exp_avg": views}, ema=ema.state(), state={"data": {}}
    )
    read = checkpoint.verify(path).moments("unet")["exp_avg"]
    assert all(torch.equal(read[name], views[name]) for name in views)
