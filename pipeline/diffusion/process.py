"""The forward process q, its posterior, and the conversions between ε, v, the score, μ and z_0.

Everywhere: z_0, z_t, eps, v and predictions are floating-point [B,C,h,w]; t is int64 [B] with values in
[0, T); all on the schedule's device. Arithmetic is float64 and rounded once, at the end: the result is
float32 for float32, bfloat16 and float16 inputs, float64 where any input is float64. In bfloat16 √ᾱ_0 is 1:
the first timesteps would change nothing; so a narrow input does not make a narrow result.

Every function raises ValueError where t is not int64 or the shapes do not fit, and on the CPU where t is out of
range. On a GPU none looks at the *values* of t: the host would wait for all the work queued before, in every training
step, and -1 would mean T-1, as any Python index. Make t on the CPU and call `check_timesteps` there.
"""

import torch
from torch import Tensor

from pipeline.diffusion.schedule import PredictionType, Schedule, VarianceType


def check_timesteps(t: Tensor, schedule: Schedule) -> None:
    """Raises ValueError unless t is int64 [B] with every value in [0, T).  Call it with t on the CPU."""
    if t.dtype != torch.int64 or t.ndim != 1:
        raise ValueError(f"t must be an int64 vector [B], got {t.dtype} of shape {list(t.shape)}")
    _refuse_outside(t, schedule.num_timesteps)


def check_shapes(t: Tensor, **latents: Tensor) -> None:
    """Raises ValueError unless the latents are floating-point, of one shape [B,C,h,w], and t is int64 [B].

    Reads only dtypes and shapes, so no GPU is waited for. The keywords are the names that the message uses.
    """
    first, *others = latents
    shape = latents[first].shape
    if len(shape) != 4:
        raise ValueError(f"{first} must be [B,C,h,w], got shape {list(shape)}")
    for name in others:
        if latents[name].shape != shape:
            came = list(latents[name].shape)
            raise ValueError(f"{name} must have {first}'s shape {list(shape)}, got {came}")
    for name, latent in latents.items():
        if not latent.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {latent.dtype}")
    if t.dtype != torch.int64:
        raise ValueError(f"t must be int64, got {t.dtype}")
    if t.shape != shape[:1]:
        raise ValueError(f"t must be [B] with B = {shape[0]} as in {first}, got shape {list(t.shape)}")


def result_dtype(*latents: Tensor) -> torch.dtype:
    """float64 where any of the latents is float64, float32 otherwise."""
    return torch.float64 if any(latent.dtype == torch.float64 for latent in latents) else torch.float32


def q_sample(z_0: Tensor, t: Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """z_t = √ᾱ_t z_0 + √(1-ᾱ_t) ε, a draw from q(z_t | z_0): DDPM (Ho et al. 2020) eq. 4.  [B,C,h,w]."""
    check_shapes(t, z_0=z_0, eps=eps)
    signal, noise = _signal_and_noise(t, schedule)
    return (signal * z_0 + noise * eps).to(result_dtype(z_0, eps))


def q_step(z_prev: Tensor, t: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """z_t = √(1-β_t) z_{t-1} + √β_t·noise, a draw from q(z_t | z_{t-1}): DDPM (Ho et al. 2020) eq. 2.  [B,C,h,w]."""
    check_shapes(t, z_prev=z_prev, noise=noise)
    beta_t = _at(schedule.betas, t)
    return ((1 - beta_t).sqrt() * z_prev + beta_t.sqrt() * noise).to(result_dtype(z_prev, noise))


def q_posterior(z_0: Tensor, z_t: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Mean [B,C,h,w] and variance β̃_t [B,1,1,1] of q(z_{t-1} | z_t, z_0): DDPM (Ho et al. 2020) eq. 6 and 7.

    At t = 0 it is the clean latent itself: mean z_0, variance 0. Both have the result dtype.
    """
    check_shapes(t, z_0=z_0, z_t=z_t)
    beta_t = _at(schedule.betas, t)
    abar_t, abar_prev = _at(schedule.alphas_cumprod, t), _at(schedule.alphas_cumprod_prev, t)
    # μ̃_t = √ᾱ_{t-1} β_t / (1-ᾱ_t) z_0 + √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t) z_t,   β̃_t = (1-ᾱ_{t-1}) / (1-ᾱ_t) β_t
    mean = (abar_prev.sqrt() * beta_t * z_0 + (1 - beta_t).sqrt() * (1 - abar_prev) * z_t) / (1 - abar_t)
    variance = (1 - abar_prev) / (1 - abar_t) * beta_t
    dtype = result_dtype(z_0, z_t)
    return mean.to(dtype), variance.to(dtype)


def z_0_from_mean(mean: Tensor, z_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """The z_0 whose posterior mean μ̃_t(z_t, z_0) is `mean`: DDPM (Ho et al. 2020) eq. 7 solved for z_0.  [B,C,h,w]."""
    check_shapes(t, mean=mean, z_t=z_t)
    beta_t = _at(schedule.betas, t)
    abar_t, abar_prev = _at(schedule.alphas_cumprod, t), _at(schedule.alphas_cumprod_prev, t)
    z_0 = ((1 - abar_t) * mean - (1 - beta_t).sqrt() * (1 - abar_prev) * z_t) / (abar_prev.sqrt() * beta_t)
    return z_0.to(result_dtype(mean, z_t))


def z_0_from_eps(eps: Tensor, z_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """z_0 = (z_t - √(1-ᾱ_t) ε) / √ᾱ_t, DDPM (Ho et al. 2020) eq. 4 solved for z_0.  [B,C,h,w].

    Raises ValueError where ᾱ_t is 0: z_t is then ε itself and says nothing about z_0.
    """
    check_shapes(t, eps=eps, z_t=z_t)
    # Looking at ᾱ_t waits for the GPU, so only the schedules that hold a zero pay for it.
    if schedule.reaches_zero_snr and bool((_at(schedule.alphas_cumprod, t) == 0).any()):
        raise ValueError("eps does not determine z_0 where alphas_cumprod is 0: predict v or z_0 there")
    signal, noise = _signal_and_noise(t, schedule)
    return ((z_t - noise * eps) / signal).to(result_dtype(eps, z_t))


def eps_from_z_0(z_0: Tensor, z_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """ε = (z_t - √ᾱ_t z_0) / √(1-ᾱ_t), DDPM (Ho et al. 2020) eq. 4 solved for ε.  [B,C,h,w]."""
    check_shapes(t, z_0=z_0, z_t=z_t)
    signal, noise = _signal_and_noise(t, schedule)
    return ((z_t - signal * z_0) / noise).to(result_dtype(z_0, z_t))


def v_from(z_0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """v = √ᾱ_t ε - √(1-ᾱ_t) z_0: Salimans & Ho 2022, section 4 and appendix D.  [B,C,h,w]."""
    check_shapes(t, z_0=z_0, eps=eps)
    signal, noise = _signal_and_noise(t, schedule)
    return (signal * eps - noise * z_0).to(result_dtype(z_0, eps))


def z_0_from_v(v: Tensor, z_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """z_0 = √ᾱ_t z_t - √(1-ᾱ_t) v: Salimans & Ho 2022, section 4 and appendix D.  [B,C,h,w]."""
    check_shapes(t, v=v, z_t=z_t)
    signal, noise = _signal_and_noise(t, schedule)
    return (signal * z_t - noise * v).to(result_dtype(v, z_t))


def eps_from_v(v: Tensor, z_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """ε = √(1-ᾱ_t) z_t + √ᾱ_t v: Salimans & Ho 2022, appendix D.  [B,C,h,w]."""
    check_shapes(t, v=v, z_t=z_t)
    signal, noise = _signal_and_noise(t, schedule)
    return (noise * z_t + signal * v).to(result_dtype(v, z_t))


def score_from_eps(eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """∇ ln q(z_t) = -ε/√(1-ᾱ_t), for ε the mean of the noise given z_t: Song et al. 2021 (score SDE) section 3.

    [B,C,h,w].  For the noise ε itself it is ∇ ln q(z_t | z_0), which denoising score matching has as its target:
    Vincent 2011.
    """
    check_shapes(t, eps=eps)
    _, noise = _signal_and_noise(t, schedule)
    return (-eps / noise).to(result_dtype(eps))


def eps_from_score(score: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """ε = -√(1-ᾱ_t) ∇ ln q(z_t): `score_from_eps` turned round.  [B,C,h,w]."""
    check_shapes(t, score=score)
    _, noise = _signal_and_noise(t, schedule)
    return (-noise * score).to(result_dtype(score))


def predict_z_0(
    prediction: Tensor, z_t: Tensor, t: Tensor, schedule: Schedule, prediction_type: PredictionType
) -> Tensor:
    """The z_0 that a network means when it says `prediction` about z_t.  [B,C,h,w].

    Raises ValueError: for an unknown prediction_type, and as `z_0_from_eps`.
    """
    match prediction_type:
        case "epsilon":
            return z_0_from_eps(prediction, z_t, t, schedule)
        case "v_prediction":
            return z_0_from_v(prediction, z_t, t, schedule)
        case "sample":
            check_shapes(t, prediction=prediction, z_t=z_t)
            return prediction.to(result_dtype(prediction, z_t))
    raise ValueError(f"unknown prediction_type {prediction_type!r}: want epsilon, v_prediction or sample")


def predict_eps(
    prediction: Tensor, z_t: Tensor, t: Tensor, schedule: Schedule, prediction_type: PredictionType
) -> Tensor:
    """The ε that a network means when it says `prediction` about z_t.  [B,C,h,w].

    Where ᾱ_t is 0, z_t is all noise and ε is z_t itself, whatever v or z_0 is predicted.

    Raises ValueError: for an unknown prediction_type.
    """
    match prediction_type:
        case "epsilon":
            check_shapes(t, prediction=prediction, z_t=z_t)
            return prediction.to(result_dtype(prediction, z_t))
        case "v_prediction":
            return eps_from_v(prediction, z_t, t, schedule)
        case "sample":
            return eps_from_z_0(prediction, z_t, t, schedule)
    raise ValueError(f"unknown prediction_type {prediction_type!r}: want epsilon, v_prediction or sample")


def reverse_variance(variance_type: VarianceType, schedule: Schedule) -> Tensor:
    """σ_t² of p(z_{t-1} | z_t) where it is fixed: DDPM (Ho et al. 2020) section 3.2.  float64 [T].

    fixed_large: β_t.  fixed_small: β̃_t, with β̃_1 in the place of β̃_0 = 0, which has no density: Nichol & Dhariwal
    2021 do the same (T = 1 has no β̃_1, and gets β_0).

    Raises ValueError: learned_range, which only a network's output fixes, and unknown types.
    """
    match variance_type:
        case "fixed_large":
            return schedule.betas
        case "fixed_small":
            abar, abar_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
            variance = (1 - abar_prev) / (1 - abar) * schedule.betas
            return torch.cat([variance[1:2] if len(variance) > 1 else schedule.betas[:1], variance[1:]])
        case "learned_range":
            raise ValueError(
                "learned_range has no fixed variance: split the network's output with `learned_log_variance`"
            )
    raise ValueError(f"unknown variance_type {variance_type!r}: want fixed_large, fixed_small or learned_range")


def learned_log_variance(output: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """A network's 2C channels → its prediction and ln σ_t², both [B,C,h,w]: Nichol & Dhariwal 2021 eq. 15.

    output [B,2C,h,w], prediction ‖ v; v of -1 means β̃_t, +1 means β_t, and ln σ² lies between in proportion (outside,
    where v does).

    Raises ValueError: an odd number of channels.
    """
    check_shapes(t, output=output)
    if output.shape[1] % 2:
        raise ValueError(
            f"a learned variance wants 2C output channels, prediction and variance, got {output.shape[1]}: "
            "the U-Net was built for another variance_type"
        )
    prediction, v = output.chunk(2, dim=1)
    smallest = _at(reverse_variance("fixed_small", schedule).log(), t)
    largest = _at(schedule.betas.log(), t)
    share = (v.double() + 1) / 2  # [B,C,h,w]
    log_variance = share * largest + (1 - share) * smallest
    return prediction, log_variance.to(result_dtype(output))


def p_mean(prediction: Tensor, z_t: Tensor, t: Tensor, schedule: Schedule, prediction_type: PredictionType) -> Tensor:
    """μ_θ(z_t, t) of p(z_{t-1} | z_t): μ̃_t with the z_0 that the network means, DDPM (Ho et al. 2020) eq. 11.

    [B,C,h,w].  Raises ValueError as `predict_z_0`.
    """
    check_shapes(t, prediction=prediction, z_t=z_t)
    z_0 = predict_z_0(prediction.double(), z_t, t, schedule, prediction_type)  # float64, to be rounded once
    mean, _ = q_posterior(z_0, z_t, t, schedule)
    return mean.to(result_dtype(prediction, z_t))


def _signal_and_noise(t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """√ᾱ_t and √(1-ᾱ_t), the two sides of a right triangle with hypotenuse 1.  float64 [B,1,1,1]."""
    abar_t = _at(schedule.alphas_cumprod, t)
    return abar_t.sqrt(), (1 - abar_t).sqrt()


def _at(table: Tensor, t: Tensor) -> Tensor:
    """table [T] at t [B], shaped to multiply a latent.  float64 [B,1,1,1]."""
    if t.device.type == "cpu":
        _refuse_outside(t, len(table))
    return table[t].view(-1, 1, 1, 1)


def _refuse_outside(t: Tensor, num_timesteps: int) -> None:
    outside = t[(t < 0) | (t >= num_timesteps)]
    if outside.numel() > 0:
        raise ValueError(f"t must lie in [0, {num_timesteps}), got {outside[0].item()}")
