"""Folded, an autoencoder gives and takes normalised latents; its images stay, in stock pipelines too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captions import WIDTH, write_text_encoder
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from vae.config import VaeModelConfig
from vae.folding import fold_normalisation
from vae.model import build, load, weights_sha256
from vae.moments import MomentStatistics, encode_moments

MEAN, STD = [0.7, -3.0, 0.0, 12.0], [0.3, 2.5, 1.0, 6.0]
TINY = VaeModelConfig(block_out_channels=(4, 8), norm_num_groups=4)
PRECISE = pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])


def tiny(**changes: Any) -> AutoencoderKL:
    """An autoencoder whose posterior is neither narrow nor wide, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = build(TINY)
        if changes:
            vae = AutoencoderKL.from_config({**vae.config, **changes})
    return vae.requires_grad_(False).eval()  # pyright: ignore[reportAttributeAccessIssue]


def pictures(dtype: torch.dtype) -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype) * 2 - 1


def column(values: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype).view(-1, 1, 1)


def decode(vae: AutoencoderKL, z: Tensor) -> Tensor:
    return vae.decode(z, return_dict=False)[0]  # pyright: ignore[reportArgumentType]


CONVOLUTIONS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_quant_conv": False},
        {"use_post_quant_conv": False},
        {"use_quant_conv": False, "use_post_quant_conv": False},
    ],
    ids=["both", "no quant_conv", "no post_quant_conv", "neither"],
)


@CONVOLUTIONS
@PRECISE
def test_it_encodes_to_normalised_latents(dtype: torch.dtype, error: float, changes: dict[str, bool]) -> None:
    vae = tiny(**changes).to(dtype)
    x = pictures(dtype)
    mean, logvar = encode_moments(vae, x).chunk(2, dim=1)
    shift, scale = column(MEAN, dtype), column(STD, dtype)
    wanted = torch.cat([(mean - shift) / scale, logvar - 2 * scale.log()], dim=1)
    found = encode_moments(fold_normalisation(vae, MEAN, STD), x)
    torch.testing.assert_close(found, wanted, rtol=error, atol=error)


@CONVOLUTIONS
@PRECISE
def test_it_decodes_normalised_latents_to_the_same_images(
    dtype: torch.dtype, error: float, changes: dict[str, bool]
) -> None:
    vae = tiny(**changes).to(dtype)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    z = column(MEAN, dtype) + z * column(STD, dtype)
    found = decode(fold_normalisation(vae, MEAN, STD), (z - column(MEAN, dtype)) / column(STD, dtype))
    torch.testing.assert_close(found, decode(vae, z), rtol=error, atol=error)


def test_of_measured_moments_the_latents_are_standard() -> None:
    vae, x = tiny().double(), pictures(torch.float64)
    measured = MomentStatistics(4)
    measured.update(encode_moments(vae, x))
    again = MomentStatistics(4)
    again.update(encode_moments(fold_normalisation(vae, measured.channel_mean, measured.channel_std), x))
    assert again.channel_mean == pytest.approx([0.0] * 4, abs=1e-12)
    assert again.channel_std == pytest.approx([1.0] * 4, abs=1e-12)


def test_one_number_is_for_all_channels_and_the_reverse_undoes_it() -> None:
    vae = tiny().double()
    one, each = fold_normalisation(vae, 0.5, 2.0), fold_normalisation(vae, [0.5] * 4, [2] * 4)
    assert weights_sha256(one) == weights_sha256(each) != weights_sha256(vae)
    back = fold_normalisation(one, -0.5 / 2.0, 1 / 2.0).state_dict()
    for name, weight in vae.state_dict().items():
        torch.testing.assert_close(back[name], weight, rtol=1e-14, atol=1e-14)


def test_the_first_stays_as_it_was_and_nothing_is_drawn() -> None:
    vae = tiny()
    vae.register_to_config(scaling_factor=0.18215, shift_factor=0.1, latents_mean=MEAN, latents_std=STD)
    before, config, state = weights_sha256(vae), dict(vae.config), torch.get_rng_state()
    folded = fold_normalisation(vae, MEAN, STD)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for weight in folded.parameters():
            weight.zero_()
    assert weights_sha256(vae) == before and dict(vae.config) == config
    assert not folded.training and not any(weight.requires_grad for weight in folded.parameters())
    assert folded.config["scaling_factor"] == 1.0 and folded.config["shift_factor"] is None
    assert folded.config["latents_mean"] is None and folded.config["latents_std"] is None


def test_dtype_and_mode_stay() -> None:
    vae = tiny().to(torch.bfloat16).train().requires_grad_(True)
    folded = fold_normalisation(vae, MEAN, STD)
    assert folded.training and all(w.requires_grad and w.dtype == torch.bfloat16 for w in folded.parameters())


def test_a_clipped_log_variance_is_clipped_where_diffusers_does() -> None:
    """The one thing that is not exact: what diffusers clips to [-30, 20] was ln variance of z, and is that of z'."""
    vae = tiny()
    assert vae.quant_conv is not None and vae.quant_conv.bias is not None
    vae.quant_conv.bias[4:] = torch.tensor([-40.0, 40.0, 0.0, 1.0])
    found = encode_moments(fold_normalisation(vae, 0.0, 0.1), pictures(torch.float32))[:, 4:]
    assert (found[:, 0] == -30).all() and (found[:, 1] == 20).all()


# In diffusers' own hands --------------------------------------------------------------------------


@CONVOLUTIONS
def test_saved_it_opens_in_stock_diffusers(tmp_path: Path, changes: dict[str, bool]) -> None:
    vae = tiny(**changes)
    folded = fold_normalisation(vae, MEAN, STD)
    folded.save_pretrained(tmp_path / "folded")
    opened, ours = AutoencoderKL.from_pretrained(tmp_path / "folded"), load(tmp_path / "folded")
    assert weights_sha256(opened) == weights_sha256(ours) == weights_sha256(folded)
    with torch.no_grad():
        x = pictures(torch.float32)
        torch.testing.assert_close(encode_moments(opened, x), encode_moments(folded, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scaling_factor", [1.0, 0.5])
def test_a_stock_pipeline_with_a_plain_scaling_factor_draws_our_pixels(tmp_path: Path, scaling_factor: float) -> None:
    """z_0 = scaling_factor · (z - mean) / std: they divide by the first, we shift and scale each channel."""
    vae, folder = tiny(), write_text_encoder(tmp_path / "text")
    folded = fold_normalisation(vae, MEAN, STD)
    folded.register_to_config(scaling_factor=scaling_factor)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    StableDiffusionPipeline(
        vae=folded,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "pipeline")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None)
    stock.set_progress_bar_config(disable=True)

    def drawn(output_type: str) -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        prompts = ["a cat", "the digit seven"]
        return stock(prompts, generator=generators, num_inference_steps=3, output_type=output_type).images

    z = drawn("latent") / scaling_factor * column(STD, torch.float32) + column(MEAN, torch.float32)
    with torch.no_grad():
        ours = (decode(vae, z) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    theirs = drawn("np")
    assert theirs.shape == (2, 16, 16, 3) and np.ptp(theirs) > 0.1
    assert np.abs(ours - theirs).max() <= 1e-5


def test_bad_arguments_are_refused() -> None:
    vae = tiny()
    with pytest.raises(ValueError, match=r"mean \[0\.0, 1\.0\] came, 4 finite numbers are wanted, one per latent"):
        fold_normalisation(vae, [0.0, 1.0], 1.0)
    with pytest.raises(ValueError, match=r"std \[nan, nan, nan, nan\] came, 4 finite numbers"):
        fold_normalisation(vae, 0.0, float("nan"))
    with pytest.raises(ValueError, match=r"std \[1\.0, 0\.0, 1\.0, 1\.0\] came, numbers above 0 are wanted"):
        fold_normalisation(vae, 0.0, [1.0, 0.0, 1.0, 1.0])
