"""Every objective's network is the same denoiser: it says the right ε at any λ, and diffusers samples it right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from pipeline.config_diffusion import DiffusionConfig
from pipeline.denoiser import Network, density_of, eps_at, objective_of, schedule_of, scheduler_of
from pipeline.diffusion.edm import Edm
from pipeline.diffusion.flow import Flow
from pipeline.diffusion.objectives import Ddpm

MEAN, STD = 0.7, 0.6  # of the data, N(MEAN, STD²)

CONFIGS = {
    "epsilon": {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "v_prediction": {"prediction_type": "v_prediction", "zero_terminal_snr": True},
    "sample": {"prediction_type": "sample", "schedule": "cosine", "resolution_shift": 2.0},
    "learned": {"variance_type": "learned_range"},
    "edm": {"objective": "edm"},
    "flow": {"objective": "flow"},
}
every_objective = pytest.mark.parametrize("name", CONFIGS)


def config_of(name: str) -> DiffusionConfig:
    return DiffusionConfig.model_validate(CONFIGS[name])


def best_z_0(x: Tensor, sigma: Tensor | float) -> Tensor:
    """E[z_0 | z_0 + σ ε = x] for data N(MEAN, STD²): the two variances' weighted mean."""
    noise = torch.as_tensor(sigma, dtype=torch.float64) ** 2
    return (STD**2 * x + noise * MEAN) / (STD**2 + noise)


def optimal_network(config: DiffusionConfig) -> Network:
    """What a network that was trained to the end says, written from each objective's definition alone."""

    def of_edm(z: Tensor, time: Tensor) -> Tensor:
        sigma = (4 * time).exp().view(-1, 1, 1, 1)
        x = z * (sigma**2 + 1).sqrt()
        return (best_z_0(x, sigma) - x / (sigma**2 + 1)) * (sigma**2 + 1).sqrt() / sigma

    def of_flow(z: Tensor, time: Tensor) -> Tensor:
        tau = (time / 1000).view(-1, 1, 1, 1)
        z_0 = torch.where(tau == 1, torch.full_like(z, MEAN), best_z_0(z / (1 - tau), tau / (1 - tau)))
        return (z - z_0) / tau  # ε - z_0

    table = schedule_of(config).alphas_cumprod

    def of_ddpm(z: Tensor, time: Tensor) -> Tensor:
        # linear in λ between the indices, as the network is asked between them
        low = time.double().floor().long().clamp(max=len(table) - 2)
        lam = torch.logit(table)
        between = torch.where(time == low, lam[low], lam[low] + (time.double() - low) * (lam[low + 1] - lam[low]))
        abar = torch.sigmoid(between).view(-1, 1, 1, 1)
        prior = abar == 0
        z_0 = best_z_0(z / abar.clamp(min=1e-30).sqrt(), ((1 - abar) / abar.clamp(min=1e-30)).sqrt())
        z_0 = torch.where(prior, torch.full_like(z_0, MEAN), z_0)
        eps = (z - abar.sqrt() * z_0) / (1 - abar).sqrt()
        v = abar.sqrt() * eps - (1 - abar).sqrt() * z_0
        said = {"epsilon": eps, "v_prediction": v, "sample": z_0}[config.prediction_type]
        return torch.cat([said, torch.zeros_like(said)], 1) if config.variance_type == "learned_range" else said

    return {"edm": of_edm, "flow": of_flow, "ddpm": of_ddpm}[config.objective]


@every_objective
def test_the_best_network_is_the_best_denoiser_at_every_log_snr(name: str) -> None:
    config = config_of(name)
    eps_of, largest, smallest = eps_at(config, optimal_network(config))
    z = torch.linspace(-3, 3, 31, dtype=torch.float64).view(-1, 1, 1, 1)
    for share in (0.0, 0.03, 0.4, 0.77, 1.0):
        log_snr = largest + share * (smallest - largest)
        alpha, sigma = math.sqrt(1 / (1 + math.exp(-log_snr))), math.sqrt(1 / (1 + math.exp(log_snr)))
        wanted = (z - alpha * best_z_0(z / alpha, sigma / alpha)) / sigma
        torch.testing.assert_close(eps_of(z, log_snr), wanted, rtol=1e-5, atol=2e-5)  # the time is told in float32


def drawn_with_diffusers(config: DiffusionConfig, num_steps: int, quantiles: Tensor) -> Tensor:
    """The stock scheduler's path from the exact law at its start, in which a schedule may leave some of the data."""
    match config.objective:
        case "edm":
            z = MEAN + math.sqrt(STD**2 + 80.0**2) * quantiles
        case "flow":
            z = quantiles
        case "ddpm":
            abar = float(schedule_of(config).alphas_cumprod[-1])
            z = math.sqrt(abar) * MEAN + math.sqrt(abar * STD**2 + 1 - abar) * quantiles
    network, scheduler = optimal_network(config), scheduler_of(config)
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        z_in: Tensor = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
        said = network(z_in, torch.full((len(z),), float(t), dtype=torch.float64))[:, :1]
        z = scheduler.step(said, t, z).prev_sample
    return z


@every_objective
def test_diffusers_scheduler_draws_the_data_from_the_best_network(name: str) -> None:
    # Deterministic samplers map the quantiles of the noise to those of the data, these ones to first order in the step.
    config = config_of(name)
    quantiles = torch.tensor(norm.ppf((torch.arange(200).double() + 0.5) / 200)).view(-1, 1, 1, 1)
    wanted = MEAN + STD * quantiles
    coarse, fine = (float((drawn_with_diffusers(config, n, quantiles) - wanted).abs().max()) for n in (125, 500))
    assert fine < 0.012
    assert fine < 0.35 * coarse


@pytest.mark.parametrize(
    ("values", "kind"),
    [({}, Ddpm), ({"objective": "edm", "noise_mean": -0.4, "noise_std": 1.0}, Edm), ({"objective": "flow"}, Flow)],
)
def test_the_objective_is_the_configs(values: dict[str, Any], kind: type) -> None:
    objective = objective_of(DiffusionConfig.model_validate(values), torch.device("cpu"))
    assert isinstance(objective, kind)
    if isinstance(objective, Edm):
        assert (objective.mean, objective.std) == (-0.4, 1.0)


def test_the_density_is_the_configs() -> None:
    schedule = schedule_of(DiffusionConfig())
    shares = {
        key: density_of(DiffusionConfig.model_validate({"timestep_density": key}), schedule)
        for key in ("uniform", "log_normal")
    }
    shares["table"] = density_of(DiffusionConfig.model_validate({"timestep_density": [0, 3, 1]}), schedule)
    for density in shares.values():
        assert float(density.sum()) == pytest.approx(1, abs=1e-12)
        assert bool((density > 0).all())
    assert float(shares["uniform"].std()) == pytest.approx(0, abs=1e-15)
    log_sigma = -schedule.log_snr / 2
    mean = float(((shares["log_normal"] - 0.05 * shares["uniform"]) * log_sigma).sum()) / 0.95
    assert mean == pytest.approx(-1.2 + math.log(2), abs=1e-3)  # what EDM has for data of half the deviation
    assert float(shares["table"][400] / shares["table"][900]) == pytest.approx(2.85 + 0.05, rel=0.05)
