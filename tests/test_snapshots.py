"""Snapshots of averages outlast checkpoints, and averages of any length come of them, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from world import small_config

from pipeline import checkpoint, export, reconstruct, saving, snapshots
from pipeline.checkpoint import weights_stem
from pipeline.config_file import load_config, to_yaml
from pipeline.ema import Decay, Ema, Power
from pipeline.errors import RunError, UsageError
from pipeline.unet import build_unet
from vae.config import VaeModelConfig
from vae.model import build, encoder_sha256, load

KINDS = (Decay(0.9), Power(0.05), Power(0.1))
TRACKED = Power(0.13)  # directly, to compare with
STEPS, EVERY = 400, 20
IMAGES = 12  # of a batch


class Made:
    """A run whose weights wandered for `STEPS` steps, with a checkpoint and a snapshot after each `EVERY`."""

    def __init__(self, root: Path) -> None:
        self.root, self.run = root, root / "run"
        self.config = root / "config.yaml"
        values = small_config(root)
        values["ema"] = {"decays": [0.9], "sigma_rels": [0.05, 0.1], "snapshot_every_steps": EVERY}
        values["checkpoint"] = {"every_steps": EVERY, "keep_last": 2}
        self.config.write_text(yaml.safe_dump(values))
        settings = load_config(self.config)
        build(VaeModelConfig(block_out_channels=(8, 8), norm_num_groups=4)).save_pretrained(
            root / "vae" / "autoencoder"
        )
        self.unet = build_unet(settings.unet, settings.conditioning, (4, 8, 8), seed=0)
        self.latents = {
            "scale": 1.5,
            "shift": 0.0,
            "origin": {"encoder_sha256": encoder_sha256(load(settings.vae.path)), "source_fingerprint": "0" * 64},
        }
        self.names = [name for name, _ in self.unet.named_parameters()]
        self.weights = [p.detach().clone() for p in self.unet.parameters()]
        self.ema = Ema(self.weights, (*KINDS, TRACKED))
        saver = saving.Saver(self.run / "checkpoints", rank=0, num_ranks=1, max_file_bytes=100_000)
        generator = torch.Generator().manual_seed(1)
        for step in range(1, STEPS + 1):
            for weight in self.weights:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.01)
            self.ema.update(self.weights, step - 1)
            if step % EVERY == 0:
                self.save(saver, step)
        saver.finish()

    def save(self, saver: saving.Saver, step: int) -> None:
        """As the training does it."""
        lists = {"unet": self.weights, **{f"ema/{kind.name}": self.ema.shadows[kind.name] for kind in KINDS}}
        state = {"data": {"position": step * IMAGES}, "latents": self.latents}
        documents: dict[str, Any] = {f"{folder}/config.json": dict(self.unet.config) for folder in lists}
        documents["state.json"] = checkpoint.state_document(step, state)
        shapes = {name: tensor.shape for name, tensor in zip(self.names, self.weights, strict=True)}
        tensors = (
            (weights_stem(folder), name, tensor)
            for folder, local in lists.items()
            for name, tensor in zip(self.names, local, strict=True)
        )

        def done(folder: Path) -> None:
            snapshots.keep_snapshot(folder, self.run)
            checkpoint.prune(folder.parent, keep_last=2, keep_every_steps=None)

        whole = {weights_stem(folder): shapes for folder in lists}
        saver.begin(step, whole, tensors, documents, on_main=lambda work: work(), done=done)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The run, made once; nobody changes it."""
    return Made(tmp_path_factory.mktemp("wandered"))


@pytest.fixture
def made(once: Made, tmp_path: Path) -> tuple[Path, Path]:
    """(config, RUN) of a copy of it."""
    shutil.copytree(once.run, tmp_path / "run")
    values = yaml.safe_load(once.config.read_text())
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**values, "run_dir": str(tmp_path / "run")}))
    return config, tmp_path / "run"


def difference(folder: Path, tensors: list[Tensor]) -> float:
    """L2 distance between the U-Net that diffusers opens in a folder and a list of weights."""
    opened = UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False)
    return distance([p.detach() for p in opened.parameters()], tensors)


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    squares = [(a.double() - b.double()).square().sum() for a, b in zip(left, right, strict=True)]
    return float(torch.stack(squares).sum().sqrt())


# snapshots ----------------------------------------------------------------------------------------


def test_snapshots_outlast_their_checkpoints(once: Made) -> None:
    assert len(checkpoint.list_steps(once.run / "checkpoints")) == 2
    kept = snapshots.find(once.run, None)
    assert [path.name for path in kept] == [f"step-{step:09d}" for step in range(EVERY, STEPS + 1, EVERY)]
    for snapshot in snapshots.open_whole(kept):
        assert snapshot.state["data"]["position"] == IMAGES * snapshot.step
        assert snapshots.averages(snapshot.path) == [Power(0.05), Power(0.1)]


def test_a_snapshot_opens_in_diffusers_and_takes_no_room_of_its_own(once: Made) -> None:
    newest = snapshots.find(once.run, None)[-1]
    for kind in (Power(0.05), Power(0.1)):
        assert difference(newest / kind.name, once.ema.shadows[kind.name]) == 0
        files = sorted((newest / kind.name).glob("*.safetensors"))
        assert len(files) > 1
        for file in files:
            twin = once.run / "checkpoints" / newest.name / "ema" / kind.name / file.name
            assert file.samefile(twin)
    assert not (newest / "decay-0.9").exists()


def test_without_hard_links_a_snapshot_is_a_copy(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = made
    newest = snapshots.find(run, None)[-1]
    shutil.rmtree(newest)

    def no_links(source: Path, name: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    assert snapshots.keep_snapshot(run / "checkpoints" / newest.name, run) == newest
    checkpoint.verify(newest)


def test_a_snapshot_made_again_takes_the_place_of_the_first(made: tuple[Path, Path]) -> None:
    _, run = made
    newest = snapshots.find(run, None)[-1]
    (newest / "state.json").unlink()
    snapshots.keep_snapshot(run / "checkpoints" / newest.name, run)
    checkpoint.verify(newest)


def test_a_checkpoint_without_power_averages_leaves_none(made: tuple[Path, Path]) -> None:
    _, run = made
    newest = run / "checkpoints" / f"step-{STEPS:09d}"
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"] = {name: said for name, said in manifest["files"].items() if "power" not in name}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"no power average in it; ema\.sigma_rels asks for them"):
        snapshots.keep_snapshot(newest, run)


def test_a_full_disk_is_said_and_leaves_nothing(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = made
    newest = snapshots.find(run, None)[-1]
    shutil.rmtree(newest)

    def full(source: Path, name: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(RunError, match=r"No space left on device\. The checkpoint step-000000400 is whole"):
        snapshots.keep_snapshot(run / "checkpoints" / newest.name, run)
    assert not newest.exists() and not list((run / "ema").glob(".*"))


@pytest.mark.parametrize(("step", "every", "due"), [(40, 20, True), (40, 40, True), (40, 80, False), (40, None, False)])
def test_snapshots_are_due_at_multiples(step: int, every: int | None, due: bool) -> None:
    assert snapshots.is_due(step, every) is due


def test_a_run_that_goes_on_makes_the_snapshot_that_a_kill_left_out(made: tuple[Path, Path]) -> None:
    _, run = made
    newest = snapshots.find(run, None)[-1]
    newest.rename(newest.with_name(f".{newest.name}.part"))
    found = run / "checkpoints" / newest.name
    assert snapshots.continue_from(found, run, 3 * EVERY) == []
    assert not newest.exists()  # not due
    assert snapshots.continue_from(found, run, EVERY) == []
    checkpoint.verify(newest)
    assert not list((run / "ema").glob(".*"))


def test_a_run_that_was_set_back_forgets_what_came_later(made: tuple[Path, Path]) -> None:
    _, run = made
    before = snapshots.find(run, None)
    gone = snapshots.continue_from(run / "checkpoints" / before[-2].name, run, EVERY)
    assert gone == before[-1:]
    assert snapshots.find(run, None) == before[:-1]


def test_a_run_that_begins_has_no_snapshots(made: tuple[Path, Path]) -> None:
    _, run = made
    with pytest.raises(UsageError, match="has snapshots of averages, but the run has no checkpoint"):
        snapshots.continue_from(None, run, EVERY)
    assert snapshots.continue_from(None, run.with_name("new"), EVERY) == []


# the verb -----------------------------------------------------------------------------------------


def refused(config: Path, capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The one line in which the verb ends."""
    capsys.readouterr()
    assert reconstruct.main([str(config), *words]) == code
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    return line.removeprefix("error: ")


def test_an_average_is_reconstructed_and_opens_in_diffusers(
    once: Made, made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = made
    shutil.rmtree(run / "checkpoints")  # not wanted
    monkeypatch.setattr(saving, "MAX_FILE_BYTES", 100_000)  # several files, as of a big model
    assert reconstruct.main([str(config), "--sigma-rel", "0.13"]) == 0
    said = capsys.readouterr().err
    assert "of its distance from the raw weights" in said and "warning" not in said
    folder = run / "ema" / "reconstructed" / f"power-0.13-step-{STEPS:09d}"
    assert len(list(folder.glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 1
    wanted = once.ema.shadows[TRACKED.name]
    error = difference(folder, wanted) / distance(wanted, once.weights)
    assert error <= 0.01
    state = checkpoint.verify(folder).state
    assert state["step"] == STEPS and state["latents"] == once.latents
    note = state["reconstruction"]
    assert len(note["parts"]) == 2 * STEPS // EVERY
    assert sum(part["coefficient"] for part in note["parts"]) == pytest.approx(1, abs=1e-12)
    assert note["expected_error"] == pytest.approx(error, rel=0.3)
    assert not list((run / "ema").rglob("*.part"))


def test_what_was_stored_comes_back_bitwise_at_any_of_its_steps(once: Made, made: tuple[Path, Path]) -> None:
    config, run = made
    assert reconstruct.main([str(config), "--sigma-rel", "0.1", "--step", "200"]) == 0
    folder = run / "ema" / "reconstructed" / "power-0.1-step-000000200"
    stored = UNet2DConditionModel.from_pretrained(run / "ema" / "step-000000200" / "power-0.1", low_cpu_mem_usage=False)
    assert difference(folder, [p.detach() for p in stored.parameters()]) == 0


def test_a_coarse_fit_is_warned_of(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = made
    for path in snapshots.find(run, None)[:-2]:
        shutil.rmtree(path)
    assert reconstruct.main([str(config), "--sigma-rel", "0.2"]) == 0
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))
    assert "is far from the stored 0.05, 0.1, or there are too few snapshots (2;" in warning


@pytest.mark.parametrize("sigma_rel", ["0", "-0.1", "0.3", "nan"])
def test_a_length_out_of_range(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str], sigma_rel: str) -> None:
    line = refused(made[0], capsys, f"--sigma-rel={sigma_rel}")
    assert line.startswith("--sigma-rel: ") and "more than 0 and at most 0.2887 was wanted" in line


def test_no_snapshots(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = made
    shutil.rmtree(run / "ema")
    line = refused(config, capsys, "--sigma-rel=0.13")
    assert line.startswith(f"{run / 'ema'}: no snapshots of averages; train with ema.sigma_rels=[0.05,0.1] and")


def test_no_snapshot_of_that_step(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = made
    line = refused(config, capsys, "--sigma-rel=0.13", "--step=205")
    assert line == f"{run / 'ema'}: no snapshot of step 205; nearest: 200 and 220"


def test_averages_of_one_length_alone(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = made
    for path in snapshots.find(run, None):
        shutil.rmtree(path / "power-0.1")
    line = refused(config, capsys, "--sigma-rel=0.13")
    assert "holds averages of 1 length (0.05); two are wanted" in line


def test_a_broken_snapshot_is_named_and_can_be_done_without(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = made
    broken = sorted((run / "ema" / "step-000000100" / "power-0.1").glob("*.safetensors"))[1]
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.unlink()
    broken.write_bytes(content)
    line = refused(config, capsys, "--sigma-rel=0.13", code=1)
    assert line.startswith(f"{broken}: its content is not what was written (SHA-256 differs); move ")
    assert not (run / "ema" / "reconstructed").exists()
    shutil.rmtree(broken.parents[1])
    assert reconstruct.main([str(config), "--sigma-rel=0.13"]) == 0


def test_snapshots_of_two_courses_are_not_mixed(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = made
    shutil.copytree(run / "ema" / "step-000000400", run / "ema" / "step-000000410")
    line = refused(config, capsys, "--sigma-rel=0.13", code=1)
    assert "step-000000410: was made at position 4800, step-000000400 at 4800: not of the same course" in line


# its export ---------------------------------------------------------------------------------------


def test_any_average_can_be_exported(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = made
    (run / "config.yaml").write_text(to_yaml(load_config(config)))  # as train leaves it
    assert reconstruct.main([str(config), "--sigma-rel=0.13"]) == 0
    reconstructed = f"power-0.13-step-{STEPS:09d}"
    seen: list[str] = []
    for words, name, source, place in (
        ((), "decay-0.9", "step-000000400", run / "checkpoints" / "step-000000400" / "ema" / "decay-0.9"),
        (("--ema=power-0.05",), "power-0.05", "step-000000400", run / "ema" / "step-000000400" / "power-0.05"),
        ((f"--ema={reconstructed}",), reconstructed, reconstructed, run / "ema" / "reconstructed" / reconstructed),
    ):
        assert export.main([str(config), *words]) == 0, capsys.readouterr().err
        pipe = DiffusionPipeline.from_pretrained(run / "export", trust_remote_code=True)
        opened = UNet2DConditionModel.from_pretrained(place)
        assert distance([*pipe.unet.state_dict().values()], [*opened.state_dict().values()]) == 0
        passport = json.loads((run / "export" / "training.json").read_text())
        assert (passport["ema"], passport["checkpoint"]) == (name, source)
        assert f"average `{name}`" in (run / "export" / "README.md").read_text()
        seen.append(passport["manifest_sha256"])
        assert export.main([str(config), *words]) == 0
        assert "already" in capsys.readouterr().err
    assert len(set(seen)) == 2


def test_an_average_that_is_not_there_is_said_with_those_that_are(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = made
    assert reconstruct.main([str(config), "--sigma-rel=0.13"]) == 0
    capsys.readouterr()
    assert export.main([str(config), "--ema=power-0.2"]) == 2
    known = f"decay-0.9, power-0.05, power-0.1, power-0.13-step-{STEPS:09d}"
    assert capsys.readouterr().err == f"error: --ema: 'power-0.2' came; known: {known}\n"
    weights = run / "ema" / "reconstructed" / f"power-0.13-step-{STEPS:09d}" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert export.main([str(config), f"--ema={weights.parent.name}"]) == 1
    assert f"error: {weights}: " in capsys.readouterr().err
