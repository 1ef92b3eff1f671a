"""Runs of the real programs told captions, classes and captions, or a class as a token: trained, resumed, exported."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from captions import write_text_encoder
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from test_training import assert_same_weights
from transformers import CLIPTextModel
from world import World, losses, small_config

from pipeline import sampler
from pipeline.average import checkpoint_pipeline, find_average
from pipeline.config_file import load_config
from pipeline.data import latents
from pipeline.data.index import ShardSet
from pipeline.export import DTYPES
from pipeline.sampler import Asked
from pipeline.text import TextEncoders

MODEL = {"vocabulary": 560, "num_tokens": 12, "width": 8, "layers": 2, "heads": 2}
SCRATCH = {"models": [MODEL], "train": True}
KINDS: dict[str, dict[str, Any]] = {
    "text": {"conditioning": {"kind": "text", "text": SCRATCH}},
    "class_text": {"conditioning": {"kind": "class_text", "num_classes": 10, "text": SCRATCH}},
    "two": {
        "conditioning": {"kind": "text", "text": {"models": [MODEL, MODEL], "train": True}},
        "unet": {"cross_attention_dim": 16, "addition_time_embed_dim": 8},
        "diffusion": {"prediction_type": "v_prediction", "zero_terminal_snr": True, "variance_type": "learned_range"},
    },
    "token": {"conditioning": {"kind": "class", "num_classes": 10}, "unet": {"class_embedding": False}},
}
PROMPTS = ["a handwritten seven", "the digit two, written by hand"]
STEPS = 50


def world_of(made: World, root: Path, changes: dict[str, Any]) -> World:
    """A run folder of its own beside data, VAE and latents that are there."""
    values = small_config(made.root) | {"run_dir": str(root / "run")}
    values |= {"train": {"steps": STEPS, "global_batch_images": 12}, "checkpoint": {"every_steps": STEPS // 2}}
    for section, of_section in changes.items():
        values[section] = of_section if section == "conditioning" else {**values.get(section, {}), **of_section}
    here = World(root)
    here.config.write_text(yaml.safe_dump(values))
    return here


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, made: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, World]:
    """A run of each kind, trained in one go and exported."""
    kind: str = request.param
    world = world_of(made, tmp_path_factory.mktemp(kind), KINDS[kind])
    if kind == "two":  # it is told the images' sizes, so they are encoded with them
        here = f"data.train_latents={world.root}/latents"
        world.config.write_text(world.config.read_text().replace(f"{made.root}/latents", f"{world.root}/latents"))
        assert world.do("encode", here) == [0], world.said()
    assert world.do("train") == [0], world.said()
    assert world.do("export") == [0], world.said()
    return kind, world


@pytest.mark.parametrize("trained", ["text", "class_text", "two", "token"], indirect=True)
def test_the_loss_falls_and_a_resumed_run_is_the_same(trained: tuple[str, World]) -> None:
    kind, world = trained
    found = [loss for _, _, loss in losses(world.run_dir)]
    assert len(found) == STEPS and all(map(math.isfinite, found))
    assert np.mean(found[-10:]) < 0.9 * np.mean(found[:10])
    parts = world.root / "parts"
    assert world.do("train", f"run_dir={parts}", f"train.steps={STEPS // 2}") == [0], world.said()
    assert world.do("train", f"run_dir={parts}") == [0], world.said()
    assert_same_weights(world.run_dir, parts, STEPS)
    assert losses(parts) == losses(world.run_dir)
    folder = parts / "checkpoints" / f"step-{STEPS:09d}"
    UNet2DConditionModel.from_pretrained(folder / "unet")
    if kind in ("text", "class_text"):
        learned = CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
        scratch = TextEncoders.of_scratch(load_config(world.config).conditioning.text.models, parts / "text", seed=3)  # pyright: ignore
        moved = {name: (learned[name] - first).abs().max() for name, first in scratch.models[0].state_dict().items()}
        assert all(change > 0 for change in moved.values())
        row = json.loads((parts / "metrics.jsonl").read_text().splitlines()[-1])
        assert row["truncated_captions"] == 0


ALONE = """
import sys
for name in ("pipeline", "vae"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported here")
import numpy as np, torch
from PIL import Image
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
folder, out, kind, *prompts = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder)
wanted = {"text": "StableDiffusionPipeline", "two": "StableDiffusionXLPipeline"}[kind]
assert type(pipe).__name__ == wanted, type(pipe)
words = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
generators = lambda: [torch.Generator().manual_seed(s) for s in (5, 6)]
drawn = pipe(prompts, generator=generators(), **words).images
np.save(out, drawn)
image = Image.new("RGB", (16, 16), "grey")
mask = Image.new("L", (16, 16), 255)
for auto, more in ((AutoPipelineForImage2Image, {}), (AutoPipelineForInpainting, {"mask_image": mask})):
    other = auto.from_pretrained(folder)
    size = {"width": 16, "height": 16} if more else {}
    found = other(prompts[0], image=image, strength=0.5, generator=generators()[0], **size, **more, **words)
    assert found.images.shape == (1, 16, 16, 3) and np.isfinite(found.images).all() and found.images.std() > 0
"""


@pytest.mark.parametrize("trained", ["text", "two"], indirect=True)
def test_diffusers_alone_opens_text_models_and_draws_the_same(trained: tuple[str, World], tmp_path: Path) -> None:
    kind, world = trained
    env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "HF_HUB_OFFLINE": "1"}
    out = tmp_path / "images.npy"
    command = [sys.executable, "-S", "-c", ALONE, str(world.run_dir / "export"), str(out), kind, *PROMPTS]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    config = load_config(world.config)
    pipe = checkpoint_pipeline(config, find_average(config))
    assert pipe.unet.config["out_channels"] == (8 if kind == "two" else 4)
    words: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    ours: Any = pipe(prompt=PROMPTS, seeds=[5, 6], **words)
    np.testing.assert_allclose(np.load(out), ours.images, atol=1e-5)
    assert ours.images.std() > 0.01
    opened = sampler.open_export(world.run_dir / "export", "cpu")  # the trainer's own sampler, of the export's parts
    again: Any = opened(prompt=PROMPTS, seeds=[5, 6], **words)
    np.testing.assert_allclose(again.images, ours.images, atol=1e-5)
    index = json.loads((world.run_dir / "export" / "scheduler" / "scheduler_config.json").read_text())
    assert (index["timestep_spacing"], index["rescale_betas_zero_snr"]) == ("trailing", kind == "two")


@pytest.mark.parametrize("trained", ["class_text", "token"], indirect=True)
def test_models_of_classes_carry_their_code(trained: tuple[str, World]) -> None:
    kind, world = trained
    pipe: Any = DiffusionPipeline.from_pretrained(world.run_dir / "export", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    config = load_config(world.config)
    ours = checkpoint_pipeline(config, find_average(config))
    for w in (0.0, 1.0, 2.0):
        words: dict[str, Any] = {"seeds": 3, "guidance_scale": w, "num_inference_steps": 4, "output_type": "np"}
        asked = sampler.told_of(ours, [Asked(7, PROMPTS[0]), Asked(2, PROMPTS[1])])
        assert ("prompt" in asked) == (kind == "class_text")
        one, other = pipe(**asked, **words).images, ours(**asked, **words).images  # type: ignore[union-attr]
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("trained", ["text", "class_text", "two", "token"], indirect=True)
def test_the_card_and_the_tokenizer_are_complete(trained: tuple[str, World]) -> None:
    kind, world = trained
    export = world.run_dir / "export"
    card = (export / "README.md").read_text()
    assert "![samples](samples.png)" in card and (export / "samples.png").is_file()
    assert ("trust_remote_code=True" in card) == (kind in ("class_text", "token"))
    for name in {"text": ["tokenizer"], "two": ["tokenizer", "tokenizer_2"]}.get(kind, []):
        assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= {p.name for p in (export / name).iterdir()}


@pytest.mark.parametrize(("trained", "dtype"), [("text", "fp16"), ("class_text", "bf16")], indirect=["trained"])
def test_an_export_in_half_precision(trained: tuple[str, World], tmp_path: Path, dtype: str) -> None:
    _, world = trained
    assert world.do("export", "--dtype", dtype, "--step", str(STEPS // 2), "--out", str(tmp_path / "half")) == [0]
    assert f"weights in {dtype} move its pixels by" in world.said()
    pipe: Any = DiffusionPipeline.from_pretrained(
        tmp_path / "half",
        trust_remote_code=True,
        torch_dtype=DTYPES[dtype],
    )
    assert pipe.unet.dtype == pipe.text_encoder.dtype == DTYPES[dtype]
    saved = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {DTYPES[dtype]}
    assert json.loads((tmp_path / "half" / "training.json").read_text())["checkpoint"] == f"step-{STEPS // 2:09d}"


@pytest.mark.parametrize("trained", ["two"], indirect=True)
def test_an_export_without_its_learned_variance_is_scored_without_what_is_of_it(trained: tuple[str, World]) -> None:
    _, world = trained
    words = ("evaluation.bits=true", "evaluation.guidance_scales=[2.0]", "evaluation.likelihood.ode_images=2")
    assert world.do("evaluate", *words) == [0], world.said()
    told = "the validation loss, the bound and its bits are left out: they are of the learned variance"
    assert world.said().count(told) == 1 and "--checkpoint counts them" in world.said()
    scores = json.loads((world.run_dir / "scores.json").read_text())
    assert {"guidance_2/frechet_distance", "likelihood/ode_bits_per_dim"} <= scores.keys()
    of_variance = ("validation_loss/mean", "bits_per_dim", "likelihood/bound_bits_per_dim")
    assert not scores.keys() & set(of_variance)
    assert world.do("evaluate", *words, "--checkpoint", "newest") == [0], world.said()
    assert world.said().count(told) == 1  # by the run before
    assert set(of_variance) <= json.loads((world.run_dir / "scores.json").read_text()).keys()


@pytest.mark.parametrize("trained", ["text"], indirect=True)
def test_scores_of_a_text_model_stand_in_its_card(trained: tuple[str, World]) -> None:
    _, world = trained
    assert world.do("evaluate") == [0], world.said()
    scores = json.loads((world.run_dir / "scores.json").read_text())
    assert 0 <= scores["guidance_2/class_accuracy"] <= 1 and scores["likelihood/num_images"] == 8
    card = (world.run_dir / "export" / "README.md").read_text()
    assert "| named right by a classifier of the training images | " in card and card.count("## ") == 3
    assert world.do("evaluate") == [0] and card == (world.run_dir / "export" / "README.md").read_text()


@pytest.mark.parametrize("trained", ["text"], indirect=True)
def test_two_ranks_learn_the_same_words_and_weights(trained: tuple[str, World]) -> None:
    """The tokenizer is learned once, by one rank; the text encoder's gradients are those of all."""
    _, world = trained
    run = world.root / "ranks"
    assert world.do("train", f"run_dir={run}", "train.steps=25", ranks=2) == [0, 0], world.said()
    for (step, position, one), (step2, position2, two) in zip(losses(world.run_dir), losses(run), strict=False):
        assert (step, position) == (step2, position2) and abs(one - two) < 1e-5
    words = (world.run_dir / "text" / "tokenizer" / "tokenizer.json").read_text()
    assert (run / "text" / "tokenizer" / "tokenizer.json").read_text() == words


def test_a_text_encoder_has_averages_of_any_length_too(made: World, tmp_path: Path) -> None:
    changes = {"ema": {"decays": [], "sigma_rels": [0.05, 0.1], "snapshot_every_steps": 4}, "train": {"steps": 8}}
    world = world_of(made, tmp_path, {**KINDS["text"], **changes, "checkpoint": {"every_steps": 4}})
    assert world.do("train") == [0], world.said()
    assert world.do("reconstruct", "--sigma-rel", "0.05") == [0], world.said()
    name = "power-0.05-step-000000008"
    again = load_file(world.run_dir / "ema" / "reconstructed" / name / "text_encoder" / "model.safetensors")
    kept = load_file(world.run_dir / "checkpoints/step-000000008/ema/power-0.05/text_encoder/model.safetensors")
    assert again.keys() == kept.keys()
    for tensor in kept:  # of the length that was kept, it is what was kept
        torch.testing.assert_close(again[tensor], kept[tensor], rtol=1e-4, atol=1e-6)
    assert world.do("export", "--ema", name) == [0], world.said()
    assert world.do("export", "--ema", name, "--step", "4") == [2]
    assert "leave --step out" in world.said()


@pytest.mark.parametrize("trained", ["text"], indirect=True)
@pytest.mark.parametrize(
    "broken", ["unet/diffusion_pytorch_model.safetensors", "model_index.json", "text_encoder/config.json", "tokenizer"]
)
def test_a_broken_export_is_one_clear_error(trained: tuple[str, World], tmp_path: Path, broken: str) -> None:
    _, world = trained
    shutil.copytree(world.run_dir / "export", folder := tmp_path / "export")
    if (folder / broken).is_dir():
        shutil.rmtree(folder / broken)
    else:
        (folder / broken).write_bytes((folder / broken).read_bytes()[:100])
    (world.root / "log.txt").unlink(missing_ok=True)
    assert world.do("sample", "--export", str(folder)) == [2]
    (line,) = [line for line in world.said().splitlines() if line.startswith("error:")]
    assert f"error: {folder}: can't be opened (" in line and "export it anew" in line
    assert "Traceback" not in world.said()


# cached embeddings --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen(made: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A config with a text encoder that is there, whose embeddings lie beside the latents."""
    root = tmp_path_factory.mktemp("frozen")
    clip = write_text_encoder(root / "clip")
    text = {"kind": "text", "text": {"path": str(clip), "embeddings": "cached"}}
    data = {"train_latents": str(root / "latents")}
    world = world_of(made, root, {"conditioning": text, "data": data, "train": {"steps": 20}})
    assert world.do("encode") == [0], world.said()
    return world


def test_cached_embeddings_train_as_those_made_online(frozen: World) -> None:
    runs = {kind: frozen.root / kind for kind in ("cached", "online")}
    for kind, run in runs.items():
        words = (f"run_dir={run}", f"conditioning.text.embeddings={kind}")
        assert frozen.do("train", *words) == [0], frozen.said()
    pairs = list(zip(*(losses(run) for run in runs.values()), strict=True))
    assert len(pairs) == 20
    for (step, position, one), (step2, position2, other) in pairs:
        assert (step, position) == (step2, position2) and abs(one - other) < 1e-3
    text, shards = TextEncoders.load(frozen.root / "clip"), ShardSet(frozen.root / "latents", open_shards=1)
    for row in range(20):
        _, parts = shards.read(0, row)
        cached = torch.from_numpy(latents.text_from_bytes(parts[latents.TEXT_PART]).copy()).float()
        torch.testing.assert_close(cached, text.encode([parts["txt"].decode()]).tokens[0], rtol=2**-8, atol=2**-8)  # pyright: ignore


def test_mistakes_are_one_line_each(frozen: World, made: World) -> None:
    other = write_text_encoder(frozen.root / "other", seed=1)
    run = f"run_dir={frozen.root / 'wrong'}"
    for words, said in (
        (
            ("unet.cross_attention_dim=64",),
            "conditioning.text: its tokens are 8 wide, unet.cross_attention_dim=64 came",
        ),
        ((f"conditioning.text.path={other}",), "has embeddings by the text encoder"),
        ((f"data.train_latents={made.root}/latents",), "has no embeddings of captions, conditioning.text names"),
        (("conditioning.text.path=nobody/nothing/here",), "conditioning.text: nobody/nothing/here"),
        (("conditioning.text.train=true",), "embeddings: cached are of a text encoder that stays as it is"),
        (("conditioning.kind=class",), "num_classes=0 came with kind: class; 1 or more was wanted"),
        (("data.train_latents=null",), "cached lie beside latents; data.train_latents was wanted"),
    ):
        (frozen.root / "log.txt").unlink(missing_ok=True)
        assert frozen.do("train", run, *words) == [2], frozen.said()
        assert said in frozen.said() and "Traceback" not in frozen.said(), frozen.said()


def test_a_set_without_captions_is_told_to_all_ranks(frozen: World, tmp_path: Path) -> None:
    bare = write_bare_set(tmp_path / "bare")
    words = ("conditioning.text.embeddings=online", f"data.train_images={bare}", f"data.validation_images={bare}")
    (frozen.root / "log.txt").unlink(missing_ok=True)
    assert frozen.do("train", f"run_dir={tmp_path / 'run'}", *words, ranks=2) == [2, 2], frozen.said()
    assert "error: data: no image has a caption, which conditioning.kind wants" in frozen.said()


def write_bare_set(folder: Path) -> Path:
    """Images without captions."""
    from webdataset.writer import TarWriter

    from pipeline.data.images import encode_png
    from pipeline.data.index import build_index

    folder.mkdir()
    with (folder / "0.tar").open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
        writer.write({"__key__": "a", "png": encode_png(np.zeros((16, 16, 3), dtype=np.uint8)), "cls": b"1"})
    build_index(folder)
    return folder


def test_a_run_does_not_go_on_with_another_text_encoder(frozen: World) -> None:
    run, online = f"run_dir={frozen.root / 'begun'}", "conditioning.text.embeddings=online"
    assert frozen.do("train", run, online, "train.steps=2", "checkpoint.every_steps=2") == [0], frozen.said()
    other = write_text_encoder(frozen.root / "another", seed=2)
    assert frozen.do("train", run, online, f"conditioning.text.path={other}") == [2]
    assert "its text were" in frozen.said() and "restore what the run was begun with" in frozen.said()
    assert frozen.do("export", run, online, f"conditioning.text.path={other}") == [2]
    assert "was trained with {'text_encoder_sha256'" in frozen.said()


# fine-tuning --------------------------------------------------------------------------------------


def stable_diffusion(folder: Path, made: World) -> Any:
    """A whole small Stable Diffusion pipeline, written by stock diffusers."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from test_unet import tiny
    from transformers import CLIPTokenizer

    clip = write_text_encoder(folder.parent / "its-clip", seed=3)
    vae = AutoencoderKL.from_pretrained(made.root / "vae" / "autoencoder")
    vae.register_to_config(scaling_factor=0.25)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False, timestep_spacing="trailing")
    parts: dict[str, Any] = {
        "vae": vae,
        "unet": tiny(),
        "scheduler": scheduler,
        "text_encoder": CLIPTextModel.from_pretrained(clip / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(clip / "tokenizer"),
    }
    pipe = StableDiffusionPipeline(
        **parts,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,  # pyright: ignore
    )
    pipe.save_pretrained(folder)
    return pipe


@pytest.mark.parametrize("single_file", [False, True])
@pytest.mark.parametrize("train_text", [False, True])
def test_of_a_fine_tuned_pipeline_only_what_was_trained_differs(
    made: World, tmp_path: Path, single_file: bool, train_text: bool
) -> None:
    from single_file import save_single_file
    from test_unet import TINY

    there = tmp_path / "there"
    before = stable_diffusion(there, made)
    start = there
    if single_file:
        save_single_file(before.unet, start := tmp_path / "sd.safetensors")
    changes: dict[str, Any] = {
        "conditioning": {"kind": "text", "text": {"path": str(there), "train": train_text}},
        "vae": {"path": str(there), "latent_scale": "own"},
        "train": {"steps": 10},
    }
    world = world_of(made, tmp_path, changes)
    values = yaml.safe_load(world.config.read_text())
    values["unet"] = {
        "start_from": str(start),
        **({key: list(v) if isinstance(v, tuple) else v for key, v in TINY.items()} if single_file else {}),
    }
    world.config.write_text(yaml.safe_dump(values))
    assert world.do("train") == [0], world.said()
    assert world.do("export") == [0], world.said()
    after: Any = DiffusionPipeline.from_pretrained(world.run_dir / "export")
    assert after.vae.config["scaling_factor"] == 0.25
    for name in ("vae", "text_encoder", "unet"):
        old, new = getattr(before, name).state_dict(), getattr(after, name).state_dict()
        assert old.keys() == new.keys()
        same = {key for key, tensor in old.items() if torch.equal(tensor, new[key])}
        if name == "unet" or (name == "text_encoder" and train_text):
            assert not {key for key in same if old[key].is_floating_point()}, name
        else:
            assert same == set(old), name
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
