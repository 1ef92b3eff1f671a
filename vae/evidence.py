"""How likely an image is under the autoencoder alone, its prior being N(0, I): the ELBO, and tighter bounds by weights.

    ln p(x) ≥ E[ln 1/K Σ_k p(x, z_k) / q(z_k|x)] ≥ E_q[ln p(x|z)] - KL(q(z|x) ‖ N(0, I)),  z_k ~ q(z|x)

On the left IWAE_K, Burda et al. 2016 eq. 8; on the right the ELBO, Kingma & Welling 2014 eq. 3.  In nats per image,
float64.  Nothing is drawn here.  With a diffusion model for the prior: `vae.likelihood`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vae.losses import kl_of_elements
from vae.moments import sample_posterior


def gaussian_log_likelihood(x: Tensor, x_hat: Tensor, log_variance: Tensor) -> Tensor:
    """ln N(x; x_hat, exp(log_variance)), a density: Kingma & Welling 2014, appendix C.2, with a variance apart.

    x, x_hat [B,3,H,W]; log_variance: ln σ², of a shape that broadcasts to theirs: one number, [3,1,1], or one for each
    element; fitted (`vae.likelihood.mean_square_log_variance`) or learned, for the gradient reaches it.
    → float64 [B], nats per image.  Raises ValueError: shapes that differ, or a log_variance that doesn't broadcast.
    """
    if x_hat.shape != x.shape:
        raise ValueError(f"reconstruction {list(x_hat.shape)} came, {list(x.shape)} is wanted")
    ln_variance = log_variance.double()
    try:
        ln_variance = ln_variance.expand(x.shape)
    except RuntimeError:
        came = list(log_variance.shape)
        raise ValueError(f"log_variance {came} came, a shape that broadcasts to {list(x.shape)} is wanted") from None
    square = (x.double() - x_hat.double()).square()
    return -0.5 * (math.log(2 * math.pi) + ln_variance + square * (-ln_variance).exp()).sum(dim=(1, 2, 3))


def kl_by_channel(moments: Tensor) -> Tensor:
    """KL(q(z|x) ‖ N(0, I)) of each latent channel: which of them say something of the image.

    moments [B,2C,h,w], mean ‖ logvar → float64 [B,C], nats per image; their sum is `vae.losses.kl_divergence`.
    Raises ValueError: moments not [B,2C,h,w].
    """
    _check_moments(moments)
    return kl_of_elements(moments.double()).sum(dim=(2, 3))


def log_prior_ratio(moments: Tensor, noise: Tensor) -> Tensor:
    """ln p(z) - ln q(z|x) at z = mean + std · noise, p = N(0, I): its mean over draws is minus the KL.

    moments [B,2C,h,w]; noise [B,C,h,w] from N(0, I) → float64 [B], nats per image.
    Raises ValueError: other shapes.
    """
    _check_moments(moments)
    z = sample_posterior(moments.double(), noise.double())
    _, logvar = moments.double().chunk(2, dim=1)
    # (z - mean)² / variance is noise², and both have the ½ ln 2π.
    return 0.5 * (noise.double().square() + logvar - z.square()).sum(dim=(1, 2, 3))


def importance_weighted(log_weights: Tensor, num_samples: int | None = None) -> Tensor:
    """IWAE_K = ln 1/K Σ_k w_k: Burda et al. 2016 eq. 8.  Its expectation rises with K, to ln p(x): their theorem 1.

    log_weights [S,B]: ln w = ln p(x, z) - ln q(z|x) of S draws.  num_samples: K, a divisor of S; the mean over the S/K
    groups of K draws that follow one another.  None: K = S; 1: the ELBO, its KL by the same draws.
    → float64 [B], nats per image.  Raises ValueError: log_weights not [S,B] with S ≥ 1, K no divisor of S.
    """
    if log_weights.ndim != 2 or len(log_weights) == 0:
        raise ValueError(f"log_weights {list(log_weights.shape)} came, [S,B] with S of 1 or more is wanted")
    in_all = len(log_weights)
    num = in_all if num_samples is None else num_samples
    if num < 1 or in_all % num:
        raise ValueError(f"num_samples={num} came, a divisor of the {in_all} draws is wanted")
    groups = log_weights.double().unflatten(0, (in_all // num, num))  # [S/K,K,B]
    return (groups.logsumexp(dim=1) - math.log(num)).mean(dim=0)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What S posterior draws say of ln p(x).  Float64, nats per image."""

    log_likelihood: Tensor  # [S,B], ln p(x|z)
    log_prior_ratio: Tensor  # [S,B], ln p(z) - ln q(z|x)
    kl_by_channel: Tensor  # [B,C], closed form

    @property
    def elbo(self) -> Tensor:
        """E_q[ln p(x|z)] - KL, the KL in closed form: Kingma & Welling 2014 eq. 10.  [B]."""
        return self.log_likelihood.mean(dim=0) - self.kl_by_channel.sum(dim=1)

    @property
    def log_weights(self) -> Tensor:
        """ln p(x, z) - ln q(z|x).  [S,B]."""
        return self.log_likelihood + self.log_prior_ratio

    def iwae(self, num_samples: int | None = None) -> Tensor:
        """IWAE_K of these draws: `importance_weighted`.  [B]."""
        return importance_weighted(self.log_weights, num_samples)


def evidence(
    x: Tensor,
    moments: Tensor,
    noise: Tensor,
    decode: Callable[[Tensor], Tensor],
    log_likelihood: Callable[[Tensor, Tensor], Tensor],
) -> Evidence:
    """The bounds of each image, by draws whose noise is given; gradients reach all that made moments and x_hat.

    x [B,3,H,W]; moments [B,2C,h,w] of its posterior (`vae.moments.encode_moments`); noise [S,B,C,h,w] from N(0, I).
    decode: z [B,C,h,w], of moments' dtype → x_hat [B,3,H,W], called S times.  log_likelihood: (x, x_hat) → [B] nats per
    image: `gaussian_log_likelihood`, or minus the sum of a discretized one over an image, and then it bounds ln P(x).

    Raises ValueError: moments or noise of other shapes, no draws, a log_likelihood not [B].
    """
    _check_moments(moments)
    if noise.ndim != 5 or len(noise) == 0:
        raise ValueError(f"posterior noise {list(noise.shape)} came, [S,B,C,h,w] with S of 1 or more is wanted")
    likelihoods: list[Tensor] = []
    for eps in noise:
        found = log_likelihood(x, decode(sample_posterior(moments, eps.to(moments.dtype))))
        if found.shape != (len(x),):
            raise ValueError(f"a log-likelihood {list(found.shape)} came, one per image, [{len(x)}], is wanted")
        likelihoods.append(found.double())
    ratios = [log_prior_ratio(moments, eps) for eps in noise]
    return Evidence(torch.stack(likelihoods), torch.stack(ratios), kl_by_channel(moments))


def _check_moments(moments: Tensor) -> None:
    if moments.ndim != 4 or moments.shape[1] % 2:
        raise ValueError(f"moments {list(moments.shape)} came, [B,2C,h,w] are wanted")
