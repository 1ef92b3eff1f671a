"""PSNR, SSIM and absolute error against their formulas, reconstruction without chance, and the seams of tiles."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from vae.config import VaeModelConfig, VaeTrainConfig
from vae.metrics import absolute_error, psnr, reconstruct, seam_gradient, ssim, ssim_window, tiling_seams
from vae.model import build
from vae.objective import Objective
from vae.steps import AutoencoderStep


def test_psnr_is_the_formula_per_image() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 8, 8, generator=generator) * 1.6 - 0.8
    x_hat = x + 0.05 * torch.randn(4, 3, 8, 8, generator=generator)
    wanted = [10 * math.log10(4 / float((a - b).double().square().mean())) for a, b in zip(x_hat, x, strict=True)]
    assert psnr(x_hat, x).tolist() == pytest.approx(wanted, rel=1e-5)


def test_psnr_of_known_errors() -> None:
    x = torch.zeros(3, 3, 4, 4)
    x_hat = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.02), torch.full((3, 4, 4), 3.0)])
    exact, small, cut = psnr(x_hat, x).tolist()
    assert exact == math.inf
    assert small == pytest.approx(40.0, abs=1e-4)
    assert cut == pytest.approx(20 * math.log10(2), abs=1e-4), "3 is shown as 1"


def test_psnr_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="is wanted"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4))


def test_absolute_error_is_in_levels() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    x_hat = x + torch.tensor([2 / 255, -0.5, 7.0]).view(3, 1, 1, 1)
    assert absolute_error(x_hat, x).tolist() == pytest.approx([1, 63.75, 0], abs=1e-4), "8 is shown as 1"


def ssim_by_hand(x_hat: Tensor, x: Tensor, window: int, sigma: float) -> float:
    """Wang et al. 2004, eq. 13, of one image, window by window: [3,H,W] in [-1,1]."""
    half = window // 2
    weight = (-0.5 * (torch.arange(-half, half + 1, dtype=torch.float64) / sigma).square()).exp()
    weight = weight.outer(weight) / weight.sum().square()
    c_1, c_2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values: list[float] = []
    for channel in range(3):
        padded = [nn.ReflectionPad2d(half)(image[None, None, channel].double())[0, 0] for image in (x_hat, x)]
        for top, left in itertools.product(range(x.shape[1]), range(x.shape[2])):
            a, b = (image[top : top + window, left : left + window] for image in padded)
            mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
            var_a, var_b = (weight * (a - mean_a).square()).sum(), (weight * (b - mean_b).square()).sum()
            covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
            likeness = (2 * mean_a * mean_b + c_1) * (2 * covariance + c_2)
            values.append(float(likeness / ((mean_a**2 + mean_b**2 + c_1) * (var_a + var_b + c_2))))
    return sum(values) / len(values)


@pytest.mark.parametrize(("side", "window"), [(16, 11), (11, 11), (10, 9), (8, 7), (4, 3), (3, 3)])
def test_ssim_is_the_formula_per_image(side: int, window: int) -> None:
    generator = torch.Generator().manual_seed(side)
    x = torch.rand(2, 3, side, side, generator=generator) * 1.6 - 0.8
    x_hat = (x + torch.tensor([0.05, 0.5]).view(2, 1, 1, 1) * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    found_window, sigma = ssim_window(side)
    assert found_window == window and sigma == pytest.approx(1.5 * (window - 1) / 10)
    wanted = [ssim_by_hand(a, b, window, sigma) for a, b in zip(x_hat, x, strict=True)]
    assert ssim(x_hat, x).tolist() == pytest.approx(wanted, rel=1e-6)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])


def test_ssim_of_what_has_no_window_is_refused() -> None:
    with pytest.raises(ValueError, match="a side of 2 pixels came, at least 3"):
        ssim(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
    for measure in (ssim, absolute_error):
        with pytest.raises(ValueError, match="is wanted"):
            measure(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))


def test_reconstruction_has_no_chance_and_no_gradient() -> None:
    torch.manual_seed(0)
    vae = build(VaeModelConfig(block_out_channels=(4, 8), norm_num_groups=4))
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    first, second = reconstruct(vae, x), reconstruct(vae, x)
    assert torch.equal(first, second) and first.shape == x.shape and not first.requires_grad
    mean = vae.encode(x).latent_dist.mode()  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(first, vae.decode(mean, return_dict=False)[0])


# Tiles --------------------------------------------------------------------------------------------


def waves(num_images: int, side: int, generator: torch.Generator) -> Tensor:
    """Smooth pictures, as smooth anywhere: sums of six waves in any direction.  [N,3,side,side]."""
    frequency = 0.8 * torch.rand(2, num_images, 3, 6, 1, 1, generator=generator) - 0.4
    phase = 2 * math.pi * torch.rand(num_images, 3, 6, 1, 1, generator=generator)
    place = torch.arange(float(side))
    return ((frequency[0] * place[:, None] + frequency[1] * place + phase).cos().sum(dim=2) / 3).tanh()


@pytest.fixture(scope="module")
def trained() -> AutoencoderKL:
    """60 steps on pictures of 32 pixels: enough to follow what it is given."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = build(VaeModelConfig(block_out_channels=(8, 8, 16), norm_num_groups=4))
    step, optimizer = AutoencoderStep(vae), torch.optim.Adam(vae.parameters(), 4e-3)
    for _ in range(60):
        x = waves(8, 32, generator)
        given = {"x": x, "posterior_noise": torch.randn(8, 4, 8, 8, generator=generator)}
        loss, _ = Objective(VaeTrainConfig(), vae).autoencoder_loss(step, given, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vae.requires_grad_(False).eval()


@pytest.mark.parametrize(
    ("overlap", "lowest", "highest"), [(0.0, 1.6, 4.0), (0.125, 0.8, 1.25), (0.25, 0.8, 1.1), (0.375, 0.8, 1.1)]
)
def test_tiles_show_where_nothing_is_blended_and_a_quarter_of_overlap_hides_them(
    trained: AutoencoderKL, overlap: float, lowest: float, highest: float
) -> None:
    """Pictures of four times the side of a tile.  A quarter is diffusers' own; an eighth nearly does."""
    x = waves(4, 128, torch.Generator().manual_seed(1))
    found = tiling_seams(trained, x, tile_pixels=32, overlap=overlap)
    assert lowest < found.decoded.ratio < highest
    assert found.decoded_whole.ratio == pytest.approx(1, abs=0.15), "the pictures have no seams of their own"
    assert found.encoded.ratio < 1.1
    assert 0 < found.decoded_error < 0.1 and 0 < found.encoded_error < 0.5
    assert not trained.use_tiling and trained.tile_overlap_factor == 0.25, "as it came"


def test_the_overlap_brings_tiles_nearer_to_the_whole(trained: AutoencoderKL) -> None:
    x = waves(4, 128, torch.Generator().manual_seed(1))
    found = [tiling_seams(trained, x, tile_pixels=32, overlap=overlap) for overlap in (0.0, 0.25)]
    assert found[1].decoded_error < 0.8 * found[0].decoded_error
    assert found[1].encoded_error < 0.9 * found[0].encoded_error


def test_the_gradient_is_counted_at_seams_and_elsewhere() -> None:
    slope = 0.01 * torch.arange(12.0).expand(1, 1, 12, 12)  # 0.01 per pixel across, 0 down
    steps = slope + 0.5 * (torch.arange(12) // 4)
    found = seam_gradient(steps, 4, 0)  # 2 of 11 lines each way, and nothing down
    assert found.seams == pytest.approx((0.51 + 0) / 2) and found.elsewhere == pytest.approx(0.01 / 2)
    assert found.ratio == pytest.approx(51)
    # A step that is blended over two lines, 4|5 and 5|6, and 8|9 and 9|10.
    rising = (torch.arange(12.0) - 4).clamp(0, 2) + (torch.arange(12.0) - 8).clamp(0, 2)
    blended = seam_gradient(slope + 0.25 * rising, 4, 2)
    assert blended.seams == pytest.approx(0.26 / 2) and blended.elsewhere == pytest.approx(0.01 / 2)


def test_tiles_that_do_not_fit_are_refused(trained: AutoencoderKL) -> None:
    x = waves(1, 128, torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"0\.3 of 32 pixels came, both whole multiples of 4 pixels are wanted"):
        tiling_seams(trained, x, tile_pixels=32, overlap=0.3)
    with pytest.raises(ValueError, match=r"0\.0 of 30 pixels came"):
        tiling_seams(trained, x, tile_pixels=30, overlap=0.0)
    with pytest.raises(ValueError, match=r"overlap=0\.5 came, 0 or more and below 0\.5 is wanted"):
        tiling_seams(trained, x, tile_pixels=32, overlap=0.5)
    for tile, images in ((128, x), (4, x), (32, x[..., :126])):
        with pytest.raises(ValueError, match=f"tiles of {tile} pixels in images .* came"):
            tiling_seams(trained, images, tile_pixels=tile, overlap=0.25)
    with pytest.raises(ValueError, match="step=4 and blend=4 came, 0 ≤ blend < step is wanted"):
        seam_gradient(x, 4, 4)
    with pytest.raises(ValueError, match="larger ones than 128 are wanted"):
        seam_gradient(x, 128, 0)


def test_diffusers_tiles_that_do_not_fit_make_an_image_of_another_size() -> None:
    """Which is why they are refused; should diffusers learn to place them, the refusal may go."""
    vae = build(VaeModelConfig(block_out_channels=(4, 4, 4), norm_num_groups=4)).eval()
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size, vae.tile_overlap_factor = 32, 8, 0.3
    with torch.no_grad():
        x_hat = vae.decode(torch.zeros(1, 4, 32, 32), return_dict=False)[0]  # pyright: ignore[reportArgumentType]
    assert x_hat.shape[-2:] == (146, 146), "128 are wanted"
