"""The training program on one rank: what it promises about its run folder, its refusals and its numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from world import World, losses

from pipeline import checkpoint


def weights(run: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    folder = run / "checkpoints" / f"step-{step:09d}"
    return {p.relative_to(folder).as_posix(): load_file(p) for p in sorted(folder.rglob("*.safetensors"))}


def assert_same_weights(a: Path, b: Path, step: int) -> None:
    first, second = weights(a, step), weights(b, step)
    assert first.keys() == second.keys()
    for file, tensors in first.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second[file][name]), f"{file}: {name}"


def test_eight_steps_are_four_and_four(world: World) -> None:
    straight, parts = world.root / "straight", world.root / "parts"
    assert world.do("train", f"run_dir={straight}") == [0], world.said()
    assert world.do("train", f"run_dir={parts}", "train.steps=4") == [0], world.said()
    assert world.do("train", f"run_dir={parts}") == [0], world.said()
    assert_same_weights(straight, parts, 8)
    assert losses(straight) == losses(parts)
    assert [step for step, _, _ in losses(parts)] == list(range(1, 9))
    assert world.status(parts) == {"state": "done", "step": 8, "reason": None}
    resumed = world.do("train", f"run_dir={parts}")  # a finished run
    assert resumed == [0] and losses(straight) == losses(parts)
    assert world.do("train", f"run_dir={parts}", "train.steps=6") == [2]
    assert "has made 8 steps already, 6 were asked for" in world.said()
    unet = UNet2DConditionModel.from_pretrained(parts / "checkpoints" / "step-000000008" / "unet")
    assert unet.config["num_class_embeds"] == 11


def test_loader_processes_and_micro_batches_change_nothing_but_rounding(world: World) -> None:
    plain, other = world.root / "plain", world.root / "other"
    assert world.do("train", f"run_dir={plain}") == [0], world.said()
    assert world.do("train", f"run_dir={other}", "data.workers=2", "train.micro_batch_images=4") == [0], world.said()
    for (step, position, loss), (step2, position2, loss2) in zip(losses(plain), losses(other), strict=True):
        assert (step, position) == (step2, position2)
        assert abs(loss - loss2) < 1e-5


def test_the_vae_goes_on_exactly(made: World, tmp_path: Path) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    log = tmp_path / "log.txt"
    words = ("checkpoint.every_steps=2",)
    assert made.do("train_vae", f"vae.run_dir={straight}", *words, log=log) == [0], log.read_text()
    shutil.copytree(straight, parts)
    for path in checkpoint.list_steps(parts / "checkpoints")[:2]:  # as if it had been killed after step 4
        shutil.rmtree(path)
    assert made.do("train_vae", f"vae.run_dir={parts}", *words, log=log) == [0], log.read_text()
    assert_same_weights(straight, parts, 8)
    assert losses(straight) == losses(parts)


def test_the_vae_goes_on_exactly_with_its_flips(made: World, tmp_path: Path) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    log = tmp_path / "log.txt"
    words = ("checkpoint.every_steps=2", "data.flip=true", "data.crop=random")
    assert made.do("train_vae", f"vae.run_dir={straight}", *words, log=log) == [0], log.read_text()
    assert losses(straight) != losses(made.root / "vae")
    shutil.copytree(straight, parts)
    for path in checkpoint.list_steps(parts / "checkpoints")[:2]:
        shutil.rmtree(path)
    assert made.do("train_vae", f"vae.run_dir={parts}", *words, "data.flip=false", log=log) == [2]
    assert "data.flip was True, now False" in log.read_text()
    assert made.do("train_vae", f"vae.run_dir={parts}", *words, "data.workers=2", log=log) == [0], log.read_text()
    assert_same_weights(straight, parts, 8)
    assert losses(straight) == losses(parts)


def test_a_run_folder_keeps_its_config(world: World) -> None:
    assert world.do("train", "train.steps=4") == [0], world.said()
    assert world.do("train", "optimizer.learning_rate=0.5", "ema.decays=[0.7]") == [2]
    assert "optimizer.learning_rate was 0.001, now 0.5" in world.said()
    assert "ema.decays was [0.9, 0.99], now [0.7]" in world.said()
    assert world.status()["state"] == "usage" and world.status()["step"] == 4
    assert "Traceback" not in world.said()
    assert world.do("train", "tracking.every_steps=2", "checkpoint.every_steps=2") == [0], world.said()
    assert world.status() == {"state": "done", "step": 8, "reason": None}


def test_latents_of_another_vae_are_refused(world: World, made: World) -> None:
    other = world.root / "other_vae"
    shutil.copytree(made.root / "vae" / "autoencoder", other)
    file = other / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["encoder.conv_in.bias"][0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    assert world.do("train", f"vae.path={other}") == [2]
    assert "these latents were made by the VAE" in world.said() and "Traceback" not in world.said()
    assert world.do("encode", f"vae.path={other}") == [2]
    assert "vae_sha256 was" in world.said() and "Traceback" not in world.said()


def test_a_class_that_the_config_does_not_know_is_refused(world: World) -> None:
    assert world.do("train", "conditioning.num_classes=7") == [2]
    assert "class id 9 came, 0 to 6 was wanted" in world.said() and "Traceback" not in world.said()
    assert world.status()["state"] == "usage"


def test_an_image_size_that_the_vae_cannot_halve_is_refused(world: World) -> None:
    for verb in ("train_vae", "encode"):
        assert world.do(verb, "data.image_size=17", f"vae.run_dir={world.root / 'vae'}") == [2]
    assert world.said().count("data.image_size: 17 came, a multiple of the VAE's factor 2 was wanted") == 2


def test_a_torn_latent_shard_is_named(world: World, made: World) -> None:
    latents = world.root / "latents"
    shutil.copytree(made.root / "latents", latents)
    shard = sorted(latents.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-512])
    assert world.do("train", f"data.train_latents={latents}") == [2]
    assert f"{shard}: " in world.said() and "python -m pipeline index" in world.said()


def test_other_data_under_the_same_name_is_refused(world: World, made: World) -> None:
    latents = world.root / "latents"
    shutil.copytree(made.root / "latents", latents)
    assert world.do("train", f"data.train_latents={latents}", "train.steps=4") == [0], world.said()
    for name in ("dataset.json", "index/manifest.json"):
        said = json.loads((latents / name).read_text())
        (latents / name).write_text(json.dumps(said | {"fingerprint": "0" * 64}))
    assert world.do("train", f"data.train_latents={latents}") == [2]
    assert "data_fingerprint was" in world.said()


def test_a_loss_that_is_not_finite_changes_no_weight_and_names_the_step(world: World) -> None:
    assert world.do("train", "train.steps=4") == [0], world.said()
    before = checkpoint.newest(world.run_dir / "checkpoints")[0]
    assert before is not None
    state = json.loads((before.path / "state.json").read_text())
    poisoned = before.weights("unet")
    poisoned["conv_out.bias"][0] = float("nan")
    checkpoint_folder = world.root / "poisoned" / "checkpoints"
    unet = UNet2DConditionModel.from_pretrained(before.path / "unet")
    unet.load_state_dict(poisoned)
    checkpoint.save(
        checkpoint_folder,
        4,
        name="unet",
        model=unet,
        moments=before.moments("unet"),
        ema=before.ema(),
        state={name: state[name] for name in ("data", "quarantine", "latents")},
    )
    shutil.copy(world.run_dir / "config.yaml", world.root / "poisoned")
    assert world.do("train", f"run_dir={world.root / 'poisoned'}") == [1]
    assert "step 5, positions 48 to 59: loss nan" in world.said() and "Traceback" not in world.said()
    assert world.status(world.root / "poisoned")["state"] == "failed"
    assert [p.name for p in checkpoint.list_steps(checkpoint_folder)] == ["step-000000004"]
