"""The training program on one rank: what it promises about its run folder, its refusals and its numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from world import FORKSERVER, World, losses, run_rank, sealed_again

from pipeline import checkpoint
from pipeline.errors import RunError
from pipeline.fitting import largest_that_fits


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
    assert "these latents were made by the encoder" in world.said() and "Traceback" not in world.said()
    assert world.do("encode", f"vae.path={other}") == [2]
    assert "encoder_sha256 was" in world.said() and "Traceback" not in world.said()


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
    poisoned = world.root / "poisoned" / "checkpoints" / "step-000000004"
    shutil.copytree(world.run_dir / "checkpoints" / "step-000000004", poisoned)
    weights = load_file(poisoned / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"][0] = float("nan")
    save_file(weights, poisoned / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    sealed_again(poisoned)
    shutil.copy(world.run_dir / "config.yaml", world.root / "poisoned")
    assert world.do("train", f"run_dir={world.root / 'poisoned'}") == [1]
    told = "step 5, positions 48 to 59: loss nan (rank 0), gradient norm nan: not finite; it changed no weight"
    assert told in world.said() and "Traceback" not in world.said()
    assert world.status(world.root / "poisoned")["state"] == "failed"
    assert [p.name for p in checkpoint.list_steps(poisoned.parent)] == ["step-000000004"]


LEAPING = ("optimizer.learning_rate=0.2", "optimizer.schedule=constant", "optimizer.gradient_clip_norm=1.0e9")
GUARDED = ("train.spike_factor=3.0", "train.spike_window_steps=2", "checkpoint.every_steps=1", "train.steps=12")


def test_a_loss_that_leaps_sets_the_run_back(world: World) -> None:
    """The learning rate is far too high: weights go back to the checkpoint, the data goes on."""
    one, two = world.root / "one", world.root / "two"
    assert world.do("train", *LEAPING, *GUARDED, "train.max_spikes=100", f"run_dir={one}") == [0], world.said()
    rows = [json.loads(line) for line in (one / "spikes.jsonl").read_text().splitlines()]
    assert rows and all(row["back_to_step"] < row["step"] for row in rows)
    assert world.said().count("with the data that follows") == len(rows)
    found, wrong = checkpoint.newest(one / "checkpoints")
    assert found is not None and not wrong and found.step == 12
    thrown_away = sum(row["step"] - row["back_to_step"] for row in rows)
    assert found.state["data"]["position"] == 12 * (12 + thrown_away)  # positions never go back
    assert found.state["num_spikes"] == len(rows)
    assert [step for step, _, _ in losses(one)] == list(range(1, 13))  # each step once
    # The same over two ranks.
    words = ("train.max_spikes=100", f"run_dir={two}", "data.workers=1")
    assert world.do("train", *LEAPING, *GUARDED, *words, ranks=2) == [0, 0], world.said()
    assert [step for step, _, _ in losses(two)] == list(range(1, 13))


def test_it_is_set_back_so_often_and_no_more(world: World) -> None:
    assert world.do("train", *LEAPING, *GUARDED, "train.max_spikes=0") == [1]
    assert "spike number 1, and train.max_spikes is 0" in world.said() and "Traceback" not in world.said()
    assert world.status()["state"] == "failed"


def test_a_limit_of_time_saves_and_stops(world: World) -> None:
    assert world.do("train", "train.steps=100000", "checkpoint.every_steps=100000", "train.limit_s=2") == [1]
    status = world.status()
    assert status["state"] == "preempted" and status["step"] > 0
    assert status["reason"] == f"the limit of time after step {status['step']}"
    assert "all is saved: run the same command again and it goes on" in world.said()
    found, wrong = checkpoint.newest(world.run_dir / "checkpoints")
    assert found is not None and not wrong and found.step == status["step"]
    done = status["step"] + 2
    assert world.do("train", f"train.steps={done}") == [0], world.said()
    straight = world.root / "straight"
    assert world.do("train", f"train.steps={done}", f"run_dir={straight}") == [0], world.said()
    assert losses(world.run_dir) == losses(straight)


def test_a_run_that_hangs_tells_where(world: World) -> None:
    assert world.do("train", "train.hang_timeout_s=0.001") == [1]
    assert "no step has ended for" in world.said() and "train.hang_timeout_s=0.001" in world.said()
    assert world.status()["state"] == "failed" and "no step has ended" in world.status()["reason"]
    assert "training.py" in (world.run_dir / "stacks-0.txt").read_text()


def test_resumes_twice_in_an_epoch_and_at_its_very_end(world: World) -> None:
    """360 samples in 12 lanes are 30 steps of 12 images an epoch."""
    straight, parts = world.root / "straight", world.root / "parts"
    assert world.do("train", "train.steps=64", f"run_dir={straight}") == [0], world.said()
    for steps in (8, 19, 30, 60, 64):  # twice in the first epoch, at its end, at the next one's
        assert world.do("train", f"train.steps={steps}", f"run_dir={parts}") == [0], world.said()
    assert_same_weights(straight, parts, 64)
    assert losses(straight) == losses(parts)


def without_pickles(words: list[str], log: str) -> None:
    """The training, in a process where reading a pickle is an error."""
    import pickle

    import torch.serialization

    def poison(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle was read")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (torch.serialization, "load")):
        setattr(owner, name, poison)
    run_rank(0, "train", words, 1, 0, log)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_no_pickle_is_read_while_saving_and_resuming(world: World, strategy: str) -> None:
    for steps in (4, 8):
        words = [str(world.config), f"engine.strategy={strategy}", f"train.steps={steps}", "checkpoint.every_steps=2"]
        started = FORKSERVER.Process(target=without_pickles, args=(words, str(world.root / "log.txt")))
        started.start()
        started.join(120)
        assert started.exitcode == 0, world.said()
    assert world.status() == {"state": "done", "step": 8, "reason": None}


def test_an_average_is_put_together_after_the_training(world: World) -> None:
    """Of 30 snapshots of a real training, against one kept all along."""
    tracked, stored = world.root / "tracked", world.root / "stored"
    words = ["train.steps=60", "checkpoint.every_steps=2", "ema.decays=[]"]
    assert world.do("train", *words, "ema.sigma_rels=[0.13]", f"run_dir={tracked}") == [0], world.said()
    kept = ["ema.sigma_rels=[0.05,0.1]", "ema.snapshot_every_steps=2", f"run_dir={stored}"]
    assert world.do("train", *words[:1], *words[1:], *kept, "train.steps=20") == [0], world.said()
    assert world.do("train", *words, *kept) == [0], world.said()  # resumed on the way
    assert len(list((stored / "ema").glob("step-*"))) == 30
    assert world.do("reconstruct", *words, *kept, "--sigma-rel", "0.13") == [0], world.said()
    made = load_file(next((stored / "ema" / "reconstructed").glob("power-0.13-*/*.safetensors")))
    whole = weights(tracked, 60)
    raw, wanted = (whole[f"{folder}/diffusion_pytorch_model.safetensors"] for folder in ("unet", "ema/power-0.13"))
    error = sum(float((made[name] - wanted[name]).double().square().sum()) for name in wanted)
    apart = sum(float((raw[name] - wanted[name]).double().square().sum()) for name in wanted)
    assert (error / apart) ** 0.5 <= 0.01


def test_the_micro_batch_that_fits_is_found_and_kept() -> None:
    for limit, wanted in ((24, 24), (13, 12), (5, 4), (1, 1)):
        tried: list[int] = []

        def attempt(size: int, limit: int = limit, tried: list[int] = tried) -> None:
            tried.append(size)
            if size > limit:
                raise torch.OutOfMemoryError

        assert largest_that_fits(24, attempt, lambda fits: fits) == wanted
        assert tried == sorted(tried, reverse=True)
    with pytest.raises(RunError, match="not even one image fits"):
        largest_that_fits(24, attempt, lambda fits: False)


def test_finding_the_micro_batch_changes_nothing(world: World) -> None:
    given, found = world.root / "given", world.root / "found"
    for run, micro in ((given, "12"), (found, "auto")):
        words = (f"train.micro_batch_images={micro}", f"run_dir={run}")
        assert world.do("train", *words, "train.steps=4") == [0], world.said()
        assert world.do("train", *words) == [0], world.said()
    assert "train.micro_batch_images: 12 of 12 images fit in one forward pass" in world.said()
    assert_same_weights(given, found, 8)
    assert losses(given) == losses(found)


@pytest.mark.parametrize(
    ("precision", "kind"),
    [("fp16", "adamw"), ("bf16", "adamw"), ("bf16_weights", "adamw"), ("fp32", "muon"), ("fp16", "muon")],
)
def test_other_precisions_and_muon_go_on_exactly(world: World, precision: str, kind: str) -> None:
    """fp16 begins with overflows, which skip steps and lower the scale; both are part of a checkpoint."""
    straight, parts = world.root / "straight", world.root / "parts"
    words = (f"engine.precision={precision}", f"optimizer.kind={kind}", "train.steps=6", "checkpoint.every_steps=2")
    assert world.do("train", *words, f"run_dir={straight}") == [0], world.said()
    shutil.copytree(straight, parts)
    for path in checkpoint.list_steps(parts / "checkpoints")[:2]:
        shutil.rmtree(path)
    assert world.do("train", *words, f"run_dir={parts}") == [0], world.said()
    assert_same_weights(straight, parts, 6)
    assert losses(straight) == losses(parts)
    state = json.loads((parts / "checkpoints/step-000000006/state.json").read_text())
    assert ("scale" in state["optimizer"]["scaler"]) == (precision == "fp16")


def test_muon_learns_the_same_on_two_ranks_and_only_where_matrices_are_whole(world: World) -> None:
    one, two = world.root / "one", world.root / "two"
    muon = "optimizer.kind=muon"
    assert world.do("train", muon, f"run_dir={one}") == [0], world.said()
    assert world.do("train", muon, f"run_dir={two}", ranks=2) == [0, 0], world.said()
    for ours, theirs in zip(losses(one), losses(two), strict=True):
        assert ours[:2] == theirs[:2] and abs(ours[2] - theirs[2]) <= 1e-4
    assert world.do("train", "optimizer.kind=adamw", f"run_dir={world.root / 'adamw'}") == [0], world.said()
    assert losses(world.root / "adamw")[1][2] != losses(one)[1][2]
    assert world.do("train", muon, "engine.strategy=fsdp2") == [2]
    assert "error: optimizer.kind: muon came with engine.strategy fsdp2, ddp was wanted" in world.said()
