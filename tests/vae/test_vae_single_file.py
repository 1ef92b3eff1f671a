"""One safetensors file is opened as the folder that holds the same weights is, or refused in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from vae.metrics import reconstruct
from vae.model import encoder_sha256, load, open_trainable, weights_sha256
from vae.moments import LatentScale, encode_moments, published_scale

NO_QUANT: dict[str, Any] = {"use_quant_conv": False, "use_post_quant_conv": False}
KINDS: dict[str, dict[str, Any]] = {
    "sd": {"layers_per_block": 2, "scaling_factor": 0.18215},
    "sdxl": {"layers_per_block": 1, "block_out_channels": (32, 32, 64), "scaling_factor": 0.13025},
    "sd3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "force_upcast": False, **NO_QUANT},
    "grey, one level, no attention": {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (32,),
        "latent_channels": 2,
        "mid_block_add_attention": False,
    },
}


def small(seed: int = 0, **shape: Any) -> AutoencoderKL:
    """An autoencoder with other numbers in each weight, norms and biases too."""
    num_levels = len(shape.setdefault("block_out_channels", (32, 64)))
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        **{"norm_num_groups": 32, **shape},
    )
    with torch.no_grad():
        for weight in vae.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return vae.eval().requires_grad_(False)


def ldm_names(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The weights as Stable Diffusion's own code names and shapes them."""
    last = len(vae.config["block_out_channels"]) - 1
    found: dict[str, Tensor] = {}
    for name, weight in vae.state_dict().items():
        parts = name.split(".")
        if parts[1] == "down_blocks":
            kind = ["block", parts[4]] if parts[3] == "resnets" else ["downsample"]
            parts = ["encoder", "down", parts[2], *kind, *parts[5:]]
        elif parts[1] == "up_blocks":
            kind = ["block", parts[4]] if parts[3] == "resnets" else ["upsample"]
            parts = ["decoder", "up", str(last - int(parts[2])), *kind, *parts[5:]]
        elif parts[1] == "mid_block" and parts[2] == "resnets":
            parts = [parts[0], "mid", f"block_{int(parts[3]) + 1}", *parts[4:]]
        elif parts[1] == "mid_block":
            layer = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[parts[4]]
            parts = [parts[0], "mid", "attn_1", layer, parts[-1]]
        parts = [{"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}.get(part, part) for part in parts]
        convolved = "attn_1" in parts and weight.ndim == 2  # its attention is made of 1×1 convolutions
        found[".".join(parts)] = (weight[:, :, None, None] if convolved else weight).contiguous()
    assert len(found) == len(vae.state_dict())
    return found


def own_names(vae: AutoencoderKL) -> dict[str, Tensor]:
    return {name: weight.contiguous() for name, weight in vae.state_dict().items()}


def old_names(vae: AutoencoderKL) -> dict[str, Tensor]:
    """As diffusers named attention before version 0.17: so the files of sd-vae-ft-mse lie on the hub."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {
        re.sub(r"(attentions\.0\.)(to_[qkv]|to_out\.0)", lambda m: m[1] + old[m[2]], name): weight
        for name, weight in own_names(vae).items()
    }


def in_checkpoint(prefix: str) -> Callable[[AutoencoderKL], dict[str, Tensor]]:
    def names(vae: AutoencoderKL) -> dict[str, Tensor]:
        """Beside a U-Net, a text encoder and what training used."""
        more = ["model.diffusion_model.out.2.bias", "cond_stage_model.logit_scale", "betas"]
        more += [f"{prefix}{name}" for name in ("loss.logvar", "model_ema.decay")]
        inside = {f"{prefix}{name}": weight for name, weight in ldm_names(vae).items()}
        return {**inside, **{name: torch.ones(3) for name in more}}

    return names


FORMATS: dict[str, Callable[[AutoencoderKL], dict[str, Tensor]]] = {
    "diffusers": own_names,
    "diffusers of old": old_names,
    "stable diffusion": ldm_names,
    "a whole checkpoint": in_checkpoint("first_stage_model."),
    "a checkpoint behind vae.": in_checkpoint("vae."),
}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_file_has_the_weights_and_the_outputs_bit_for_bit(
    tmp_path: Path, kind: dict[str, Any], form: Callable[[AutoencoderKL], dict[str, Tensor]]
) -> None:
    vae = small(**kind)
    file = tmp_path / "one.safetensors"
    save_file(form(vae), file)
    before = torch.get_rng_state()
    found = load(file)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(weight, vae.state_dict()[name]) for name, weight in found.state_dict().items())
    assert weights_sha256(found) == weights_sha256(vae) and encoder_sha256(found) == encoder_sha256(vae)
    x = torch.randn(2, int(vae.config["in_channels"]), 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(encode_moments(found, x), encode_moments(vae, x))
    assert torch.equal(reconstruct(found, x), reconstruct(vae, x))
    assert not found.training and not any(weight.requires_grad for weight in found.parameters())
    same = set(vae.config) - {"scaling_factor", "shift_factor", "force_upcast", "sample_size"}
    same = {name for name in same if not name.startswith("_")}
    assert {name: found.config[name] for name in same} == {name: vae.config[name] for name in same}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_diffusers_own_reading_of_the_file_is_the_same(tmp_path: Path, kind: dict[str, Any]) -> None:
    vae = small(**kind)
    save_file(ldm_names(vae), tmp_path / "one.safetensors")
    vae.save_config(tmp_path / "config")
    theirs = AutoencoderKL.from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tmp_path / "config"), local_files_only=True
    )
    assert weights_sha256(theirs) == weights_sha256(load(tmp_path / "one.safetensors"))


def test_nothing_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    save_file(ldm_names(small()), tmp_path / "one.safetensors")
    monkeypatch.setattr("socket.socket.connect", refuse)
    assert load(tmp_path / "one.safetensors").config["block_out_channels"] == (32, 64)


def test_half_precision_becomes_fp32_as_the_folders_does(tmp_path: Path) -> None:
    vae = small().half()
    save_file(ldm_names(vae), tmp_path / "one.safetensors")
    vae.save_pretrained(tmp_path / "folder")
    found = load(tmp_path / "one.safetensors")
    assert found.dtype == torch.float32
    assert weights_sha256(found) == weights_sha256(load(tmp_path / "folder"))


def test_what_a_file_does_not_say_is_not_made_up(tmp_path: Path) -> None:
    save_file(ldm_names(small()), tmp_path / "one.safetensors")
    found = load(tmp_path / "one.safetensors")
    assert found.config["scaling_factor"] is None and found.config["shift_factor"] is None
    with pytest.raises(ValueError, match=r"says no scaling_factor \(a single file can't\)"):
        published_scale(found)
    found.save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match="says no scaling_factor"):
        published_scale(load(tmp_path / "folder"))


def test_a_scale_for_each_channel_is_refused() -> None:
    vae = small(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(ValueError, match="a scale for each channel; one scaling_factor was wanted"):
        published_scale(vae)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_a_folder_keeps_what_its_config_says(tmp_path: Path, kind: str) -> None:
    vae = small(**KINDS[kind])
    vae.save_pretrained(tmp_path / "one")
    for place in (tmp_path / "one", tmp_path / "one" / "diffusion_pytorch_model.safetensors"):
        found = load(place)
        for name in ("scaling_factor", "shift_factor", "force_upcast"):
            assert found.config[name] == vae.config[name]
        assert published_scale(found) == LatentScale(
            KINDS[kind]["scaling_factor"], KINDS[kind].get("shift_factor", 0.0)
        )


def test_groups_are_never_guessed(tmp_path: Path) -> None:
    vae = small(block_out_channels=(8, 16), norm_num_groups=4)
    file = tmp_path / "one.safetensors"
    save_file(ldm_names(vae), file)
    with pytest.raises(ValueError, match=r"levels of \[8, 16\] channels, which 32 groups don't divide"):
        load(file)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(reconstruct(load(file, norm_num_groups=4), x), reconstruct(vae, x))


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def damage(weights: dict[str, Tensor]) -> None:
        del weights[name]

    return damage


def with_more(name: str) -> Callable[[dict[str, Tensor]], None]:
    def damage(weights: dict[str, Tensor]) -> None:
        weights[name] = torch.zeros(32, 32, 1, 1)

    return damage


def with_another_size(weights: dict[str, Tensor]) -> None:
    weights["decoder.up.0.block.0.conv2.weight"] = torch.zeros(8, 8, 3, 3)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("encoder.conv_in.weight"), "holds no autoencoder: encoder.conv_in.weight is not in it"),
        (without("decoder.conv_in.weight"), "holds no whole autoencoder: it lacks decoder.conv_in.weight"),
        (without("encoder.down.0.block.0.conv1.weight"), "it lacks encoder.down_blocks.0"),
        (without("encoder.mid.attn_1.q.weight"), "lacks 1 tensors, such as encoder.mid_block.attentions.0.to_q.weight"),
        (without("quant_conv.bias"), "lacks 1 tensors, such as quant_conv.bias"),
        (without("decoder.up.1.block.1.conv1.bias"), "such as decoder.up_blocks.0.resnets.1.conv1.bias"),
        (with_more("encoder.down.1.attn.0.q.weight"), "has 1 too many, such as encoder.down.1.attn.0.q.weight"),
        (with_more("model_ema.decoderconv_outbias"), "has 1 too many, such as model_ema.decoderconv_outbias"),
        (with_another_size, "size mismatch for decoder.up_blocks.1.resnets.0.conv2.weight"),
    ],
)
def test_a_file_that_is_no_whole_autoencoder_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    file = tmp_path / "one.safetensors"
    weights = ldm_names(small())
    damage(weights)
    save_file(weights, file)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_cut_file_and_a_missing_one_are_named(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_file(ldm_names(small()), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        load(file)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load("org/name.safetensors")


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".pth", ".bin", ".pkl"])
def test_a_pickle_is_refused(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"one{ending}"
    torch.save(ldm_names(small()), file)
    with pytest.raises(ValueError, match=r"is a pickle, which may run code when it is opened; a \.safetensors file"):
        load(file)


def test_a_folder_of_pickles_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path / "one", safe_serialization=False)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin' is a pickle"):
        load(tmp_path / "one")
    (tmp_path / "one.onnx").write_bytes(b"no")
    with pytest.raises(ValueError, match="is a file of another kind"):
        load(tmp_path / "one.onnx")


def test_a_file_can_be_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_file(ldm_names(small()), file)
    vae = open_trainable(file)
    assert vae.training and all(weight.requires_grad for weight in vae.parameters())
    reconstruct.__wrapped__(vae, torch.randn(1, 3, 16, 16)).square().mean().backward()
    assert all(weight.grad is not None for name, weight in vae.named_parameters() if "quant_conv" not in name)
    vae.save_pretrained(tmp_path / "folder")
    assert load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors").keys() == vae.state_dict().keys()
