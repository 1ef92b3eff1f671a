"""An autoencoder is found or refused in words, and its weights have one name wherever they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from vae.config import VaeModelConfig
from vae.metrics import reconstruct
from vae.model import build, encoder_sha256, freeze_encoder, load, open_trainable, weights_sha256
from vae.moments import downsampling_factor, encode_moments

TINY = VaeModelConfig(block_out_channels=(4, 8), norm_num_groups=4)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    build(TINY).save_pretrained(tmp_path / "autoencoder")
    return tmp_path / "autoencoder"


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
def test_built_for_any_factor(factor: int) -> None:
    widths = (4,) * factor.bit_length()  # one level more halves the sides once more
    vae = build(VaeModelConfig(block_out_channels=widths, norm_num_groups=2, latent_channels=6))
    x = torch.zeros(1, 3, 32, 32)
    assert downsampling_factor(vae) == factor
    assert encode_moments(vae, x).shape == (1, 12, 32 // factor, 32 // factor)
    assert reconstruct(vae, x).shape == x.shape


def test_built_as_configured() -> None:
    config = VaeModelConfig(
        in_channels=1, latent_channels=3, block_out_channels=(4, 8, 8), layers_per_block=2, norm_num_groups=2
    )
    vae = build(config)
    x = torch.zeros(2, 1, 16, 16)
    assert encode_moments(vae, x).shape == (2, 2 * 3, 16 // downsampling_factor(vae), 4)
    assert reconstruct(vae, x).shape == x.shape
    assert vae.config["layers_per_block"] == 2
    assert vae.training and vae.dtype == torch.float32
    assert vae.config["scaling_factor"] == 1.0, "nothing is measured yet"


def test_loaded_frozen_from_its_folder_or_a_pipeline(folder: Path) -> None:
    vae = load(folder)
    assert not vae.training and vae.dtype == torch.float32
    assert not any(weight.requires_grad for weight in vae.parameters())
    pipeline = folder.parent / "pipeline"
    vae.save_pretrained(pipeline / "vae")
    assert weights_sha256(load(str(pipeline))) == weights_sha256(vae)


def test_opened_to_be_trained_on(folder: Path) -> None:
    vae = open_trainable(folder)
    assert vae.training and all(weight.requires_grad for weight in vae.parameters())
    assert weights_sha256(vae) == weights_sha256(load(folder))
    freeze_encoder(vae)
    learning = {name for name, weight in vae.named_parameters() if weight.requires_grad}
    assert learning == {name for name, _ in vae.named_parameters() if name.startswith(("decoder.", "post_quant_conv."))}
    vae(torch.randn(1, 3, 8, 8)).sample.square().mean().backward()
    assert {name for name, weight in vae.named_parameters() if weight.grad is not None} == learning


def test_half_precision_weights_load_as_fp32(folder: Path) -> None:
    load(folder).half().save_pretrained(folder)
    assert load(folder).dtype == torch.float32


def test_a_missing_folder_is_named_and_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for missing in ("runs/vae", "runs/vae/autoencoder", "./vae", str(tmp_path / "vae"), "vae"):
        with pytest.raises(FileNotFoundError, match="no such folder; train the autoencoder first") as caught:
            load(missing)
        assert missing in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")
def test_a_hub_id_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'org/name' came, which is no folder here") as caught:
        load("org/name")
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_autoencoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor vae/config\.json"):
        load(tmp_path)


def test_another_kind_of_model_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ValueError, match="class UNet2DConditionModel, AutoencoderKL is wanted"):
        load(folder)


def without_one(weights: dict[str, Tensor]) -> None:
    del weights["encoder.conv_in.weight"]


def with_one_more(weights: dict[str, Tensor]) -> None:
    weights["encoder.conv_extra.weight"] = torch.zeros(1)


def with_another_shape(weights: dict[str, Tensor]) -> None:
    weights["encoder.conv_in.weight"] = torch.zeros(2, 3, 3, 3)


@pytest.mark.parametrize("damage", [without_one, with_one_more, with_another_shape])
def test_weights_that_do_not_fit_are_refused(folder: Path, damage: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / WEIGHTS)
    damage(weights)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"encoder\.conv_"):
        load(folder)


def test_cut_or_missing_weights_are_refused(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=WEIGHTS):
        load(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(OSError, match=WEIGHTS):
        load(folder)


def test_hash_is_that_of_the_file(folder: Path) -> None:
    digest = hashlib.sha256()
    for name, array in sorted(load_arrays(folder / WEIGHTS).items()):
        digest.update(f"{name}\nfloat32\n{list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    assert weights_sha256(load(folder)) == digest.hexdigest()


def test_hash_outlives_formats_layouts_and_the_scaling_factor(folder: Path) -> None:
    vae = load(folder)
    digest = weights_sha256(vae)
    vae.register_to_config(scaling_factor=0.5)
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    vae.save_pretrained(folder.parent / "pickled", safe_serialization=False)
    vae.save_pretrained(folder.parent / "again", max_shard_size="20KB")
    again = load(folder.parent / "again")
    assert len(list((folder.parent / "again").glob("*.safetensors"))) > 1
    assert again.config["scaling_factor"] == 0.5
    pickled = build(TINY)
    pickled.load_state_dict(torch.load(folder.parent / "pickled" / "diffusion_pytorch_model.bin", weights_only=True))
    assert weights_sha256(vae) == weights_sha256(again) == weights_sha256(pickled) == digest


def test_hash_sees_one_bit(folder: Path) -> None:
    vae = load(folder)
    digest = weights_sha256(vae)
    bits = vae.state_dict()["decoder.conv_out.bias"].view(torch.int32)  # shares its memory
    bits[0] ^= 1
    assert weights_sha256(vae) != digest
    bits[0] ^= 1
    assert weights_sha256(vae) == digest


@pytest.mark.parametrize("with_quant", [True, False])
def test_the_encoders_hash_is_of_what_makes_latents(with_quant: bool) -> None:
    shape = {"use_quant_conv": with_quant, "use_post_quant_conv": with_quant, "norm_num_groups": 4}
    vae = AutoencoderKL(**{**shape, "block_out_channels": (4,)}).requires_grad_(False)
    x, digest = torch.randn(2, 3, 8, 8), encoder_sha256(vae)
    moments = encode_moments(vae, x)
    for name, weight in vae.named_parameters():
        before = weight.clone()
        weight.view(torch.int32).view(-1)[0] ^= 1
        makes_latents = name.startswith(("encoder.", "quant_conv."))
        assert (encoder_sha256(vae) != digest) == makes_latents, name
        weight.copy_(before if makes_latents else before + 1)
    assert encoder_sha256(vae) == digest != weights_sha256(vae)
    assert torch.equal(encode_moments(vae, x), moments)


def test_hash_is_pinned() -> None:
    """Latents on disk carry the encoder's hash: another algorithm would disown every one of them."""
    vae = build(TINY)
    with torch.no_grad():
        for weight in vae.parameters():
            weight.copy_((torch.arange(weight.numel()) / 1024).view_as(weight))
    assert weights_sha256(vae) == "cfc0031071a89e09a5b9e646cf1b8f12242c7604c7f52ca2ecbe5d5617862669"
    assert encoder_sha256(vae) == "8c79a1a9f185d884b250fd455adb0cbb35e3990734bee95517a72f80ba277129"
