"""`check`: what it prints of a config, and what it finds that would fail; and the recipe at 512 pixels."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig
from world import World

from pipeline.__main__ import main
from pipeline.config_file import load_config
from pipeline.optim import hidden_weights
from pipeline.planning.work import count_forward
from pipeline.preflight import look, of_batch
from vae.config import VaeModelConfig
from vae.model import build, load

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "text512_sd2.yaml"


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, list[str]]:
    """Exit code, what was printed, and the errors."""
    code = main(["check", *words])
    told = capsys.readouterr()
    return code, told.out, told.err.splitlines()


def test_the_recipe_at_512_pixels_is_of_stable_diffusion_2s_size(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, errors = said(capsys, str(CONFIG), "--gpus", "64", "--gpu", "h100-sxm")
    assert "865,910,724" in out and "865,910,724" in CONFIG.read_text(encoding="utf-8")
    assert "2,408.7" in out and "804.3" in out
    assert "64 × h100-sxm" in out and "GPU-hours" in out and "1024" in out
    assert out.count("lies on the hub, not looked at") == 2
    # Nothing is wrong but that the data are not on this machine.
    assert code == 2
    assert [line.partition(": ")[2].partition(":")[0] for line in errors] == [
        "data.train_latents",
        "data.validation_images",
    ]


def test_the_recipe_may_run_on_any_power_of_two() -> None:
    config = load_config(CONFIG)
    assert config.train.steps * config.train.global_batch_images == 1_740_800_000
    for power in range(8):
        assert of_batch(config, 2**power) == []


def test_what_would_fail_is_named_in_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = said(
        capsys, str(CONFIG), "--gpus", "48", "--gpu", "v100", "data.image_size=500", "engine.num_processes=64"
    )
    assert code == 2
    text = "\n".join(errors)
    assert "data.image_size: 500 came, a multiple of the VAE's factor 8 was wanted" in text
    assert "engine.num_processes: 64 came, the check is for 48 ranks" in text
    assert "48 ranks came, but the number of ranks must divide data.lanes=1024" in text
    assert "engine.precision: bf16 came, v100 has fp16 and fp32" in text
    code, _, errors = said(capsys, str(CONFIG), "engine.strategy=zero2", "optimizer.kind=muon")
    assert code == 2 and "optimizer.kind: muon came with engine.strategy zero2, ddp was wanted" in "\n".join(errors)
    code, _, errors = said(capsys, str(CONFIG), "--gpus", "64", "--gpu", "a10", "train.micro_batch_images=24")
    text = "\n".join(errors)
    assert code == 2 and "it must divide a rank's share of the batch, 2048 / 64 = 32" in text
    assert "engine.strategy: ddp takes" in text and "a10 has 22.4" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--gpus", "0"), "'0' came, a whole number of 1 or more was wanted"),
        (("--link-gbit-s", "nan"), "'nan' came, a number above 0 was wanted"),
        (("--utilisation", "1.5"), "'1.5' came, a number above 0 and at most 1 was wanted"),
        (("--gpu", "tpu"), "invalid choice: 'tpu'"),
        (("evaluation.num_inference_steps=33",), "must divide diffusion.num_timesteps=1000"),
    ],
)
def test_wrong_words_are_told(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str) -> None:
    code, _, errors = said(capsys, str(CONFIG), *words)
    assert code == 2 and len(errors) == 1 and told in errors[0]


def test_a_world_that_is_there_passes(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, errors = said(capsys, str(world.config), "--gpus", "2", "--gpu", "a100-40")
    assert (code, errors) == (0, []), out
    assert "nothing found that would fail" in out and "samples" in out and "the index" in out

    (folder := tmp_path / "latents").mkdir()
    for shard in Path((load_config(world.config).data.train_latents or ("",))[0]).glob("*.tar"):
        shutil.copy(shard, folder)
    code, _, errors = said(capsys, str(world.config), "--gpus", "2", f"data.train_latents={folder}")
    assert code == 2 and len(errors) == 1
    assert errors[0].startswith("error: data.train_latents: ") and "not indexed; run: python -m pipeline" in errors[0]
    code, _, errors = said(capsys, str(world.config), "evaluation.features=[{network: clip, path: ./such}]")
    assert code == 2 and errors == ["error: evaluation.features: clip: path './such' came, and nothing is there"]
    (broken := tmp_path / "broken").mkdir()
    (broken / "config.json").write_text('{"latent_channels": 4')
    code, _, errors = said(capsys, str(world.config), f"vae.path={broken}")
    assert code == 2 and len(errors) == 1 and "config.json: not readable as JSON" in errors[0]


def test_what_a_run_would_refuse_is_found_before(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Latents of another autoencoder, labels that there are too few classes for, a run of another config."""
    config = str(world.config)
    code, _, errors = said(capsys, config, "conditioning.num_classes=5")
    assert code == 2 and len(errors) == 1 and "class id 9 came, 0 to 4 was wanted" in errors[0]
    assert world.do("train_vae", f"vae.run_dir={world.root / 'other'}", "seed=8") == [0], world.said()
    code, _, errors = said(capsys, config, f"vae.path={world.root / 'other' / 'autoencoder'}")
    assert code == 2 and len(errors) == 1 and "these latents were made by the encoder" in errors[0]
    assert world.do("train", "train.steps=2") == [0], world.said()
    assert said(capsys, config)[0] == 0
    code, _, errors = said(capsys, config, "seed=4")
    assert code == 2 and len(errors) == 1 and "belongs to another config: seed was 3, now 4" in errors[0]


def test_what_runs_beside_the_network_is_counted(world: World) -> None:
    """An encoder that learns costs three times its forward pass; latents that lie there cost nothing."""
    assert look(load_config(world.config), 1).operations_beside == 0
    vae = load(str(load_config(world.config).vae.path))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(torch.zeros(1, 3, 16, 16))
    attention = 4 * 64**2 * 8  # two products of 64 places by 64 with 8 channels, which the CPU's kernel doesn't tell of
    online = look(load_config(world.config, ["data.train_latents=null"]), 1)
    assert online.operations_beside == counter.get_total_flops() + attention
    folder = world.root / "text"
    CLIPTextConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=1).save_pretrained(folder / "text_encoder")
    values = yaml.safe_load(world.config.read_text())
    values["conditioning"] = {"kind": "text", "text": {"path": str(folder)}}
    world.config.write_text(yaml.safe_dump(values))
    frozen, learns = (
        look(load_config(world.config, [f"conditioning.text.train={train}"]), 1) for train in ("false", "true")
    )
    assert 0 < 3 * frozen.operations_beside == learns.operations_beside


def test_muons_update_is_counted_for_each_step(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Five turns of two products with the matrix, 4 m²n, and one of what it makes, 2 m³."""
    config, muon = load_config(world.config), load_config(world.config, ["optimizer.kind=muon"])
    assert look(config, 1).operations_of_update == 0
    found, wanted = look(muon, 1), 0
    for weight in hidden_weights(found.shape.build()):
        small, large = sorted(weight.flatten(1).shape)
        wanted += 5 * (4 * small**2 * large + 2 * small**3)
    assert found.operations_of_update == wanted > 0
    code, text, _ = said(capsys, str(world.config), "optimizer.kind=muon")
    assert code == 0 and f"{wanted / 1e9:,.1f}" in text and "Muon's update, GFLOP per step and rank" in text


def test_the_usual_autoencoder_is_counted_right() -> None:
    """Stable Diffusion's encoder: 273 GFLOP at 256 pixels, 1,117 at 512."""
    shape = VaeModelConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
    for side, gflop in ((256, 273), (512, 1117)):
        image = torch.zeros(1, 3, side, side, device="meta")
        counted = count_forward(lambda: build(shape), lambda vae, image=image: vae.encode(image))
        assert counted == pytest.approx(gflop * 1e9, rel=0.005)
