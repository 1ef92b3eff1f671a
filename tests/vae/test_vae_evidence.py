"""The bounds where ln p(x) is closed: a linear decoder, posteriors exact and not; the gradient against its own form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal
from torch.distributions import kl_divergence as kl_of_distributions

from pipeline.diffusion.likelihood import discretized_gaussian_nll, gaussian_nll
from vae.config import VaeModelConfig
from vae.evidence import (
    Evidence,
    evidence,
    gaussian_log_likelihood,
    importance_weighted,
    kl_by_channel,
    log_prior_ratio,
)
from vae.losses import kl_divergence
from vae.model import build
from vae.moments import encode_moments

# x = W z + b + noise of variance NOISE, z ~ N(0, I): six pixels, two latents.  The columns of W are orthogonal, so that
# the posterior is diagonal, as an encoder's is.
W = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
W = W * torch.tensor([1.7, 0.6])
OFFSET = torch.linspace(-0.5, 0.3, 6, dtype=torch.float64)
NOISE = 0.09
TRUE = MultivariateNormal(OFFSET, W @ W.T + NOISE * torch.eye(6, dtype=torch.float64))
NUM_IMAGES = 5
X = TRUE.mean + torch.randn(NUM_IMAGES, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LN_P = TRUE.log_prob(X)
LN_NOISE = torch.tensor(NOISE, dtype=torch.float64).log()

# E of what is of degree 3 or less in each element of N(0, I): the mean over the corners of a square.
CORNERS = torch.cartesian_prod(*torch.tensor([[-1.0, 1.0]] * 2, dtype=torch.float64).unbind())  # [4,2]
CORNERS = CORNERS.view(4, 1, 2, 1, 1).expand(-1, NUM_IMAGES, -1, -1, -1)


def decode(z: Tensor) -> Tensor:
    return (z.flatten(1) @ W.T + OFFSET).view(-1, 6, 1, 1)


def moments_of(shift: float = 0.0, widening: float = 1.0) -> Tensor:
    """The exact posterior, moved and widened.  [5,4,1,1]."""
    variance = 1 / (1 + W.square().sum(dim=0) / NOISE)
    mean = variance * ((X - OFFSET) @ W / NOISE) + shift
    return torch.cat([mean, (variance * widening).log().expand(NUM_IMAGES, -1)], dim=1).view(NUM_IMAGES, 4, 1, 1)


def kl_from_exact(shift: float, widening: float) -> Tensor:
    """KL(N(m + s, wv) ‖ N(m, v)) = ½ Σ (w - 1 - ln w + s²/v)."""
    variance = 1 / (1 + W.square().sum(dim=0) / NOISE)
    return 0.5 * (widening - 1 - math.log(widening) + shift**2 / variance).sum()


def found(moments: Tensor, noise: Tensor, log_variance: Tensor = LN_NOISE) -> Evidence:
    """Of the five images, or of as many copies of them as there are moments."""

    def likelihood(x: Tensor, x_hat: Tensor) -> Tensor:
        return gaussian_log_likelihood(x, x_hat, log_variance)

    x = X.view(-1, 6, 1, 1).repeat(len(moments) // NUM_IMAGES, 1, 1, 1)
    return evidence(x, moments, noise, decode, likelihood)


def draws(num: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, NUM_IMAGES, 2, 1, 1, generator=generator, dtype=torch.float64)


# Against the exact evidence -----------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 2, 8])
def test_with_the_exact_posterior_every_draw_gives_the_evidence(num: int) -> None:
    """p(x, z) / p(z|x) = p(x) at any z."""
    by = found(moments_of(), draws(num, seed=2))
    torch.testing.assert_close(by.log_weights, LN_P.expand(num, -1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(by.iwae(), LN_P, rtol=1e-12, atol=1e-12)


def test_with_the_exact_posterior_the_elbo_is_the_evidence() -> None:
    torch.testing.assert_close(found(moments_of(), CORNERS).elbo, LN_P, rtol=1e-12, atol=1e-12)


WRONG = pytest.mark.parametrize(("shift", "widening"), [(0.2, 1.0), (0.0, 1.6), (-0.1, 0.8)])


@WRONG
def test_with_another_posterior_the_gap_is_the_kl(shift: float, widening: float) -> None:
    gap = LN_P - found(moments_of(shift, widening), CORNERS).elbo
    torch.testing.assert_close(gap, kl_from_exact(shift, widening).expand(NUM_IMAGES), rtol=1e-11, atol=1e-12)


def many(shift: float, widening: float, num_draws: int, num_groups: int, seed: int) -> Evidence:
    """Draws for each of the images, in groups: log_weights etc. [K, groups · 5]."""
    noise = torch.randn(
        num_draws, num_groups * NUM_IMAGES, 2, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return found(moments_of(shift, widening).repeat(num_groups, 1, 1, 1), noise)


def within_three_standard_errors(found: Tensor, wanted: Tensor | float) -> bool:
    return bool((found.mean() - wanted).abs() < 3 * found.std() / found.numel() ** 0.5)


@WRONG
def test_draws_find_the_elbo_and_the_evidence(shift: float, widening: float) -> None:
    """E[ln w] = ln p - KL, both with the KL in closed form and drawn; E[w] = p(x)."""
    by = many(shift, widening, num_draws=4, num_groups=20_000, seed=3)
    ln_p, kl = LN_P.repeat(20_000), kl_from_exact(shift, widening)
    assert within_three_standard_errors(by.elbo - ln_p, -kl)
    assert within_three_standard_errors(by.iwae(1) - ln_p, -kl)
    assert within_three_standard_errors((by.log_weights - ln_p).exp().mean(dim=0), 1.0)


@WRONG
def test_the_weighted_bound_rises_with_k_from_the_elbo_to_the_evidence(shift: float, widening: float) -> None:
    """And its gap is Var(w/p) / 2K to the first order in 1/K: Domke & Sheldon 2018, theorem 3."""
    counts = (1, 2, 4, 8, 16, 32, 64, 128)
    by = many(shift, widening, num_draws=128, num_groups=1000, seed=4)
    ln_p = LN_P.repeat(1000)
    bounds = torch.stack([by.iwae(k) - ln_p for k in counts])  # [8,5000]
    assert (bounds.diff(dim=0) > 0).all(), "the mean over parts of the same draws, by Jensen's inequality"
    assert (bounds[:-1].mean(dim=1) < 0).all()
    assert within_three_standard_errors(bounds[0], -kl_from_exact(shift, widening))
    assert bounds[0].mean() >= (by.elbo - ln_p).mean() - 3 * (by.iwae(1) - by.elbo).std() / 5000**0.5
    variance = float((by.log_weights - ln_p).exp().var())
    assert within_three_standard_errors(bounds[-1], -variance / 256), (bounds[-1].mean(), variance / 256)


# The parts ----------------------------------------------------------------------------------------

MOMENTS = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_the_kl_of_a_channel_is_the_closed_form() -> None:
    mean, logvar = MOMENTS.chunk(2, dim=1)
    wanted = kl_of_distributions(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(dim=(2, 3))
    torch.testing.assert_close(kl_by_channel(MOMENTS), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(kl_by_channel(MOMENTS).sum(dim=1), kl_divergence(MOMENTS), rtol=1e-14, atol=0)
    assert kl_by_channel(MOMENTS.float()).dtype == torch.float64


def test_the_prior_ratio_is_that_of_the_densities() -> None:
    mean, logvar = MOMENTS.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    posterior = Normal(mean, (0.5 * logvar).exp())
    z = mean + posterior.stddev * noise
    wanted = (Normal(0.0, 1.0).log_prob(z) - posterior.log_prob(z)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(log_prior_ratio(MOMENTS, noise), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (3, 1, 1), (2, 3, 4, 4)])
def test_the_gaussian_is_that_of_the_density_with_any_variance(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(7)
    x, x_hat = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    log_variance = torch.randn(shape, generator=generator, dtype=torch.float64)
    wanted = -gaussian_nll(x, x_hat, log_variance).sum(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian_log_likelihood(x, x_hat, log_variance), wanted, rtol=1e-13, atol=0)


# Gradients ----------------------------------------------------------------------------------------


def elbo_in_closed_form(moments: Tensor, log_variance: Tensor) -> Tensor:
    """E_q[ln N(x; Wz + b, σ²)] - KL: the error's mean square is |x - Wm - b|² + Σ v |W|²."""
    mean, logvar = moments.flatten(1).chunk(2, dim=1)
    square = (X - decode(mean.view(-1, 2, 1, 1)).flatten(1)).square().sum(dim=1) + logvar.exp() @ W.square().sum(dim=0)
    likelihood = -0.5 * (6 * math.log(2 * math.pi) + 6 * log_variance + square * (-log_variance).exp())
    return likelihood - 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=1)


def test_the_reparameterised_gradient_is_the_closed_one_and_that_of_finite_differences() -> None:
    """To the moments and to the decoder's ln σ², to 1e-6; zero at the exact posterior and variance for the moments."""
    moments, log_variance = moments_of(0.2, 1.6).requires_grad_(), LN_NOISE.clone().requires_grad_()
    value = found(moments, CORNERS, log_variance).elbo.sum()
    by_draws = torch.autograd.grad(value, (moments, log_variance))
    closed = elbo_in_closed_form(moments, log_variance).sum()
    torch.testing.assert_close(value, closed, rtol=1e-12, atol=0)
    for one, other in zip(by_draws, torch.autograd.grad(closed, (moments, log_variance)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    step = 1e-5
    for k in range(moments.numel()):
        moved = torch.zeros(moments.numel(), dtype=torch.float64)
        moved[k] = step
        ahead, behind = (
            found(moments.detach() + sign * moved.view_as(moments), CORNERS).elbo.sum() for sign in (1, -1)
        )
        difference = float(ahead - behind) / (2 * step)
        assert by_draws[0].flatten()[k].item() == pytest.approx(difference, rel=1e-6, abs=1e-6)
    exact = moments_of().requires_grad_()
    (flat,) = torch.autograd.grad(found(exact, CORNERS).elbo.sum(), exact)
    assert flat.abs().max() < 1e-10


def test_gradients_pass_gradcheck() -> None:
    noise = draws(3, seed=8)
    inputs = (moments_of(0.2, 1.6).requires_grad_(), LN_NOISE.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda m, v: found(m, noise, v).iwae(), inputs)
    assert torch.autograd.gradcheck(lambda m, v: found(m, noise, v).elbo, inputs)


# An autoencoder, and levels -----------------------------------------------------------------------


def test_of_an_autoencoder_with_levels() -> None:
    """ln P(x) of 8-bit levels: below 0 in any bound, the weighted one above the ELBO's own draws."""
    torch.manual_seed(0)
    vae = build(VaeModelConfig(block_out_channels=(4, 8), norm_num_groups=4)).eval()
    generator = torch.Generator().manual_seed(9)
    x = torch.randint(0, 256, (2, 3, 8, 8), generator=generator) / 127.5 - 1
    noise = torch.randn(6, 2, 4, 4, 4, generator=generator)
    state = torch.get_rng_state()
    with torch.no_grad():
        by = evidence(
            x,
            encode_moments(vae, x),
            noise,
            lambda z: vae.decode(z, return_dict=False)[0],  # pyright: ignore[reportArgumentType]
            lambda x, x_hat: -discretized_gaussian_nll(x, x_hat, torch.tensor(-1.0)).sum(dim=(1, 2, 3)),
        )
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert by.elbo.dtype == by.iwae().dtype == torch.float64 and by.kl_by_channel.shape == (2, 4)
    assert (by.iwae() < 0).all() and (by.elbo < 0).all()
    assert (by.iwae(1) < by.iwae(2)).all() and (by.iwae(2) < by.iwae()).all()


def test_weights_of_any_size_are_summed() -> None:
    """Of images of a megapixel ln w is of millions of nats: exp of it is 0, or no number."""
    log_weights = torch.tensor([[-3e6, 4e6], [-3e6 - 1, 4e6]], dtype=torch.float64)
    wanted = torch.tensor([-3e6 + math.log((1 + math.exp(-1)) / 2), 4e6], dtype=torch.float64)
    torch.testing.assert_close(importance_weighted(log_weights), wanted, rtol=1e-15, atol=0)
    assert importance_weighted(log_weights.float()).dtype == torch.float64


def test_bad_arguments_are_refused() -> None:
    x, moments = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 2, 2)
    with pytest.raises(ValueError, match=r"reconstruction \[2, 3, 4, 2\] came, \[2, 3, 4, 4\] is wanted"):
        gaussian_log_likelihood(x, x[..., :2], torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"log_variance \[2\] came, a shape that broadcasts to \[2, 3, 4, 4\]"):
        gaussian_log_likelihood(x, x, torch.zeros(2))
    with pytest.raises(ValueError, match=r"moments \[2, 3, 2, 2\] came, \[B,2C,h,w\] are wanted"):
        kl_by_channel(moments[:, :3])
    with pytest.raises(ValueError, match=r"posterior noise \[1, 2, 2, 2\] came, \[2, 2, 2, 2\] is wanted"):
        log_prior_ratio(moments, torch.zeros(1, 2, 2, 2))
    with pytest.raises(ValueError, match=r"log_weights \[3\] came, \[S,B\] with S of 1 or more is wanted"):
        importance_weighted(torch.zeros(3))
    with pytest.raises(ValueError, match="num_samples=4 came, a divisor of the 6 draws is wanted"):
        importance_weighted(torch.zeros(6, 2), 4)
    with pytest.raises(ValueError, match=r"posterior noise \[2, 2, 2, 2\] came, \[S,B,C,h,w\] with S of 1 or more"):
        evidence(x, moments, torch.zeros(2, 2, 2, 2), lambda z: x, lambda x, x_hat: x[:, 0, 0, 0])
    with pytest.raises(ValueError, match=r"a log-likelihood \[2, 3\] came, one per image, \[2\], is wanted"):
        evidence(x, moments, torch.zeros(1, 2, 2, 2, 2), lambda z: x, lambda x, x_hat: x[:, :, 0, 0])
