"""How much each noise level counts: every weighting of the loss as a function w(λ) of the log-SNR λ.

Kingma & Gao 2023 ("Understanding diffusion objectives as the ELBO with simple data augmentation"): all
objectives of diffusion are L_w = ½ ∫ w(λ) ‖ε - ε_θ‖² dλ, and differ in w alone.  Papers state their weights for ε, for
z_0 or for v; an error in one is an error in the others times a power of the SNR:

    ‖ε - ε_θ‖² = SNR · ‖z_0 - z_θ‖²          ‖v - v_θ‖² = (SNR + 1) · ‖z_0 - z_θ‖²

so here each is written once, for z_0, as ln of the weight, and `weights` turns it into a table over t for what the
network predicts.  Logarithms, because at a zero terminal SNR λ is -∞, where a ratio would be 0/0.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.diffusion.process import reverse_variance
from pipeline.diffusion.schedule import PredictionType, Schedule, VarianceType

Weighting = Literal["unweighted", "simple", "snr_plus_one", "truncated_snr", "min_snr", "sigmoid", "edm", "elbo", "vlb"]


def weights(
    weighting: Weighting,
    schedule: Schedule,
    prediction_type: PredictionType,
    *,
    variance_type: VarianceType = "fixed_large",
    min_snr_gamma: float = 5.0,
    sigmoid_bias: float = 0.0,
    sigma_data: float = 1.0,
) -> Tensor:
    """What multiplies ‖target - prediction‖² at each t, for t uniform on 0..T-1.  float64 [T].

    unweighted     1 on the error of whatever is predicted: `simple` for ε, `snr_plus_one` for v.
    simple         ‖ε - ε_θ‖², L_simple: DDPM (Ho et al. 2020) eq. 14.
    snr_plus_one   ‖v - v_θ‖²: Salimans & Ho 2022 section 4.
    truncated_snr  max(SNR, 1) ‖z_0 - z_θ‖²: Salimans & Ho 2022 section 4.
    min_snr        min(SNR, min_snr_gamma) ‖z_0 - z_θ‖²: Hang et al. 2023, min-SNR-γ.
    sigmoid        w(λ) = sigmoid(sigmoid_bias - λ): Kingma & Gao 2023.
    edm            w(λ) = 2 N(λ; 2.4, 2.4²) (e^{-λ} + σ_d²)/σ_d²: Karras et al. 2022 table 1, as a function of λ.
    elbo           w(λ) = 1, the continuous-time bound: VDM (Kingma et al. 2021) section 5, in nats.
    vlb            L_vlb with σ_t² of variance_type, each term in nats: DDPM eq. 12 for t ≥ 1 (2 as DDPM counts),
                   eq. 13 with a Gaussian at t = 0; without its variance constant, which has no gradient.

    The last four are estimates of a whole bound: their mean over t is it, so T is a factor in them.  λ'(t) is taken as
    the step of the SNR from t to t-1, which makes `elbo` the discrete bound with σ_t² = β̃_t for t ≥ 1; SNR_{-1} goes
    on as the line of λ through 0 and 1.

    Raises ValueError: unknown names, min_snr_gamma or sigma_data not above 0, sigmoid_bias not finite, epsilon where
    ᾱ_t is 0, learned_range under vlb, and for sigmoid, edm and elbo fewer than two t with a finite λ.
    """
    if weighting not in get_args(Weighting):
        raise ValueError(f"unknown weighting {weighting!r}: want {', '.join(get_args(Weighting))}")
    if prediction_type not in get_args(PredictionType):
        raise ValueError(f"unknown prediction_type {prediction_type!r}: want {', '.join(get_args(PredictionType))}")
    if prediction_type == "epsilon" and schedule.reaches_zero_snr:
        raise ValueError("epsilon says nothing about z_0 where alphas_cumprod is 0: predict v or z_0 there")
    if not (min_snr_gamma > 0 and sigma_data > 0):  # also refuses NaN
        raise ValueError(f"min_snr_gamma={min_snr_gamma} and sigma_data={sigma_data} came, numbers above 0 were wanted")
    if not math.isfinite(sigmoid_bias):
        raise ValueError(f"sigmoid_bias={sigmoid_bias} came, a finite number was wanted")
    lam = schedule.log_snr  # [T]
    match weighting:
        case "unweighted":
            return torch.ones_like(lam)
        case "simple":
            log_w = lam
        case "snr_plus_one":
            log_w = _softplus(lam)  # ln(SNR + 1)
        case "truncated_snr":
            log_w = lam.clamp(min=0)
        case "min_snr":
            log_w = lam.clamp(max=math.log(min_snr_gamma))
        case "sigmoid":
            log_w = logsigmoid(sigmoid_bias - lam) + _log_half_step(schedule)
        case "edm":
            # 2 N(λ; 2.4, 2.4²) (e^{-λ} + σ_d²)/σ_d²: ln σ = -λ/2 is normal with mean -1.2 and deviation 1.2.
            log_density = -0.5 * ((lam - 2.4) / 2.4).square() - math.log(2.4 * math.sqrt(2 * math.pi))
            log_scale = _softplus(-lam - 2 * math.log(sigma_data))  # ln((e^{-λ} + σ_d²)/σ_d²)
            # At λ = -∞ the density's fall wins over the scale's rise: -∞ + ∞ means weight 0.
            log_w = math.log(2) + (log_density + log_scale).nan_to_num(nan=-math.inf) + _log_half_step(schedule)
        case "elbo":
            log_w = _log_half_step(schedule)
        case "vlb":
            # ω_t ‖ε-ε_θ‖², ω_t = β_t²/(2σ_t²α_t(1-ᾱ_t)), is β_t² ᾱ_{t-1}/(2σ_t²(1-ᾱ_t)²) ‖z_0-z_θ‖²; at t = 0 that is
            # 1/(2σ_0²), the Gaussian's.
            beta, abar, abar_prev = schedule.betas, schedule.alphas_cumprod, schedule.alphas_cumprod_prev
            variance = reverse_variance(variance_type, schedule)
            log_w = (schedule.num_timesteps * beta.square() * abar_prev / (2 * variance * (1 - abar).square())).log()
    match prediction_type:
        case "epsilon":
            log_w = log_w - lam
        case "v_prediction":
            log_w = log_w - _softplus(lam)
        case "sample":
            pass
    return log_w.exp()


def _softplus(x: Tensor) -> Tensor:
    """ln(e^x + 1), to the last digits: torch's softplus gives x itself from 20 on, 2e-9 too little."""
    return -logsigmoid(-x)


def _log_half_step(schedule: Schedule) -> Tensor:
    """ln ½T (SNR_{t-1} - SNR_t), float64 [T]: ½ ∫ w(λ) ‖ε-ε_θ‖² dλ = ½ ∫ w ‖z_0-z_θ‖² dSNR, as dSNR = SNR dλ."""
    snr = schedule.snr
    before = torch.tensor(-1.0, dtype=torch.float64, device=snr.device)
    first = schedule.log_snr_at(before).exp()
    return (0.5 * schedule.num_timesteps * (torch.cat([first[None], snr[:-1]]) - snr)).log()
