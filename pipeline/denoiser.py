"""Config → what the network learns and what its output means: the schedule, the objective, diffusers' scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from pipeline.config_diffusion import DiffusionConfig
from pipeline.diffusion import densities
from pipeline.diffusion.edm import Edm, column
from pipeline.diffusion.flow import TIMES, Flow
from pipeline.diffusion.objectives import Ddpm, Objective
from pipeline.diffusion.schedule import PredictionType, Schedule, make_schedule, scheduler_config
from pipeline.diffusion.weightings import weights

SIGMA_DATA = 1.0  # standard deviation of the latents, which are scaled to it
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # EDM's sampler, between these: Karras et al. 2022 table 1
EDM_MEAN = -1.2 + math.log(SIGMA_DATA / 0.5)  # of ln σ: the paper's -1.2 is for data of standard deviation 0.5
EDM_STD = 1.2
TAU_MIN = 1e-3  # a flow's density is taken this far from its two ends

Network = Callable[[Tensor, Tensor], Tensor]  # z [B,C,h,w], time [B] → output [B,C or 2C,h,w]
EpsAt = Callable[[Tensor, float], Tensor]  # z [B,C,h,w], λ → ε [B,C,h,w]


def schedule_of(config: DiffusionConfig) -> Schedule:
    """The schedule of the config, on the CPU."""
    return make_schedule(**config.schedule_arguments)


def objective_of(config: DiffusionConfig, device: torch.device) -> Objective:
    """What training minimises."""
    match config.objective:
        case "ddpm":
            schedule = schedule_of(config)
            table = weights(
                config.weighting,
                schedule,
                config.prediction_type,
                variance_type=config.variance_type,
                min_snr_gamma=config.min_snr_gamma,
                sigmoid_bias=config.sigmoid_bias,
                sigma_data=SIGMA_DATA,
            )
            return Ddpm(
                schedule.to(device),
                config.prediction_type,
                table.to(device),
                density_of(config, schedule),
                config.variance_type,
                config.vlb_weight,
            )
        case "edm":
            return edm_of(config)
        case "flow":
            return Flow(_or(config.noise_mean, 0.0), _or(config.noise_std, 1.0))


def edm_of(config: DiffusionConfig) -> Edm:
    """EDM's noise levels and preconditioning."""
    return Edm(_or(config.noise_mean, EDM_MEAN), _or(config.noise_std, EDM_STD), SIGMA_DATA)


def density_of(config: DiffusionConfig, schedule: Schedule) -> Tensor:
    """How often training draws each t.  float64 [T]."""
    match config.timestep_density:
        case "uniform":
            return densities.uniform(schedule.num_timesteps)
        case "log_normal":
            return densities.log_normal(schedule, _or(config.noise_mean, EDM_MEAN), _or(config.noise_std, EDM_STD))
        case table:
            return densities.from_table(table, schedule.num_timesteps)


def scheduler_of(config: DiffusionConfig) -> Any:
    """The diffusers scheduler that samples what was trained; any other of the same family may take its place."""
    match config.objective:
        case "ddpm":
            return DDIMScheduler(
                **scheduler_config(**config.schedule_arguments, prediction_type=config.prediction_type)
            )
        case "edm":
            return EDMEulerScheduler(
                sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, sigma_data=SIGMA_DATA, prediction_type="epsilon"
            )
        case "flow":
            return FlowMatchEulerDiscreteScheduler()


def eps_at(config: DiffusionConfig, network: Network) -> tuple[EpsAt, float, float]:
    """A trained network as ε(z, λ) of z = α z_0 + σ ε with α² + σ² = 1 and λ = ln α²/σ², whatever its objective was.

    What an objective shows its network is such a z times a number, at a time that λ names: Kingma & Gao 2023, appendix
    on EDM and flow matching.  Gives ε(z [B,C,h,w], λ) → [B,C,h,w], and the largest and smallest λ that it knows: the
    side of the data and that of the noise.
    """
    match config.objective:
        case "ddpm":
            schedule = schedule_of(config)
            known = schedule.log_snr[schedule.log_snr.isfinite()]
            return partial(_eps_of_ddpm, config.prediction_type, schedule, network), float(known[0]), float(known[-1])
        case "edm":
            ends = -2 * math.log(SIGMA_MIN), -2 * math.log(SIGMA_MAX)
            return partial(_eps_of_edm, edm_of(config), network), *ends
        case "flow":
            end = 2 * math.log((1 - TAU_MIN) / TAU_MIN)
            return partial(_eps_of_flow, network), end, -end


def _eps_of_ddpm(
    prediction_type: PredictionType, schedule: Schedule, network: Network, z: Tensor, log_snr: float
) -> Tensor:
    """The network is asked at the time between indices that has this λ."""
    alpha, sigma = _alpha_sigma(log_snr)
    last = schedule.log_snr[-2 if schedule.reaches_zero_snr else -1]
    lam = torch.tensor(log_snr, dtype=torch.float64).maximum(last)  # a solver's own rounding may pass the end
    time = float(schedule.index_at(lam))
    output = network(z, z.new_full((len(z),), time))[:, : z.shape[1]]  # without a learned variance
    match prediction_type:
        case "epsilon":
            return output
        case "v_prediction":
            return sigma * z + alpha * output
        case "sample":
            return (z - alpha * output) / sigma


def _eps_of_edm(edm: Edm, network: Network, z: Tensor, log_snr: float) -> Tensor:
    """ε = (x - D(x; σ̂))/σ̂ with x = z/α = z_0 + σ̂ε, σ̂ = σ/α."""
    alpha, sigma = _alpha_sigma(log_snr)
    x, sigmas = z / alpha, z.new_full((len(z),), sigma / alpha)
    c_in, _, _, c_noise = edm.coefficients(sigmas)
    denoised = edm.denoise(network(column(c_in) * x, c_noise), x, sigmas)
    return (x - denoised) / column(sigmas)


def _eps_of_flow(network: Network, z: Tensor, log_snr: float) -> Tensor:
    """ε = z_τ + (1-τ)(ε - z_0) with z_τ = (1-τ) z/α, τ/(1-τ) = σ/α."""
    alpha, sigma = _alpha_sigma(log_snr)
    tau = sigma / (alpha + sigma)
    z_tau = (1 - tau) * z / alpha
    return z_tau + (1 - tau) * network(z_tau, z.new_full((len(z),), TIMES * tau))


def _alpha_sigma(log_snr: float) -> tuple[float, float]:
    """α = √sigmoid(λ), σ = √sigmoid(-λ)."""
    return (1 + math.exp(-log_snr)) ** -0.5, (1 + math.exp(log_snr)) ** -0.5


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
