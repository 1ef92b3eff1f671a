"""Tiles: a tile as large as the image is the image, smaller ones give its size, and ones that don't fit are refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from vae.config import VaeModelConfig
from vae.metrics import reconstruct, tiling_seams
from vae.model import build
from vae.moments import encode_moments
from vae.tiles import in_tiles, tile_of


@pytest.fixture
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return build(VaeModelConfig(block_out_channels=(8, 8, 8), norm_num_groups=4)).eval().requires_grad_(False)


@pytest.mark.parametrize("tile_pixels", [32, 48, 1024])
def test_a_tile_as_large_as_the_image_is_the_whole_bit_for_bit(vae: AutoencoderKL, tile_pixels: int) -> None:
    x = torch.randn(2, 3, 32, 32)
    moments, x_hat = encode_moments(vae, x), reconstruct(vae, x)
    in_tiles(vae, tile_pixels)
    assert torch.equal(encode_moments(vae, x), moments) and torch.equal(reconstruct(vae, x), x_hat)
    assert tile_of(32, tile_pixels) is None


@pytest.mark.parametrize("tile_pixels", [16, 32])
@pytest.mark.parametrize("sides", [(64, 64), (48, 64), (36, 40), (68, 32)])
def test_smaller_tiles_give_the_right_size(vae: AutoencoderKL, tile_pixels: int, sides: tuple[int, int]) -> None:
    x = torch.randn(1, 3, *sides)
    whole = reconstruct(vae, x)
    in_tiles(vae, tile_pixels)
    assert encode_moments(vae, x).shape == (1, 8, sides[0] // 4, sides[1] // 4)
    x_hat = reconstruct(vae, x)
    assert x_hat.shape == x.shape and x_hat.isfinite().all()
    assert not torch.equal(x_hat, whole) and tile_of(max(sides), tile_pixels) == tile_pixels
    in_tiles(vae, None)
    assert torch.equal(reconstruct(vae, x), whole)


def test_they_are_the_tiles_whose_seams_are_measured(vae: AutoencoderKL) -> None:
    x = torch.randn(1, 3, 64, 64)
    measured = tiling_seams(vae, x, tile_pixels=32, overlap=0.25)
    mean, _ = encode_moments(vae, x).chunk(2, dim=1)
    in_tiles(vae, 32)
    tiled, _ = encode_moments(vae, x).chunk(2, dim=1)
    assert float((tiled - mean).square().mean().sqrt()) == pytest.approx(measured.encoded_error, rel=1e-5)


@pytest.mark.parametrize(
    ("came", "nearest"), [(1, "16"), (15, "16"), (17, "16 or 32"), (40, "32 or 48"), (511, "496 or 512")]
)
def test_what_does_not_fit_is_refused_with_the_nearest_that_do(vae: AutoencoderKL, came: int, nearest: str) -> None:
    said = rf"{came} came, a multiple of 16 \(4 times the autoencoder's factor 4\) was wanted, such as {nearest}$"
    with pytest.raises(ValueError, match=said):
        in_tiles(vae, came)
    assert not vae.use_tiling
