"""The autoencoder's training as a user runs it: the game on ranks, killed and gone on, its alarms, its refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetModel
from world import World, losses, rows

from pipeline import checkpoint
from vae.discriminator import PatchDiscriminator
from vae.metrics import reconstruct
from vae.model import encoder_sha256, load
from vae.moments import encode_moments

GAME = {
    "adversary": {
        "discriminator": {"base_channels": 8, "num_downsamplings": 1},
        "start_step": 4,
        "learning_rate": 1e-3,
    },
    "check_every_steps": 5,
}


def words_of(settings: dict[str, Any], run: Path, *more: str) -> list[str]:
    """A train section as overrides, and its run folder."""

    def flat(prefix: str, value: Any) -> list[str]:
        if isinstance(value, dict):
            return [word for key, inner in value.items() for word in flat(f"{prefix}.{key}", inner)]
        return [f"{prefix}={json.dumps(value)}"]

    return [*flat("vae.train", settings), f"vae.run_dir={run}", *more]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    found = sorted(folder.rglob("*.safetensors"))
    assert found
    return {f"{file.relative_to(folder)}:{name}": t for file in found for name, t in load_file(file).items()}


def alarms(run: Path) -> list[str]:
    path = run / "alarms.jsonl"
    return [json.loads(line)["alarm"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def game(made: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A game of 20 steps that nothing disturbed."""
    run = tmp_path_factory.mktemp("game") / "straight"
    assert made.do("train_vae", *words_of(GAME | {"steps": 20}, run)) == [0], made.said()
    return run


def test_the_game_is_played_and_written_down(game: Path) -> None:
    by_step = {row["step"]: row for row in rows(game) if "loss" in row}
    assert sorted(by_step) == list(range(1, 21))
    for step, row in by_step.items():
        assert ("discriminator/loss" in row) == (step > 4) and ("adversarial" in row) == (step > 3)
        assert {"reconstruction", "kl_nats_per_element", "kl_channel/3", "grad_norm"} <= row.keys()
        if step > 4:
            shares = [row[f"discriminator/{name}"] for name in ("accuracy_real", "accuracy_fake", "saturation")]
            assert all(0 <= share <= 1 for share in shares) and row["discriminator/grad_norm"] > 0
            assert row["adversarial_weight"] > 0
    assert [row["step"] for row in rows(game) if "coverage" in row] == [5, 10, 15, 20]
    newest = game / "checkpoints" / "step-000000020"
    assert isinstance(PatchDiscriminator.from_pretrained(newest / "discriminator"), PatchDiscriminator)
    state = json.loads((newest / "state.json").read_text())
    assert state["adversary"]["num_updates"] == 16 and state["optimizer"]["num_updates"] == 20
    assert state["carried"]["adaptive_weight"] > 0
    assert {path.name for path in (newest / "optimizer" / "discriminator").iterdir()} == {
        "exp_avg.safetensors",
        "exp_avg_sq.safetensors",
    }


def test_killed_and_gone_on_with_it_is_bit_equal_with_the_discriminator(
    game: Path, made: World, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    shutil.copytree(game, parts)
    for path in checkpoint.list_steps(parts / "checkpoints")[:2]:  # as if it had been killed after step 12
        shutil.rmtree(path)
    assert [path.name for path in checkpoint.list_steps(parts / "checkpoints")] == ["step-000000012"]
    log = tmp_path / "log.txt"
    assert made.do("train_vae", *words_of(GAME | {"steps": 20}, parts), log=log) == [0], log.read_text()
    assert losses(parts) == losses(game)
    both = [tensors(run / "checkpoints" / "step-000000020") for run in (game, parts)]
    assert both[0].keys() == both[1].keys() and any("discriminator" in name for name in both[0])
    assert all(torch.equal(tensor, both[1][name]) for name, tensor in both[0].items())
    states = [(run / "checkpoints" / "step-000000020" / "state.json").read_text() for run in (game, parts)]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("ranks", "more"),
    [(1, ["vae.train.micro_batch_images=2"]), (2, []), (2, ["vae.train.micro_batch_images=2"])],
    ids=["micro-batches", "2 ranks", "2 ranks, micro-batches"],
)
def test_ranks_and_micro_batches_change_nothing_but_rounding(
    game: Path, made: World, tmp_path: Path, ranks: int, more: list[str]
) -> None:
    log = tmp_path / "log.txt"
    run = tmp_path / "run"
    words = words_of(GAME | {"steps": 20}, run, *more)
    assert made.do("train_vae", *words, ranks=ranks, log=log) == [0] * ranks, log.read_text()
    for alone, shared in zip(rows(game), rows(run), strict=True):
        for name in ("loss", "reconstruction", "adversarial_weight", "discriminator/loss", "discriminator/r1"):
            if name in alone:
                assert shared[name] == pytest.approx(alone[name], abs=1e-5, rel=1e-4), (alone["step"], name)
        assert abs(alone.get("loss", 0) - shared.get("loss", 0)) < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "bf16_weights", "fp16"])
def test_all_losses_together_run_in_half_precision(made: World, tmp_path: Path, precision: str) -> None:
    settings = GAME | {
        "steps": 8,
        "reconstruction": "gaussian",
        "kl_weight": 1.0,
        "kl_warmup_steps": 4,
        "equivariance_share": 0.5,
    }
    settings["adversary"] = GAME["adversary"] | {"class_conditional": True, "game": "minimax", "start_step": 0}
    run, log = tmp_path / "run", tmp_path / "log.txt"
    more = [f"engine.precision={precision}", "engine.gradient_checkpointing=true", "data.image_size=32"]
    assert made.do("train_vae", *words_of(settings, run, *more), log=log) == [0], log.read_text()
    errors = [row["reconstruction"] for row in rows(run) if "loss" in row]
    assert len(errors) == 8 and min(errors[4:]) < 0.9 * errors[0]
    name = "autoencoder/diffusion_pytorch_model.safetensors"
    finished, saved = load_file(run / name), load_file(run / "checkpoints" / "step-000000008" / name)
    assert all(torch.equal(weight, saved[name]) for name, weight in finished.items()), "fp32, as AdamW has it"


def test_fp16_honours_force_upcast(made: World, tmp_path: Path) -> None:
    """Our autoencoder's config says that fp16 overflows (diffusers' default), so it computes in fp32."""
    log = tmp_path / "log.txt"
    runs = {precision: tmp_path / precision for precision in ("fp32", "fp16")}
    for precision, run in runs.items():
        words = words_of({"steps": 4}, run, f"engine.precision={precision}")
        assert made.do("train_vae", *words, log=log) == [0], log.read_text()
    both = list(zip(*(losses(run) for run in runs.values()), strict=True))
    assert [a[2] for a, _ in both] == pytest.approx([b[2] for _, b in both], rel=1e-4)


# Alarms --------------------------------------------------------------------------------------------


def test_a_healthy_run_raises_no_alarm(made: World, game: Path, tmp_path: Path) -> None:
    assert alarms(game) == []
    run, log = tmp_path / "run", tmp_path / "log.txt"
    settings = GAME | {"steps": 80, "check_every_steps": 5}
    assert made.do("train_vae", *words_of(settings, run), log=log) == [0], log.read_text()
    assert alarms(run) == []


@pytest.mark.parametrize(
    ("alarm", "settings", "told"),
    [
        (
            "saturated_discriminator",
            {"learning_rate": 1e-6, "adversary": {"r1_gamma": 0.0, "start_step": 0}},  # grey beside digits: easy
            "raise the weight of the R1 penalty",
        ),
        (
            "collapsed_coverage",
            {"adversary": {"adaptive": False, "weight": 1e4, "start_step": 30, "r1_gamma": 0.0}},
            "go back to a checkpoint from before",
        ),
        ("collapsed_posterior", {"kl_weight": 1e3, "adversary": {"start_step": 1000}}, "lower kl_weight"),
    ],
)
def test_each_collapse_raises_its_alarm(
    made: World, tmp_path: Path, alarm: str, settings: dict[str, Any], told: str
) -> None:
    run, log = tmp_path / "run", tmp_path / "log.txt"
    adversary = GAME["adversary"] | settings["adversary"]
    asked = GAME | settings | {"adversary": adversary, "steps": 80}
    assert made.do("train_vae", *words_of(asked, run), log=log) == [0], log.read_text()
    assert alarm in alarms(run)
    assert "warning: step " in log.read_text() and told in log.read_text()
    assert alarms(run).count(alarm) <= 2, "said when it begins, not at each look"


# From one that is there, and what comes out -----------------------------------------------------------


def latents_of(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return encode_moments(vae, x)


def test_fine_tuning_begins_with_what_is_there(made: World, tmp_path: Path) -> None:
    """With perceptual features of a transformers network that lies in a folder, which stays as it is."""
    run, log = tmp_path / "run", tmp_path / "log.txt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
        ResNetModel(shape).save_pretrained(tmp_path / "eyes")
    start = made.root / "vae" / "autoencoder"
    settings = GAME | {
        "steps": 10,
        "warmup_steps": 0,
        "start_from": str(start),
        "perceptual": {"backbone": str(tmp_path / "eyes"), "weight": 0.1},
    }
    words = words_of(settings, run, "vae.model.block_out_channels=[64,64]")  # it brings its own shape
    assert made.do("train_vae", *words, log=log) == [0], log.read_text()
    first = next(row for row in rows(run) if row["step"] == 1)
    fresh = next(row for row in rows(made.root / "vae") if row["step"] == 1)
    assert first["reconstruction"] < 0.5 * fresh["reconstruction"] and first["perceptual"] > 0
    scores = json.loads((run / "measured" / "scores.json").read_text())
    assert scores["reconstruction/perceptual_distance"] > 0
    assert {"reconstructions.png", "interpolations.png"} <= {path.name for path in (run / "measured").iterdir()}

    missing = words_of(settings | {"perceptual": {"backbone": str(tmp_path / "no")}}, tmp_path / "other")
    assert made.do("train_vae", *missing, log=log) == [2]
    assert "vae.train.perceptual.backbone: " in log.read_text().splitlines()[-1]
    changed = tmp_path / "changed"
    vae = load(start)
    vae.decoder.conv_in.bias.data += 1
    vae.save_pretrained(changed)
    again = words_of(settings | {"start_from": str(changed), "steps": 12}, run, "vae.model.block_out_channels=[64,64]")
    assert made.do("train_vae", *again, log=log) == [2]
    assert "start_from" in log.read_text().splitlines()[-1]


def test_the_decoder_alone_learns_and_latents_stay(made: World, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log.txt"
    start = made.root / "vae" / "autoencoder"
    settings = GAME | {"steps": 6, "start_from": str(start), "trained": "decoder", "kl_weight": 0.0}
    assert made.do("train_vae", *words_of(settings, run), log=log) == [0], log.read_text()
    before, after = load(start), load(run / "autoencoder")
    assert encoder_sha256(before) == encoder_sha256(after)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(latents_of(before, x), latents_of(after, x))
    weights = dict(before.named_parameters())
    moved = {name for name, weight in after.named_parameters() if not torch.equal(weight, weights[name])}
    wanted = {name for name in weights if name.startswith(("decoder.", "post_quant_conv."))}
    assert moved <= wanted and len(moved) > 0.9 * len(wanted)
    # What was encoded and trained with the other decoder goes on with this one.
    words = [f"vae.path={run / 'autoencoder'}", f"run_dir={tmp_path / 'unet'}", "train.steps=4"]
    assert made.do("train", *words, log=log) == [0], log.read_text()
    for verb in ("export", "evaluate"):
        assert made.do(verb, *words, log=log) == [0], log.read_text()


@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_normalised_latents_come_out_of_the_autoencoder_itself(made: World, tmp_path: Path, kind: str) -> None:
    """steps: 0 normalises what is there; images stay, latents have mean 0 and deviation 1, and encode finds them so."""
    run, log = tmp_path / "run", tmp_path / "log.txt"
    start = made.root / "vae" / "autoencoder"
    settings = {"steps": 0, "start_from": str(start), "latent_normalisation": kind}
    ranks = 2 if kind == "channel" else 1
    assert made.do("train_vae", *words_of(settings, run), ranks=ranks, log=log) == [0] * ranks, log.read_text()
    scores = json.loads((run / "measured" / "scores.json").read_text())
    assert scores["latent/scale"] == pytest.approx(1, rel=1e-4)
    if kind == "channel":
        assert scores["latent/mean"] == pytest.approx([0] * 4, abs=1e-4)
        assert scores["latent/std"] == pytest.approx([1] * 4, rel=1e-4)
    else:
        assert sum(scores["latent/mean"]) == pytest.approx(0, abs=1e-3)
    before, after = load(start), load(run / "autoencoder")
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(reconstruct(before, x), reconstruct(after, x), atol=1e-5)
    assert after.config["scaling_factor"] == 1.0
    assert torch.equal(latents_of(load(run / "unnormalised"), x), latents_of(before, x))
    words = [f"vae.path={run / 'autoencoder'}", f"data.train_latents={tmp_path / 'latents'}"]
    assert made.do("encode", *words, log=log) == [0], log.read_text()
    assert "the measured scale to train with is 1.000" in log.read_text()


# What can't be -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["engine.strategy=zero2"], "vae.train.adversary: engine.strategy=zero2 came, ddp was wanted"),
        (
            ["vae.train.adversary.discriminator.num_downsamplings=3"],
            "num_downsamplings=3: it wants images of at least 24 pixels, 16 came; one with fewer strides",
        ),
        (["vae.train.equivariance_share=0.5"], "at least 6 pixels, 4 came, a quarter of data.image_size"),
        (["vae.train.adversary.class_conditional=true", "conditioning.kind=text"], "conditioning"),
        (["vae.train.trained=decoder"], "trained: decoder wants start_from"),
        (["vae.train.steps=0"], "steps: 0 wants start_from"),
        (["vae.train.adversary.game=wasserstein"], "vae.train.adversary.game"),
    ],
)
def test_what_cannot_be_played_is_one_line(made: World, tmp_path: Path, words: list[str], told: str) -> None:
    log = tmp_path / "log.txt"
    assert made.do("train_vae", *words_of(GAME, tmp_path / "run"), *words, log=log) == [2]
    said = log.read_text()
    assert told in said and "Traceback" not in said
