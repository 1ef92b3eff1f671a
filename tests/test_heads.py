"""Heads: their losses against closed forms and loops, their place beside the U-Net, and runs of the real programs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from image_sets import good, write_set
from safetensors import safe_open
from small_run import small_unet
from test_training import assert_same_weights
from torch import Tensor
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)
from world import World, losses, rows, small_config

from pipeline.config_evaluation import FeaturesConfig
from pipeline.config_file import load_config
from pipeline.config_training import AlignmentConfig
from pipeline.data import images, latents
from pipeline.data.index import ShardSet
from pipeline.diffusion import densities
from pipeline.diffusion.edm import Edm
from pipeline.diffusion.flow import Flow
from pipeline.diffusion.objectives import Ddpm, Objective
from pipeline.diffusion.schedule import make_schedule
from pipeline.features import Backbone
from pipeline.heads import LogVariance, Projection, WithHeads, alignment_losses, build_heads, resized, weigh
from pipeline.optim import UpdateRule
from pipeline.preflight import look
from pipeline.strategies import wrap
from pipeline.strategies.regions import compile_regions
from pipeline.train import operations_beside
from vae.model import load

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SIDE, WIDTH = 6, 16  # of the patches' grid, of their features
SMALL: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24}
CPU = torch.device("cpu")


def settings_of(folder: Path, **other: Any) -> FeaturesConfig:
    stated = {"network": "transformers", "path": str(folder), "image_size": 24, "mean": MEAN, "std": STD}
    return FeaturesConfig.model_validate(stated | other)


def write_vit(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    ViTModel(ViTConfig(**SMALL, intermediate_size=16, patch_size=4), add_pooling_layer=False).save_pretrained(folder)
    return folder


# the losses ---------------------------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


def test_the_alignment_is_what_loops_over_patches_give() -> None:
    draw = torch.Generator().manual_seed(0)
    projected = torch.randn(3, 4, 5, 7, generator=draw, dtype=torch.float64)
    features = torch.randn(3, 9, 7, generator=draw, dtype=torch.float64)
    token, manifold = alignment_losses(projected, features)
    grid = F.interpolate(projected.permute(0, 3, 1, 2), (3, 3), mode="bilinear", align_corners=False)
    for i in range(3):
        h, y = [grid[i, :, p // 3, p % 3] for p in range(9)], list(features[i])
        wanted = sum(1 - cosine(h[p], y[p]) for p in range(9)) / 9
        assert float(token[i]) == pytest.approx(wanted, rel=1e-12)
        pairs = [(cosine(h[p], h[q]) - cosine(y[p], y[q])) ** 2 for p in range(9) for q in range(9)]
        assert float(manifold[i]) == pytest.approx(sum(pairs) / 81, rel=1e-12)


def test_an_alignment_is_of_one_image_and_of_directions_alone() -> None:
    """So it is the same in any batch; it is 0 where all agree, and the second part is blind to a common rotation."""
    draw = torch.Generator().manual_seed(1)
    projected, features = torch.randn(4, 2, 2, 8, generator=draw), torch.randn(4, 16, 8, generator=draw)
    whole = alignment_losses(projected, features)
    for i in range(4):
        alone = alignment_losses(3 * projected[i : i + 1], features[i : i + 1] / 7)
        for of_batch, of_one in zip(whole, alone, strict=True):
            torch.testing.assert_close(of_batch[i : i + 1], of_one, rtol=1e-5, atol=1e-6)
    agreeing = features.view(4, 4, 4, 8)
    assert max(float(loss.abs().max()) for loss in alignment_losses(agreeing, features)) < 1e-6
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=draw))[0]
    token, manifold = alignment_losses(agreeing @ rotation, features)
    assert float(manifold.max()) < 1e-6 and float(token.min()) > 0.1


@pytest.mark.parametrize("side", [2, 3, 4, 7, 16])
def test_grids_are_scaled_bilinearly(side: int) -> None:
    y = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    wanted = F.interpolate(y.permute(0, 3, 1, 2), (side, side), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resized(y, side), wanted.permute(0, 2, 3, 1))
    if side == 4:
        assert torch.equal(resized(y, side), y)


SCHEDULE = make_schedule("scaled_linear", 1000, 0.00085, 0.012)
OBJECTIVES: dict[str, Objective] = {
    "ddpm": Ddpm(SCHEDULE, "v_prediction", torch.ones(1000, dtype=torch.float64), densities.uniform(1000)),
    "edm": Edm(),
    "flow": Flow(),
}
SPREAD = 3.0  # standard deviation of the data below
# The expected loss of a network that says 0 of N(0, SPREAD²), for SNR = e^λ and ᾱ = sigmoid(λ).
EXPECTED: dict[str, Callable[[Tensor], Tensor]] = {
    "ddpm": lambda log_snr: torch.sigmoid(log_snr) + torch.sigmoid(-log_snr) * SPREAD**2,
    "edm": lambda log_snr: torch.sigmoid(log_snr) + torch.sigmoid(-log_snr) * SPREAD**2,
    "flow": lambda log_snr: torch.full_like(log_snr, 1 + SPREAD**2),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_signal_to_noise_ratio_is_that_of_what_the_network_sees(name: str) -> None:
    objective = OBJECTIVES[name]
    u = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    one, none = (torch.full((50, 1, 1, 1), value, dtype=torch.float64) for value in (1.0, 0.0))
    signal, noise = objective.noised(one, u, none), objective.noised(none, u, one)
    torch.testing.assert_close(objective.log_snr(signal), 2 * (signal.z / noise.z).log().flatten())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_log_variance_becomes_that_of_gaussian_data(name: str) -> None:
    """A network that says 0 has a loss of known mean at each noise level, and u learns its logarithm."""
    objective, draw = OBJECTIVES[name], torch.Generator().manual_seed(0)
    head = build_heads(None, True, small_unet(), width=0, seed=0)["log_variance"]
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    means: list[Tensor] = []
    for step in range(600):
        u = torch.rand(64, generator=draw, dtype=torch.float64)
        z_0, eps = (torch.randn(64, 4, 4, 4, generator=draw) for _ in range(2))
        noised = objective.noised(SPREAD * z_0, u, eps)
        loss, _ = objective.loss(torch.zeros_like(z_0), SPREAD * z_0, eps, noised)
        weighed = weigh(loss, head(objective.log_snr(noised)))
        optimizer.zero_grad()
        weighed.mean().backward()
        optimizer.step()
        if step >= 500:
            means.append((loss * torch.exp(-head(objective.log_snr(noised)))).detach().mean())
    u = torch.linspace(0.02, 0.98, 30, dtype=torch.float64)
    nothing = torch.zeros(30, 1, 1, 1)
    log_snr = objective.log_snr(objective.noised(nothing, u, nothing))
    torch.testing.assert_close(head(log_snr), EXPECTED[name](log_snr).log().float(), atol=0.15, rtol=0)
    assert float(torch.stack(means).mean()) == pytest.approx(1, abs=0.02)  # each level counts the same


def test_gradients_are_those_of_the_formula() -> None:
    """d/du of L e^-u + u is 1 - L e^-u, and what the network learns from is L's gradient divided by e^u."""
    loss, u = (torch.tensor(values, requires_grad=True) for values in ([0.3, 2.0, 7.0], [-1.0, 0.0, 1.5]))
    weigh(loss, u).sum().backward()
    assert loss.grad is not None and u.grad is not None
    torch.testing.assert_close(u.grad, 1 - loss.detach() * torch.exp(-u.detach()))
    torch.testing.assert_close(loss.grad, torch.exp(-u.detach()))
    assert torch.equal(weigh(loss, torch.zeros(3)), loss)  # u is 0 at first


def test_levels_without_end_are_told_as_the_last_ones() -> None:
    head = LogVariance()
    torch.nn.init.normal_(head.weight)
    ends = head(torch.tensor([-math.inf, -1e3, math.inf, 1e3], dtype=torch.float64))
    assert ends.isfinite().all() and ends[0] == ends[1] and ends[2] == ends[3] and ends[0] != ends[2]


# beside the U-Net ---------------------------------------------------------------------------------

CONDITION = {"class_labels": torch.tensor([0, 2]), "encoder_hidden_states": torch.zeros(2, 1, 8)}
ALIGNMENT = AlignmentConfig(features=settings_of(Path("x")), hidden_width=12)


def with_heads(seed: int = 0) -> WithHeads:
    unet = small_unet()
    return WithHeads(unet, build_heads(ALIGNMENT, True, unet, width=WIDTH, seed=seed))


def called(module: Any) -> dict[str, Tensor]:
    z, log_snr = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([3.0, -7.1])
    return module(z, torch.tensor([1, 700]), log_snr=log_snr.double(), **CONDITION)


def test_heads_are_a_function_of_the_seed_and_move_no_generator() -> None:
    first, same, other = (build_heads(ALIGNMENT, True, small_unet(), width=WIDTH, seed=seed) for seed in (0, 0, 1))
    for name, head in first.items():
        pairs = zip(head.state_dict().values(), same[name].state_dict().values(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
        if name == "projection":
            assert not torch.equal(head.layers[0].weight, other[name].layers[0].weight)  # pyright: ignore
    unet, before = small_unet(), torch.get_rng_state()
    build_heads(ALIGNMENT, True, unet, width=WIDTH, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("how", ["plain", "gradient_checkpointing", "compiled"])
def test_the_network_says_what_it_says_without_heads(how: str) -> None:
    plain, module = small_unet(), with_heads()
    unet: Any = module.network
    if how == "gradient_checkpointing":
        unet.enable_gradient_checkpointing()
    if how == "compiled":
        compile_regions(module, "eager")
    seen: list[Tensor] = []
    plain.mid_block.register_forward_hook(lambda *said: seen.append(said[-1]))
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    sample, said = plain(z, torch.tensor([1, 700]), **CONDITION).sample, called(module)
    assert torch.equal(said["sample"], sample)
    projection = module.heads["projection"]
    assert torch.equal(said["projection"], projection(seen[0])) and said["projection"].shape == (2, 2, 2, WIDTH)
    assert not said["log_variance"].any()
    said["projection"].square().sum().backward()
    gradients = {name.split(".")[0] for name, p in unet.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"conv_in", "down_blocks", "mid_block"} <= gradients and not gradients & {"up_blocks", "conv_out"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16_weights"])
def test_heads_in_every_precision(precision: Any) -> None:
    """The log-variance stays exact: its frequencies are bf16's, and what it is told is not rounded."""
    module, exact = with_heads(), LogVariance()
    exact.load_state_dict(module.heads["log_variance"].state_dict())
    for head in (exact, module.heads["log_variance"]):
        torch.nn.init.constant_(head.weight, 0.25)  # pyright: ignore
    rule = UpdateRule(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    wrapped = wrap(module, "ddp", precision=precision, device=CPU, rule=rule)
    said = called(wrapped.model)
    assert {tensor.dtype for tensor in said.values()} == {torch.float32}
    wanted = exact(torch.tensor([3.0, -7.1]).double())
    torch.testing.assert_close(said["log_variance"], wanted, rtol=1e-6, atol=1e-6)
    before = [weight.clone() for weight in wrapped.weights()]
    with wrapped.micro_batch(last=True):
        wrapped.backward(sum(tensor.square().mean() for tensor in said.values()) / 2**20)  # pyright: ignore
    assert bool(wrapped.step(1e-3).finite)
    moved = [not torch.equal(one, two) for one, two in zip(before, wrapped.weights(), strict=True)]
    names = [name for name, has_moved in zip(wrapped.names, moved, strict=True) if has_moved]
    assert any("projection" in name for name in names) and any("log_variance" in name for name in names)


# features of patches ------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def test_patches_come_last_and_row_by_row(tmp_path: Path) -> None:
    """Behind a class token and registers: a change in one corner changes that corner's patch most."""
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(**SMALL, patch_size=4, mlp_ratio=2, num_register_tokens=3)
    network = Dinov2WithRegistersModel(config).eval()
    network.save_pretrained(tmp_path / "registers")
    backbone = Backbone(settings_of(tmp_path / "registers"), CPU)
    found = backbone.patches(PIXELS)
    assert found.shape == (3, SIDE**2, WIDTH)
    x = torch.from_numpy(images_as(PIXELS)).float()
    with torch.no_grad():
        wanted = network(x).last_hidden_state[:, 4:]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)
    changed = PIXELS.copy()
    changed[:, -3:, :3] ^= 255  # bottom left
    moved = np.abs(backbone.patches(changed) - found).sum(axis=2)
    assert (moved.argmax(axis=1) == SIDE * (SIDE - 1)).all()
    said = backbone.describe_patches(16)
    assert (said["side"], said["width"]) == (SIDE, WIDTH) and json.loads(json.dumps(said)) == said


def images_as(pixels: np.ndarray) -> np.ndarray:
    """As the network wants them, by Pillow."""
    from PIL import Image

    larger = [np.asarray(Image.fromarray(each).resize((24, 24), Image.Resampling.BICUBIC)) for each in pixels]
    return ((np.stack(larger) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)


def test_maps_are_patches_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 12], depths=[1, 1, 1, 1])).eval()
    network.save_pretrained(tmp_path)
    found = Backbone(settings_of(tmp_path, image_size=64), CPU).patches(PIXELS)
    assert found.shape == (3, 4, 12)


def test_a_pooler_that_no_file_has_is_no_part_of_what_is_described(tmp_path: Path) -> None:
    folder = write_vit(tmp_path / "vit")
    one = Backbone(settings_of(folder), CPU).describe_patches(16)
    torch.manual_seed(5)
    assert Backbone(settings_of(folder), CPU).describe_patches(16) == one
    assert Backbone(settings_of(write_vit(tmp_path / "other", 1)), CPU).describe_patches(16) != one
    assert Backbone(settings_of(folder, mean=STD), CPU).describe_patches(16) != one


def test_what_has_no_square_of_patches_is_refused(tmp_path: Path) -> None:
    swin = SwinModel(SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], image_size=32, window_size=4))
    swin.save_pretrained(tmp_path / "swin")
    with pytest.raises(ValueError, match="16 features of an image came, where its patches make 8 rows of 8"):
        Backbone(settings_of(tmp_path / "swin", image_size=32), CPU).describe_patches(16)


# runs ---------------------------------------------------------------------------------------------


def test_check_foretells_the_bytes_of_a_sample(aligned: World) -> None:
    found = look(load_config(aligned.config), 1)
    assert found.num_samples == 24 and found.shard_bytes
    each = found.sample_bytes + 2 * 512  # these have a caption beside the label
    assert 0 < found.shard_bytes - found.num_samples * each <= 2 * 10240  # two tars' ends


@pytest.fixture(scope="module")
def aligned(made: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Wide pictures, encoded with a ViT's features in two crops and mirrored, and a run with both heads."""
    root = tmp_path_factory.mktemp("aligned")
    write_set(root / "images", [[""] * 12] * 2)
    values = small_config(made.root) | {"run_dir": str(root / "run")}
    data = {"train_images": str(root / "images"), "train_latents": str(root / "latents")}
    values["data"] |= {**data, "crop": "random", "encode_crops": 2, "flip": True}
    features = settings_of(write_vit(root / "vit")).model_dump(exclude_none=True, mode="json")
    values["train"] |= {"alignment": {"features": features, "hidden_width": 24}}
    values["diffusion"] = {"learned_weighting": True}
    here = World(root)
    here.config.write_text(yaml.safe_dump(values))
    assert here.do("encode") == [0], here.said()
    assert here.do("train") == [0], here.said()
    return here


def test_features_are_those_of_exactly_the_view(aligned: World) -> None:
    backbone = Backbone(settings_of(aligned.root / "vit"), CPU)
    shards = ShardSet(aligned.root / "latents", open_shards=1)
    origin = latents.describe(aligned.root / "latents")["origin"]
    assert origin["features"] == backbone.describe_patches(16)
    apart: list[np.ndarray] = []
    for row in (0, 7):
        _, parts = shards.read(1, row)
        for crop, along in enumerate((0.25, 0.75)):
            for mirrored in (False, True):
                found = latents.features_from_bytes(parts[latents.view_part(crop, mirrored, "features")])
                pixels = images.decode(good(12 + row)["png"], 16, along=along, mirrored=mirrored)
                wanted = backbone.patches(pixels[None])[0]
                assert found.shape == (SIDE**2, WIDTH)
                np.testing.assert_allclose(found, wanted, rtol=2**-10, atol=1e-3)
                apart.append(found)
    distances = [np.abs(a - b).max() for i, a in enumerate(apart) for b in apart[:i]]
    assert min(distances) > 0.1


def test_a_killed_run_goes_on_exactly_and_learns(aligned: World) -> None:
    parts = aligned.root / "parts"
    assert aligned.do("train", f"run_dir={parts}", "train.steps=4") == [0], aligned.said()
    assert aligned.do("train", f"run_dir={parts}") == [0], aligned.said()
    assert_same_weights(aligned.run_dir, parts, 8)
    assert losses(parts) == losses(aligned.run_dir)
    found = [row for row in rows(parts) if "loss" in row]
    for row in found:
        assert {"denoising", "log_variance", "alignment/token", "alignment/manifold"} <= row.keys()
    assert found[0]["log_variance"] == 0 != found[-1]["log_variance"]
    first = found[0]
    added = 0.5 * (first["alignment/token"] + 3 * first["alignment/manifold"])
    assert first["loss"] == pytest.approx(first["denoising"] + added, rel=1e-6)
    folder = parts / "checkpoints" / "step-000000008"
    assert {"unet", "projection", "log_variance", "ema", "optimizer"} <= {path.name for path in folder.iterdir()}
    assert Projection.from_pretrained(folder / "projection").config["width"] == WIDTH


@pytest.mark.parametrize(
    ("strategy", "micro"), [("ddp", 3), pytest.param("zero3", 6, marks=pytest.mark.system), ("fsdp2", 3)]
)
def test_any_strategy_goes_on_with_the_same_losses(aligned: World, strategy: str, micro: int) -> None:
    """Over two ranks and smaller micro-batches: every part is a mean over samples."""
    run = aligned.root / strategy
    shutil.copytree(aligned.run_dir, run)
    shutil.rmtree(run / "checkpoints" / "step-000000008")
    words = (f"run_dir={run}", f"engine.strategy={strategy}", f"train.micro_batch_images={micro}")
    assert aligned.do("train", *words, ranks=2) == [0, 0], aligned.said()
    straight, other = ([row for row in rows(folder) if "loss" in row] for folder in (aligned.run_dir, run))
    assert len(other) == len(straight) == 8
    for one, two in zip(straight, other, strict=True):
        for name in ("loss", "denoising", "log_variance", "alignment/token", "alignment/manifold", "grad_norm"):
            assert one[name] == pytest.approx(two[name], abs=2e-5, rel=2e-5), name


def test_an_export_is_that_of_a_run_without_heads(aligned: World) -> None:
    run = aligned.root / "plain"
    words = ("train.alignment=null", "diffusion.learned_weighting=false", f"run_dir={run}")
    assert aligned.do("train", *words, "train.steps=1") == [0], aligned.said()
    assert aligned.do("export", *words) == [0], aligned.said()
    assert aligned.do("export") == [0], aligned.said()
    both = [folder / "export" for folder in (run, aligned.run_dir)]
    listed = [sorted(path.relative_to(export).as_posix() for path in export.rglob("*")) for export in both]
    assert listed[0] == listed[1]
    for name in ("unet/config.json", "model_index.json", "vae/config.json"):
        assert (both[0] / name).read_bytes() == (both[1] / name).read_bytes()
    shapes: list[dict[str, Any]] = []
    for export in both:
        with safe_open(export / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as opened:
            shapes.append({name: opened.get_slice(name).get_shape() for name in opened.keys()})  # noqa: SIM118
    assert shapes[0] == shapes[1]
    # The U-Net begins the same: what is added to its loss is added beside it.
    first = [next(row for row in rows(folder) if "loss" in row) for folder in (run, aligned.run_dir)]
    assert first[0]["loss"] == first[1]["denoising"] and "denoising" not in first[0]


def test_a_text_encoder_learns_with_heads_which_averages_of_another_length_leave_behind(aligned: World) -> None:
    text = "{vocabulary: 560, num_tokens: 12, width: 8, layers: 2, heads: 2}"
    words = [f"conditioning={{kind: text, num_classes: 0, text: {{models: [{text}], train: true}}}}"]
    words += [f"run_dir={aligned.root / 'lengths'}", "ema.decays=[]", "ema.sigma_rels=[0.05,0.1]"]
    words += ["ema.snapshot_every_steps=2", "checkpoint.every_steps=2", "train.steps=4"]
    assert aligned.do("train", *words) == [0], aligned.said()
    assert aligned.do("reconstruct", *words, "--sigma-rel", "0.08") == [0], aligned.said()
    (folder,) = (aligned.root / "lengths" / "ema" / "reconstructed").iterdir()
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"text_encoder"}
    saved = aligned.root / "lengths" / "checkpoints" / "step-000000004"
    assert {path.name for path in (saved / "optimizer").iterdir()} == {
        "unet",
        "text_encoder",
        "projection",
        "log_variance",
    }


def test_what_does_not_fit_is_told_in_a_line(aligned: World, made: World) -> None:
    """By the training, and by check before it."""
    other = write_vit(aligned.root / "another", 3)
    without = f"data.train_latents={made.root}/latents", f"data.train_images={made.root}/digits/validation"
    plain = ("data.crop=centre", "data.encode_crops=1", "data.flip=false")
    key = "train.alignment.features"
    for words, said in (
        ((f"{key}.path={other}",), "has features of patches by the network"),
        ((f"{key}.mean=[0.5,0.5,0.5]",), "has features of patches made otherwise (preprocessing was"),
        ((*without, *plain), "has no features of patches, which train.alignment.features asks for; encode again"),
        ((f"{key}.path=nobody/nothing/here",), "train.alignment.features: path 'nobody/nothing/here' came"),
        ((f"{key}.image_size=32",), "train.alignment.features: the network does not take images [1, 3, 32, 32]"),
    ):
        (failure,) = look(load_config(aligned.config, [*words, f"run_dir={aligned.root / 'none'}"]), 1).failures
        assert said in failure and "\n" not in failure
    (aligned.root / "log.txt").unlink(missing_ok=True)
    assert aligned.do("train", f"run_dir={aligned.root / 'wrong'}", f"{key}.path={other}") == [2]
    assert "error: data.train_latents: " in aligned.said() and "by the network" in aligned.said()
    assert "Traceback" not in aligned.said()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("diffusion.learned_weighting=false",), "diffusion.learned_weighting was True, now False"),
        (("train.alignment=null",), "train.alignment was {'features.network'"),
        (("train.alignment.weight=0.1",), "train.alignment.weight was 0.5, now 0.1"),
    ],
)
def test_a_run_keeps_its_heads(aligned: World, words: tuple[str, ...], said: str) -> None:
    (failure,) = look(load_config(aligned.config, words), 1).failures
    assert "belongs to another config" in failure and said in failure


def test_check_counts_heads(aligned: World) -> None:
    neither = ("train.alignment=null", "diffusion.learned_weighting=false")
    with_both, without = (look(load_config(aligned.config, words), 1) for words in ((), neither))
    assert (with_both.num_heads, without.num_heads) == (128 + 16 * 24 + 24 + 24 * 24 + 24 + 24 * 16 + 16, 0)
    places, products = 4 * 4, 16 * 24 + 24 * 24 + 24 * 16
    assert with_both.operations_beside - without.operations_beside == 3 * 2 * places * products
    assert with_both.num_unet == without.num_unet
    config, heads = load_config(aligned.config), build_heads(ALIGNMENT, True, small_unet(), width=WIDTH, seed=0)
    heads["projection"] = Projection(channels=16, hidden_width=24, width=WIDTH)
    assert operations_beside(config, load(str(config.vae.path)), None, heads) == with_both.operations_beside
