"""The bound in pixels where all of it is closed: a linear decoder, Gaussian latents, posteriors exact and not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from pipeline.diffusion.likelihood import discretized_gaussian_nll, gaussian_nll
from vae.likelihood import (
    autoencoder_nll,
    fit_log_variance,
    mean_square_log_variance,
    pixel_bound,
    posterior_entropy,
)
from vae.moments import LatentScale, sample_posterior

# x = W z + b + noise of variance NOISE, z ~ N(PRIOR_MEAN, diag PRIOR_VARIANCE): six pixels, two latents.  The columns
# of W are orthogonal, so that the posterior is diagonal, as an encoder's is.
W = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
W = W * torch.tensor([1.7, 0.6])
OFFSET = torch.linspace(-0.5, 0.3, 6, dtype=torch.float64)
NOISE = 0.09
PRIOR_MEAN = torch.tensor([0.8, -2.0], dtype=torch.float64)
PRIOR_VARIANCE = torch.tensor([2.5, 0.7], dtype=torch.float64)
SCALE = LatentScale(scale=0.37, shift=-0.6)

TRUE = MultivariateNormal(
    W @ PRIOR_MEAN + OFFSET, W @ PRIOR_VARIANCE.diag() @ W.T + NOISE * torch.eye(6, dtype=torch.float64)
)
X = TRUE.mean + torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # [5,6]


def exact_posterior() -> tuple[Tensor, Tensor]:
    """Mean [5,2] and variance [2] of p(z|x)."""
    variance = 1 / (1 / PRIOR_VARIANCE + W.square().sum(dim=0) / NOISE)
    return variance * (PRIOR_MEAN / PRIOR_VARIANCE + (X - OFFSET) @ W / NOISE), variance


def bound_of(mean: Tensor, variance: Tensor) -> Tensor:
    """The bound in nats per pixel, with E_q by Gauss-Hermite: three nodes are exact, for all of it is quadratic."""
    moments = torch.cat([mean, variance.log().expand(5, -1)], dim=1).view(5, 4, 1, 1)
    point, weight = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    weight = weight / weight.sum()
    decoder, latent = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            z = sample_posterior(moments, torch.stack([point[i], point[j]]).view(1, 2, 1, 1).expand(5, -1, -1, -1))
            share = weight[i] * weight[j]
            x_hat = z.flatten(1) @ W.T + OFFSET
            decoder += share * gaussian_nll(X, x_hat, torch.tensor(NOISE, dtype=torch.float64).log()).mean(dim=1)
            # What a diffusion model would say, which sees z_0 and not z.
            z_0 = SCALE.normalise(z.flatten(1))
            of_z_0 = Normal(SCALE.normalise(PRIOR_MEAN), SCALE.scale * PRIOR_VARIANCE.sqrt())
            latent += share * autoencoder_nll(-of_z_0.log_prob(z_0).mean(dim=1), SCALE)
    return pixel_bound(decoder, latent, posterior_entropy(moments), pixels=6, latents=2).total


def test_with_the_exact_posterior_the_bound_is_the_likelihood() -> None:
    torch.testing.assert_close(bound_of(*exact_posterior()), -TRUE.log_prob(X) / 6, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [0.0, 0.1, -0.4])
@pytest.mark.parametrize("widening", [0.3, 1.0, 2.0])
def test_with_another_posterior_it_lies_above_by_the_kl(shift: float, widening: float) -> None:
    mean, variance = exact_posterior()
    found = bound_of(mean + shift, variance * widening) + TRUE.log_prob(X) / 6
    # KL(N(m + s, wv) ‖ N(m, v)) = ½ Σ (w - 1 - ln w + s²/v), over six pixels.
    kl = 0.5 * (widening - 1 - math.log(widening) + shift**2 / variance).sum() / 6
    torch.testing.assert_close(found, kl.expand(5), rtol=1e-11, atol=1e-13)
    assert (found >= -1e-13).all()


def test_the_entropy_is_that_of_the_posterior() -> None:
    moments = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = Normal(moments[:, :2], (0.5 * moments[:, 2:]).exp()).entropy().mean(dim=(1, 2, 3))
    torch.testing.assert_close(posterior_entropy(moments), wanted)
    assert posterior_entropy(moments.float()).dtype == torch.float64


def test_the_density_of_z_is_that_of_z_0_times_the_scale() -> None:
    z = torch.linspace(-12, 12, 2401, dtype=torch.float64)  # 0.01 apart
    nll = autoencoder_nll(gaussian_nll(SCALE.normalise(z), torch.tensor(0.2), torch.tensor(-1.0)), SCALE)
    assert 0.01 * (-nll).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_parts_are_counted_in_elements_of_x() -> None:
    one = torch.tensor([1.0, 2.0])
    found = pixel_bound(one, 3 * one, 5 * one, pixels=12, latents=4)
    torch.testing.assert_close(found.total, (one + 3 * one / 3 - 5 * one / 3).double())
    torch.testing.assert_close(found.total_bits * math.log(2), found.total)


# The decoder's variance ---------------------------------------------------------------------------


def pictures(std: float) -> tuple[Tensor, Tensor]:
    """x_hat, and x at 8-bit levels about it: a Gaussian's own quantiles in place of draws.  [2,3,64,64]."""
    generator = torch.Generator().manual_seed(3)
    x_hat = torch.rand(2, 3, 64, 64, generator=generator, dtype=torch.float64) - 0.5  # far from black and white
    order = torch.randperm(x_hat.numel(), generator=generator)
    error = std * torch.special.ndtri((order + 0.5) / x_hat.numel())
    return x_hat, ((x_hat + error.view_as(x_hat)).add(1).mul(127.5).round() / 127.5 - 1)


@pytest.mark.parametrize("std", [0.06, 0.01, 0.005])  # of eight levels, of about one, of less than one
def test_the_fitted_variance_is_the_least_costly_and_that_of_the_data(std: float) -> None:
    x_hat, x = pictures(std)

    def mean_nll(log_variance: float) -> float:
        return float(discretized_gaussian_nll(x, x_hat, torch.tensor(log_variance, dtype=torch.float64)).mean())

    near = mean_square_log_variance(x_hat, x)
    fitted = fit_log_variance(mean_nll, near)
    assert all(mean_nll(fitted) < mean_nll(fitted + step) for step in (-0.01, 0.01))
    assert mean_nll(fitted) <= mean_nll(near)
    # What was put in, within 4 standard errors of an estimate of ln σ² from so many levels; and the mean square error
    # is that and what rounding adds.
    error = 4 * math.sqrt(2 / x.numel()) * (1 + (1 / 127.5 / std) ** 2)
    assert fitted == pytest.approx(2 * math.log(std), abs=error)
    assert math.exp(near) == pytest.approx(std**2 + (2 / 255) ** 2 / 12, rel=error)


def test_the_mean_square_is_the_most_likely_variance_of_a_density() -> None:
    x_hat, x = pictures(0.02)

    def mean_nll(log_variance: float) -> float:
        return float(gaussian_nll(x, x_hat, torch.tensor(log_variance, dtype=torch.float64)).mean())

    near = mean_square_log_variance(x_hat, x)
    assert fit_log_variance(mean_nll, near + 1.0) == pytest.approx(near, abs=1e-5)


def test_bits_of_levels_are_never_below_zero_and_those_of_a_perfect_decoder_are_none() -> None:
    _, x = pictures(0.02)
    nll = discretized_gaussian_nll(x, x, torch.tensor(-20.0)).mean(dim=(1, 2, 3))
    none = torch.zeros(2)
    assert (pixel_bound(nll, none, none, pixels=3 * 64 * 64, latents=1).total_bits.abs() < 1e-12).all()


# What is refused ----------------------------------------------------------------------------------


def test_bad_arguments_are_refused() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"moments \[2, 3, 1, 1\] came, \[B,2C,h,w\] are wanted"):
        posterior_entropy(torch.zeros(2, 3, 1, 1))
    with pytest.raises(ValueError, match=r"moments \[4, 1, 1\] came"):
        posterior_entropy(torch.zeros(4, 1, 1))
    with pytest.raises(ValueError, match=r"reconstruction \[2\] came, \[3\] is wanted"):
        mean_square_log_variance(one, torch.ones(3))
    with pytest.raises(ValueError, match=r"mean square error of 0\.0 came, a finite number above 0 is wanted"):
        mean_square_log_variance(one, one)
    with pytest.raises(ValueError, match="mean square error of nan came"):
        mean_square_log_variance(one, one * math.nan)
    with pytest.raises(ValueError, match="near = -inf came, a finite ln of a variance is wanted"):
        fit_log_variance(lambda v: v, -math.inf)
    with pytest.raises(ValueError, match=r"shapes \[2\], \[1\] and \[2\] came, one shape \[B\] is wanted"):
        pixel_bound(one, one[:1], one, pixels=3, latents=1)
    with pytest.raises(ValueError, match="pixels=0 and latents=1 came, numbers of at least 1 are wanted"):
        pixel_bound(one, one, one, pixels=0, latents=1)
