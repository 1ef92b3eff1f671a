"""The closed form of the KL against other people's and against chance; the pixel errors against their words."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as kl_of_distributions

from vae.losses import kl_divergence, reconstruction_loss
from vae.moments import sample_posterior

MOMENTS = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_kl_is_the_closed_form() -> None:
    mean, logvar = MOMENTS.chunk(2, dim=1)
    wanted = kl_of_distributions(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(kl_divergence(MOMENTS), wanted, rtol=1e-12)
    assert torch.allclose(kl_divergence(MOMENTS.float()).double(), wanted, rtol=1e-6)


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
