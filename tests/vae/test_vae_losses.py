"""The KL's closed form against other people's and chance, the pixel errors and equivariance against their words."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as kl_of_distributions
from torch.nn import functional

from vae.config import VaeModelConfig
from vae.losses import (
    Pixelwise,
    SpatialTransform,
    kl_divergence,
    kl_of_elements,
    kl_per_channel,
    reconstruction_loss,
)
from vae.model import build
from vae.moments import encode_moments, sample_posterior

MOMENTS = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_kl_is_the_closed_form() -> None:
    mean, logvar = MOMENTS.chunk(2, dim=1)
    wanted = kl_of_distributions(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(kl_divergence(MOMENTS), wanted, rtol=1e-12)
    assert torch.allclose(kl_divergence(MOMENTS.float()).double(), wanted, rtol=1e-6)
    assert kl_of_elements(MOMENTS).shape == (3, 2, 2, 2) and (kl_of_elements(MOMENTS) >= 0).all()


def test_kl_is_the_mean_of_the_log_ratio() -> None:
    """KL = E_q[log q(z) - log p(z)], by 100,000 draws per image."""
    num_draws = 100_000
    mean, logvar = MOMENTS.chunk(2, dim=1)
    noise = torch.randn(num_draws, 3, 2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = sample_posterior(MOMENTS.expand(num_draws, -1, -1, -1, -1).flatten(0, 1), noise.flatten(0, 1)).view_as(noise)
    ratio = Normal(mean, (0.5 * logvar).exp()).log_prob(z) - Normal(0.0, 1.0).log_prob(z)
    ratio = ratio.sum((2, 3, 4))  # [draws, B]
    error = ratio.std(0) / num_draws**0.5
    assert ((ratio.mean(0) - kl_divergence(MOMENTS)).abs() < 5 * error).all()


def test_channels_share_the_kl() -> None:
    """Their sum, times h·w, is that of an image; and a channel's is that of its own moments."""
    found = kl_per_channel(MOMENTS)
    assert found.shape == (2,) and found.sum().item() * 4 == pytest.approx(kl_divergence(MOMENTS).mean().item())
    second = kl_divergence(MOMENTS[:, [1, 3]]).mean() / 4
    assert found[1].item() == pytest.approx(second.item())


def test_kl_is_zero_at_the_prior_and_positive_beside_it() -> None:
    assert (kl_divergence(torch.zeros(2, 4, 2, 2)) == 0).all()
    near = torch.zeros(1, 2, 1, 1)
    near[0, 1] = 1e-4  # ½(e^v - 1 - v) = v²/4, which fp32 cannot see in e^v - 1 - v
    assert kl_divergence(near).item() == pytest.approx(2.5e-9, rel=0.2)


def test_kl_gradient() -> None:
    assert torch.autograd.gradcheck(kl_divergence, (MOMENTS.clone().requires_grad_(),))


def test_reconstruction_is_a_mean_per_image() -> None:
    x = torch.zeros(2, 3, 4, 4)
    x_hat = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), -2.0)])
    assert torch.allclose(reconstruction_loss(x_hat, x, "l1"), torch.tensor([0.5, 2.0]))
    assert torch.allclose(reconstruction_loss(x_hat, x, "l2"), torch.tensor([0.25, 4.0]))
    assert reconstruction_loss(x_hat.bfloat16(), x, "l2").dtype == torch.float32


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3, 4, 4\] came, \[2, 3, 4, 4\] is wanted"):
        reconstruction_loss(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4), "l2")


# Equivariance -------------------------------------------------------------------------------------

SIZES = pytest.mark.parametrize("size", [(8, 8), (9, 9), (7, 10)], ids=str)
TRANSFORMS = pytest.mark.parametrize(
    "transform", [SpatialTransform(scale, turns) for scale in (1.0, 0.5, 0.4, 1.3) for turns in range(4)], ids=str
)
MIXING = torch.tensor([[1.0, 0.5, -0.3], [0.2, -0.8, 0.4], [-0.6, 0.1, 0.9]], dtype=torch.float64)


def images(*size: int, seed: int = 2) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def equivariance_loss(
    x_hat: Tensor, x: Tensor, transform: SpatialTransform, kind: Pixelwise, *, latents: tuple[int, int]
) -> Tensor:
    return reconstruction_loss(x_hat, transform.of_images(x, latents=latents), kind)


def mixed(x: Tensor, matrix: Tensor, bias: float = 0.0) -> Tensor:
    return torch.einsum("ij,bjhw->bihw", matrix, x) + bias


@SIZES
@TRANSFORMS
@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_of_a_pointwise_autoencoder_it_is_zero(
    size: tuple[int, int], transform: SpatialTransform, kind: Pixelwise
) -> None:
    """Channels mixed in each pixel, and mixed back: resizing and turning are linear and keep constants."""
    x = images(*size)
    z = mixed(x, MIXING, bias=0.7)
    x_hat = mixed(transform.of_latents(z) - 0.7, MIXING.inverse())
    loss = equivariance_loss(x_hat, x, transform, kind, latents=size)
    assert loss.shape == (2,) and loss.max() < 1e-14


@SIZES
@TRANSFORMS
def test_of_one_that_shifts_or_bends_it_is_not(size: tuple[int, int], transform: SpatialTransform) -> None:
    """A decoder that knows left from right is caught by turns, one that bends values (z = x³) by resizing."""
    x = images(*size)
    shifted = transform.of_latents(x.roll(1, dims=-1)).roll(-1, dims=-1)  # D(E(x)) = x
    cubed = transform.of_latents(x**3)
    bent = cubed.sign() * cubed.abs() ** (1 / 3)
    if transform.quarter_turns:
        assert (equivariance_loss(shifted, x, transform, "l2", latents=size) > 1e-2).all()
    if transform.scale != 1:
        assert (equivariance_loss(bent, x, transform, "l2", latents=size) > 1e-4).all()
    else:
        assert (equivariance_loss(bent, x, transform, "l2", latents=size) < 1e-14).all()


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("size", [(4, 4), (5, 3)])
def test_of_means_and_blocks_it_is_zero_under_turns(turns: int, size: tuple[int, int]) -> None:
    """E: means of 2×2 pixels, D: blocks of one colour; of images that D can make."""
    x = functional.interpolate(images(*size), scale_factor=2, mode="nearest")
    transform = SpatialTransform(quarter_turns=turns)
    x_hat = functional.interpolate(transform.of_latents(functional.avg_pool2d(x, 2)), scale_factor=2, mode="nearest")
    assert equivariance_loss(x_hat, x, transform, "l2", latents=size).max() < 1e-28


def test_a_transform_resizes_and_turns_anticlockwise() -> None:
    z = torch.arange(6.0).view(1, 1, 2, 3)
    turned = SpatialTransform(quarter_turns=1).of_latents(z)
    assert turned.tolist() == [[[[2, 5], [1, 4], [0, 3]]]]
    for k in range(4):
        assert torch.equal(SpatialTransform(1.0, k - 4).of_latents(z), SpatialTransform(1.0, k).of_latents(z))
    halved = SpatialTransform(0.5).of_latents(torch.arange(16.0).view(1, 1, 4, 4))
    assert halved.tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert SpatialTransform(0.28, 1).of_latents(torch.zeros(1, 1, 9, 1)).shape == (1, 1, 1, 3), "0.28 · 9 = 2.52, and 1"
    assert SpatialTransform(0.28, 1).to_sides(torch.zeros(1, 1, 72, 8), 8, 24).shape == (1, 1, 8, 24)


@pytest.mark.parametrize(("scale", "turns"), [(0.6, 1), (1.0, 2), (0.5, 0)])
@pytest.mark.parametrize("side", [16, 18], ids=["even latents", "odd latents"])
def test_its_gradient_reaches_encoder_and_decoder_and_not_the_target(scale: float, turns: int, side: int) -> None:
    transform = SpatialTransform(scale, turns)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = build(VaeModelConfig(block_out_channels=(8, 8), norm_num_groups=4))
    x = images(side, side).float().requires_grad_()
    moments = encode_moments(vae, x.detach())
    noise = torch.randn(2, 4, side // 2, side // 2, generator=torch.Generator().manual_seed(3))
    z = transform.of_latents(sample_posterior(moments, noise))
    x_hat = vae.decode(z, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
    loss = equivariance_loss(x_hat, x, transform, "l2", latents=(side // 2, side // 2)).mean()
    loss.backward()
    assert loss > 0 and x.grad is None
    for name, weight in vae.named_parameters():
        # A key's bias moves all scores of a softmax row alike: its gradient is zero by theory.
        if not name.endswith("to_k.bias"):
            assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_its_gradient_is_that_of_finite_differences() -> None:
    transform, x = SpatialTransform(0.6, 3), images(5, 4)
    matrices = MIXING.clone().requires_grad_(), torch.eye(3, dtype=torch.float64).requires_grad_()

    def loss(encoder: Tensor, decoder: Tensor) -> Tensor:
        x_hat = mixed(transform.of_latents(mixed(x, encoder)), decoder)
        return equivariance_loss(x_hat, x, transform, "l2", latents=(5, 4))

    assert torch.autograd.gradcheck(loss, matrices)


def test_minimised_it_makes_a_decoder_equivariant() -> None:
    """A 3×3 convolution that starts as a shift learns to be none, from turns alone."""
    x = images(9, 9).float()
    decoder = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular", bias=False)
    with torch.no_grad():
        decoder.weight.zero_()
        decoder.weight[range(3), range(3), 1, 0] = 1.0  # x_hat(i) = z(i - 1), with z = x(i + 1)
    optimizer = torch.optim.Adam(decoder.parameters(), 0.02)
    z = x.roll(-1, dims=-1)
    losses: list[float] = []
    for step in range(120):
        transform = SpatialTransform(quarter_turns=step % 4)
        loss = equivariance_loss(decoder(transform.of_latents(z)), x, transform, "l2", latents=(9, 9)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 1e-12 < 0.3 < losses[1] and sum(losses[-4:]) < 0.75 * sum(losses[:4])


def test_another_size_is_refused() -> None:
    x = torch.zeros(2, 3, 12, 8)
    transform = SpatialTransform(0.5, 1)  # latents [6,4] → [3,2] → [2,3]
    assert equivariance_loss(torch.zeros(2, 3, 4, 6), x, transform, "l1", latents=(6, 4)).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"reconstruction \[2, 3, 6, 4\] came, \[2, 3, 4, 6\] is wanted"):
        equivariance_loss(torch.zeros(2, 3, 6, 4), x, transform, "l1", latents=(6, 4))
    with pytest.raises(ValueError, match=r"images \[2, 3, 12, 8\] of latents \[5, 4\] came, a whole multiple of both"):
        equivariance_loss(torch.zeros(2, 3, 6, 4), x, transform, "l1", latents=(5, 4))
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="a finite scale > 0 is wanted"):
            SpatialTransform(scale)
