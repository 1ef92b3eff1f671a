"""The small decoder is handed latents at the scale that it was made for, whatever scale the diffusion model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from small_pipe import small_pipe

from vae.moments import LatentScale
from vae.preview import load_preview, preview_scale


def tiny(folder: Path, levels: int = 2, **config: Any) -> Path:
    torch.manual_seed(1)
    blocks = {"encoder_block_out_channels": (8,) * levels, "num_encoder_blocks": (1,) * levels}
    blocks |= {"decoder_block_out_channels": (8,) * levels, "num_decoder_blocks": (1,) * levels}
    AutoencoderTiny(**{**blocks, **config}).save_pretrained(folder)
    return folder


def large(**config: Any) -> AutoencoderKL:
    kinds: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 2}
    kinds["up_block_types"] = ("UpDecoderBlock2D",) * 2
    return AutoencoderKL(**{**kinds, "block_out_channels": (4, 4), "norm_num_groups": 4, **config})


SCALES = [
    (LatentScale(1.0), LatentScale(0.18215), LatentScale(0.18215)),
    (LatentScale(1.0), LatentScale(0.18215), LatentScale(0.97)),
    (LatentScale(1.0), LatentScale(1.5305, 0.0609), LatentScale(0.4)),
    (LatentScale(0.7, -0.3), LatentScale(1.5305, 0.0609), LatentScale(0.4, 0.2)),
]


@pytest.mark.parametrize(("own", "published", "used"), SCALES)
def test_the_map_is_the_one_through_the_large_autoencoders_latents(
    own: LatentScale, published: LatentScale, used: LatentScale
) -> None:
    z_0 = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    wanted = own.denormalise(published.normalise(used.denormalise(z_0)))
    torch.testing.assert_close(preview_scale(own, published, used).denormalise(z_0), wanted, rtol=1e-13, atol=1e-13)


def test_at_the_published_scale_nothing_is_mapped() -> None:
    for scale in (LatentScale(0.18215), LatentScale(0.13025), LatentScale(1.5305, 0.0609)):
        assert preview_scale(LatentScale(1.0), scale, scale) == LatentScale(1.0, 0.0)


@pytest.mark.parametrize(("own", "published", "used"), SCALES)
def test_a_pipeline_decodes_by_it_what_the_small_decoder_makes_of_the_same_latents(
    tmp_path: Path, own: LatentScale, published: LatentScale, used: LatentScale
) -> None:
    folder = tiny(tmp_path / "tiny", scaling_factor=own.scale, shift_factor=own.shift)
    vae = large(scaling_factor=published.scale, shift_factor=published.shift or None)
    preview = load_preview(folder, vae, used)
    assert not preview.training and not any(weight.requires_grad for weight in preview.parameters())
    pipe: Any = small_pipe()
    pipe.register_modules(vae=preview)
    z = torch.randn(2, 4, 8, 8)  # as the large encoder gives them
    with torch.no_grad():
        x = AutoencoderTiny.from_pretrained(folder).decode(own.denormalise(published.normalise(z))).sample
        drawn = pipe._decode(used.normalise(z), "pt")
    torch.testing.assert_close(drawn, (x / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert drawn.std() > 0 and drawn.shape == (2, 3, 16, 16)


def test_another_decoders_latents_are_refused(tmp_path: Path) -> None:
    wanted = "4 channels and a factor of 2 were wanted, those of the autoencoder"
    with pytest.raises(ValueError, match=f"decodes latents of 16 channels by a factor of 2, {wanted}"):
        load_preview(tiny(tmp_path / "16", latent_channels=16), large(), LatentScale(1.0))
    with pytest.raises(ValueError, match=f"decodes latents of 4 channels by a factor of 8, {wanted}"):
        load_preview(tiny(tmp_path / "f8", levels=4), large(), LatentScale(1.0))


def test_what_is_no_small_decoder_is_refused(tmp_path: Path) -> None:
    large().save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="is of class AutoencoderKL, AutoencoderTiny is wanted"):
        load_preview(tmp_path / "large", large(), LatentScale(1.0))
    with pytest.raises(FileNotFoundError, match="no such folder; an existing diffusers folder of an AutoencoderTiny"):
        load_preview(tmp_path / "none", large(), LatentScale(1.0))


def test_without_a_published_scale_there_is_no_preview(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="says no scaling_factor"):
        load_preview(tiny(tmp_path / "tiny"), large(scaling_factor=None), LatentScale(1.0))
