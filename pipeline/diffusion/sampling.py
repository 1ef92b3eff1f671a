"""The reverse steps as plain functions: DDPM's ancestral step and DDIM's, between any two indices.

Everywhere: t and t_prev are Python ints, the same for the whole batch, with t > t_prev ≥ -1; -1 is the clean latent,
before index 0, where ᾱ is 1. z_t, the prediction and the noise are floating-point [B,C,h,w] on the schedule's device.
Arithmetic is float64 and rounded once, at the end, as in `process`.

A chain that skips indices has α = ᾱ_t/ᾱ_prev and β = 1 - α in the place of α_t and β_t: Nichol & Dhariwal 2021
section 4, eq. 19; with t_prev = t-1 they are α_t and β_t.

Every step raises ValueError for t or t_prev out of range, shapes that do not fit, a wanted noise that did not come, an
unknown prediction_type, and for epsilon where ᾱ_t is 0.
"""

from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.process import check_shapes, predict_eps, predict_z_0, result_dtype
from pipeline.diffusion.schedule import PredictionType, Schedule, VarianceType

# How the indices of a shorter chain are chosen, in diffusers' words: Lin et al. 2024 table 2.
Spacing = Literal["leading", "linspace", "trailing"]

# diffusers' floor under β̃, which is 0 in the step onto the clean latent: a logarithm is taken of it.
SMALLEST_VARIANCE = 1e-20


def timesteps_of(spacing: Spacing, num_timesteps: int, num_steps: int, *, steps_offset: int = 0) -> list[int]:
    """The indices that num_steps steps start from, falling, exactly as diffusers' DDPM and DDIM schedulers give them.

    leading: 0, r, 2r, … with r = T // num_steps, each plus steps_offset; begins short of T-1 unless all are visited.
    linspace: num_steps numbers from 0 to T-1 in equal steps, rounded; one step alone is at 0.
    trailing: T, T - T/num_steps, … down to above 0, rounded, each minus 1; begins at T-1.

    steps_offset matters to leading alone. What diffusers gives is given, mended nowhere: leading may begin above T-1
    through steps_offset, and trailing may add a last -1, one entry more than num_steps (T = 1000 in 61 steps: rounding
    leaves a rest above 0). The steps refuse such indices.

    Raises ValueError: num_steps outside [1, num_timesteps], steps_offset below 0, an unknown spacing.
    """
    _check_num_steps(num_timesteps, num_steps)
    if steps_offset < 0:
        raise ValueError(f"steps_offset must be at least 0, got {steps_offset}")
    match spacing:
        case "leading":
            stride = num_timesteps // num_steps
            return [i * stride + steps_offset for i in reversed(range(num_steps))]
        case "linspace":
            even = np.linspace(0, num_timesteps - 1, num_steps)
            return [int(t) for t in np.round(even)[::-1]]
        case "trailing":
            # numpy's own arange: which numbers it rounds to, and whether a last one is left, hangs on its rounding.
            even = np.arange(num_timesteps, 0, -(num_timesteps / num_steps))
            return [int(t) - 1 for t in np.round(even)]
    raise ValueError(f"unknown spacing {spacing!r}: want leading, linspace or trailing")


def previous(t: int, num_timesteps: int, num_steps: int) -> int:
    """Where diffusers' DDIMScheduler steps to from t: t - T // num_steps, and -1 for all that lies before index 0.

    Reproduced, not recommended: it need not be the next of `timesteps_of`. Where num_steps divides T, all is well with
    leading and trailing. Elsewhere a step lands beside the index that the next one starts from, and the next one takes
    the latent to be less noisy or noisier than it is. With trailing the last step may land on an index ≥ 0, and noise
    stays in (372 of the step counts 1…1000 at T = 1000: 6, 7, 11, …), or a timestep -1 follows it (62 others: 61, 103,
    …): 434 end anywhere but before index 0. DDPMScheduler steps to the next of the list: `chain`.

    Raises ValueError: num_steps outside [1, num_timesteps].
    """
    _check_num_steps(num_timesteps, num_steps)
    return max(t - num_timesteps // num_steps, -1)


def chain(timesteps: list[int]) -> list[tuple[int, int]]:
    """(t, t_prev) of each step through falling timesteps and on to the clean latent at -1.

    Raises ValueError: timesteps empty, not falling, or below 0.
    """
    steps = list(pairwise([*timesteps, -1]))
    if not steps or any(t <= t_prev for t, t_prev in steps):
        raise ValueError(f"timesteps must be one at least and fall, none below 0, got {timesteps}")
    return steps


def ancestral_moments(
    prediction: Tensor,
    z_t: Tensor,
    t: int,
    t_prev: int,
    schedule: Schedule,
    *,
    prediction_type: PredictionType,
    variance_type: VarianceType,
) -> tuple[Tensor, Tensor]:
    """Mean [B,C,h,w] and ln σ² of p(z_prev | z_t): DDPM (Ho et al. 2020) eq. 7 and 11, section 3.2.

    ln σ² is [B,C,h,w] for learned_range and [1,1,1,1] otherwise, float64 both where float64 came, else float32.

    fixed_large: σ² = β.  fixed_small: σ² = β̃ = (1-ᾱ_prev)/(1-ᾱ_t)·β.  learned_range: prediction is [B,2C,h,w], C of
    prediction and C of v, and ln σ² lies between ln β̃ at v = -1 and ln β at 1: Nichol & Dhariwal 2021 eq. 15.  β and
    β̃ are the skipping chain's.  At t_prev = -1 β̃ is 0, and `SMALLEST_VARIANCE` stands for it, as in diffusers.
    """
    mean, log_variance = _moments(
        prediction, z_t, t, t_prev, schedule, prediction_type=prediction_type, variance_type=variance_type
    )
    dtype = result_dtype(prediction, z_t)
    return mean.to(dtype), log_variance.to(dtype)


def ancestral_step(
    prediction: Tensor,
    z_t: Tensor,
    t: int,
    t_prev: int,
    schedule: Schedule,
    *,
    prediction_type: PredictionType,
    variance_type: VarianceType,
    noise: Tensor | None,
) -> Tensor:
    """z_prev = μ_θ(z_t, t) + σ·noise, DDPM (Ho et al. 2020) Algorithm 2.  [B,C,h,w].

    The last step, to t_prev = -1, adds no noise and looks at none: noise may be None there. diffusers adds some even
    there, unless t is 0: as good as nothing for fixed_small, all of √(1-ᾱ_t) for fixed_large.

    The rest is as `ancestral_moments` says.
    """
    mean, log_variance = _moments(
        prediction, z_t, t, t_prev, schedule, prediction_type=prediction_type, variance_type=variance_type
    )
    if t_prev == -1:
        return mean.to(result_dtype(prediction, z_t))
    noise = _checked_noise(noise, z_t)
    return (mean + (0.5 * log_variance).exp() * noise).to(result_dtype(prediction, z_t, noise))


def ddim_step(
    prediction: Tensor,
    z_t: Tensor,
    t: int,
    t_prev: int,
    schedule: Schedule,
    *,
    prediction_type: PredictionType,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """z_prev = √ᾱ_prev z_0 + √(1-ᾱ_prev-σ²) ε + σ·noise: DDIM (Song et al. 2021a) eq. 12.  [B,C,h,w].

    σ = eta·√((1-ᾱ_prev)/(1-ᾱ_t))·√(1-ᾱ_t/ᾱ_prev), DDIM eq. 16: eta of 0 is DDIM, deterministic, and 1 the ancestral
    step with fixed_small. σ is 0 in the step to t_prev = -1. noise is wanted only where σ is above 0.

    prediction is [B,C,h,w]: of a network with a learned variance, its first C channels.

    Raises ValueError: eta outside [0, 1], beyond what this module says of every step.
    """
    if not 0 <= eta <= 1:  # also refuses NaN
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    at = _checked_index(z_t, t, t_prev, schedule)
    check_shapes(at, z_t=z_t, prediction=prediction)
    z_0 = predict_z_0(prediction.double(), z_t.double(), at, schedule, prediction_type)  # [B,C,h,w]
    eps = predict_eps(prediction.double(), z_t.double(), at, schedule, prediction_type)  # [B,C,h,w]
    abar_t, abar_prev = _alphas_cumprod(t, t_prev, schedule)
    variance = eta**2 * (1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)
    # Not below 0 but for rounding: at eta = 1 and ᾱ_t near 0, σ² is 1-ᾱ_prev itself.
    towards_z_t = (1 - abar_prev - variance).clamp(min=0).sqrt()
    mean = abar_prev.sqrt() * z_0 + towards_z_t * eps
    if eta == 0 or t_prev == -1:
        return mean.to(result_dtype(prediction, z_t))
    noise = _checked_noise(noise, z_t)
    return (mean + variance.sqrt() * noise).to(result_dtype(prediction, z_t, noise))


def _moments(
    output: Tensor,
    z_t: Tensor,
    t: int,
    t_prev: int,
    schedule: Schedule,
    *,
    prediction_type: PredictionType,
    variance_type: VarianceType,
) -> tuple[Tensor, Tensor]:
    """`ancestral_moments` in float64, whatever came."""
    at = _checked_index(z_t, t, t_prev, schedule)
    prediction, share = _prediction_and_share(output, z_t, variance_type)
    check_shapes(at, z_t=z_t, prediction=prediction)
    z_0 = predict_z_0(prediction.double(), z_t.double(), at, schedule, prediction_type)  # [B,C,h,w]
    abar_t, abar_prev = _alphas_cumprod(t, t_prev, schedule)
    alpha = abar_t / abar_prev
    beta = 1 - alpha
    # μ̃ = √ᾱ_prev β / (1-ᾱ_t) z_0 + √α (1-ᾱ_prev) / (1-ᾱ_t) z_t,   β̃ = (1-ᾱ_prev) / (1-ᾱ_t) β
    mean = (abar_prev.sqrt() * beta * z_0 + alpha.sqrt() * (1 - abar_prev) * z_t) / (1 - abar_t)
    smallest = ((1 - abar_prev) / (1 - abar_t) * beta).clamp(min=SMALLEST_VARIANCE)
    return mean, share * beta.log() + (1 - share) * smallest.log()


def _checked_index(z_t: Tensor, t: int, t_prev: int, schedule: Schedule) -> Tensor:
    """t as an int64 [B] on z_t's device, or ValueError for indices that no step has."""
    if not 0 <= t < schedule.num_timesteps:
        raise ValueError(f"t must lie in [0, {schedule.num_timesteps}), got {t}")
    if not -1 <= t_prev < t:
        raise ValueError(f"t_prev must lie in [-1, {t}), below t, got {t_prev}")
    return torch.full(z_t.shape[:1], t, dtype=torch.int64, device=z_t.device)


def _prediction_and_share(output: Tensor, z_t: Tensor, variance_type: VarianceType) -> tuple[Tensor, float | Tensor]:
    """The prediction [B,C,h,w], and the share of ln β in ln σ², the rest of which is ln β̃: a number or [B,C,h,w]."""
    match variance_type:
        case "fixed_large":
            return output, 1.0
        case "fixed_small":
            return output, 0.0
        case "learned_range":
            wanted = [z_t.shape[0], 2 * z_t.shape[1], *z_t.shape[2:]]
            if list(output.shape) != wanted:
                raise ValueError(f"learned_range wants a prediction of shape {wanted}, got {list(output.shape)}")
            prediction, v = output.chunk(2, dim=1)
            return prediction, (v.double() + 1) / 2
    raise ValueError(f"unknown variance_type {variance_type!r}: want fixed_large, fixed_small or learned_range")


def _checked_noise(noise: Tensor | None, z_t: Tensor) -> Tensor:
    if noise is None:
        raise ValueError("noise must come for a step that adds some: eta above 0 or ancestral, t_prev at least 0")
    if noise.shape != z_t.shape or not noise.is_floating_point():
        came = f"{noise.dtype} of shape {list(noise.shape)}"
        raise ValueError(f"noise must be floating-point and of z_t's shape {list(z_t.shape)}, got {came}")
    return noise


def _alphas_cumprod(t: int, t_prev: int, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """ᾱ_t and ᾱ_prev, the latter 1 before index 0.  float64 [1,1,1,1]."""
    abar_t = schedule.alphas_cumprod[t]
    abar_prev = schedule.alphas_cumprod[t_prev] if t_prev >= 0 else torch.ones_like(abar_t)
    return abar_t.view(1, 1, 1, 1), abar_prev.view(1, 1, 1, 1)


def _check_num_steps(num_timesteps: int, num_steps: int) -> None:
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps must lie in [1, {num_timesteps}], got {num_steps}")
