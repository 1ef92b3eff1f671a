"""How many nats the data costs under the model: the terms of the variational bound.

All in nats per element (a mean over C, h and w), one number for each sample; divided by ln 2 they are bits/dim.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.diffusion.process import check_shapes, q_posterior, reverse_variance
from pipeline.diffusion.schedule import Schedule

# What L_0 is made of: x, mean, log_variance → -ln p(x) of each element, in nats.
Nll = Callable[[Tensor, Tensor, Tensor], Tensor]


def gaussian_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """KL(N(mean_1, var_1) ‖ N(mean_2, var_2)) of each element, in nats.  Shapes that broadcast; float64."""
    ratio = log_variance_1.double() - log_variance_2.double()
    distance = (mean_1.double() - mean_2.double()).square() * (-log_variance_2.double()).exp()
    return 0.5 * (ratio.expm1() - ratio + distance)  # expm1 keeps the digits where the variances are near


def gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-ln N(x; mean, var) of each element, in nats: a density, so below 0 where it is above 1.  float64."""
    distance = (x.double() - mean.double()).square() * (-log_variance.double()).exp()
    return 0.5 * (math.log(2 * math.pi) + log_variance.double() + distance)


def vlb_term(
    z_0: Tensor,
    z_t: Tensor,
    t: Tensor,
    schedule: Schedule,
    *,
    mean: Tensor,
    log_variance: Tensor,
    nll: Nll = gaussian_nll,
) -> Tensor:
    """The term of L_vlb that t has, given p(z_{t-1} | z_t) = N(mean, exp(log_variance)).  float64 [B], nats/element.

    t ≥ 1 (from 2 on as DDPM counts): L_{t-1} = KL(q(z_{t-1} | z_t, z_0) ‖ p(z_{t-1} | z_t)), DDPM (Ho et al. 2020)
    eq. 5.  t = 0: L_0 = -ln p(z_0 | z_1) by `nll`: a Gaussian density, for latents have no levels to count, or
    `discretized_gaussian_nll` for 8-bit pixels, eq. 13.

    z_0, z_t, mean [B,C,h,w]; t int64 [B]; log_variance [B,C,h,w] or [B,1,1,1].
    """
    check_shapes(t, z_0=z_0, z_t=z_t, mean=mean)
    true_mean, _ = q_posterior(z_0.double(), z_t, t, schedule)
    # At t = 0 β̃ is 0; what stands there instead has no part in the result.
    true_log_variance = reverse_variance("fixed_small", schedule)[t].log().view(-1, 1, 1, 1)
    kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    # Both are computed and one is chosen: a look at t would make the host wait for the device.
    return torch.where((t == 0).view(-1, 1, 1, 1), nll(z_0, mean, log_variance), kl).mean(dim=(1, 2, 3))


def prior_term(z_0: Tensor, schedule: Schedule) -> Tensor:
    """L_T = KL(q(z_T | z_0) ‖ N(0, I)), DDPM (Ho et al. 2020) eq. 5: what is left of z_0.  [B], float64."""
    abar = schedule.alphas_cumprod[-1]
    mean = abar.sqrt() * z_0.double()
    # ½(ᾱ z_0² + (1-ᾱ) - 1 - ln(1-ᾱ))
    return 0.5 * (mean.square() - abar - torch.log1p(-abar)).mean(dim=(1, 2, 3))


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-ln of N(mean, var)'s mass between the two edges of x's level, in nats: DDPM (Ho et al. 2020) eq. 13.

    x floating-point, 8-bit levels k = 0..255 at 2k/255 - 1, in [-1, 1].  A level ends halfway to its neighbours, the
    lowest at -∞ and the highest at +∞, so that the masses of the 256 sum to 1.  mean and log_variance: shapes that
    broadcast with x's.  Float64.  It looks at x, so the host waits for the device.

    Raises ValueError: x not floating-point, or further than a twentieth of a step from every level.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be floating-point, with levels from -1 to 1, got {x.dtype}")
    place = (x.double() + 1) * 127.5  # 0..255
    level = place.round()
    off = ~((place - level).abs() < 0.05) | (level < 0) | (level > 255)  # NaN is off too
    if bool(off.any()):
        raise ValueError(f"x must hold 8-bit levels 2k/255 - 1, k = 0..255, got {x[off].flatten()[0].item()}")
    scale = (-0.5 * log_variance.double()).exp()  # 1/σ
    below = ((level - 0.5) / 127.5 - 1 - mean.double()) * scale
    above = ((level + 0.5) / 127.5 - 1 - mean.double()) * scale
    # Φ(above) - Φ(below) = Φ(-below) - Φ(-above): taken on the side of the lower tail, where Φ keeps its digits.
    turned = above + below > 0
    near, far = torch.where(turned, -below, above), torch.where(turned, -above, below)  # far < near
    log_near = torch.special.log_ndtr(near)
    between = log_near + (-torch.expm1(torch.special.log_ndtr(far) - log_near)).log()  # ln(Φ(near) - Φ(far))
    lowest, highest = torch.special.log_ndtr(above), torch.special.log_ndtr(-below)
    return -torch.where(level == 0, lowest, torch.where(level == 255, highest, between))


class Average(NamedTuple):
    """A mean over samples, with the standard error that the number of them leaves."""

    mean: float
    error: float  # s/√N


def average(values: Tensor) -> Average:
    """Mean and standard error s/√N of one number for each of N independent samples, s² with N - 1.  values [N].

    Raises ValueError: not a vector, or less than two samples, which say nothing about their spread.
    """
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values must be a vector [N] with N at least 2, got shape {list(values.shape)}")
    values = values.double()
    return Average(float(values.mean()), float(values.std() / math.sqrt(len(values))))
