"""Rectified flow: straight lines, their velocity, its density of times, and diffusers' scheduler for it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import stats  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from pipeline.diffusion.edm import column
from pipeline.diffusion.flow import TIMES, Flow
from pipeline.diffusion.objectives import Noised

LAST_BELOW_ONE = math.nextafter(1.0, 0.0)


def draws(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def u_of(flow: Flow, tau: Tensor) -> Tensor:
    """The uniform number that `flow` makes this τ of."""
    return torch.special.ndtr((torch.logit(tau) - flow.mean) / flow.std)


# τ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6), (1.0, 2.0)])
def test_tau_is_logit_normal(mean: float, std: float) -> None:
    flow = Flow(mean, std)
    tau = flow.tau(torch.from_numpy(np.random.default_rng(6).random(20_000)))
    assert ((tau > 0) & (tau < 1)).all()
    logit = torch.log(tau / (1 - tau)).numpy()
    assert stats.kstest(logit, stats.norm(mean, std).cdf).pvalue > 1e-3
    assert stats.kstest(logit, stats.norm(mean + 0.1, std).cdf).pvalue < 1e-3  # so that the test says something
    # Its density on (0, 1) is Esser et al.'s eq. 19: the mass of a tenth, by quadrature.
    grid = np.linspace(0.3, 0.4, 2001)
    density = np.exp(-0.5 * ((np.log(grid / (1 - grid)) - mean) / std) ** 2) / (
        std * math.sqrt(2 * math.pi) * grid * (1 - grid)
    )
    mass = float(np.trapezoid(density, grid))
    share = ((tau > 0.3) & (tau < 0.4)).double().mean().item()
    assert abs(share - mass) < 4 * math.sqrt(mass * (1 - mass) / 20_000)


def test_the_ends_of_u_give_finite_numbers() -> None:
    flow = Flow()
    u = torch.tensor([0.0, 5e-324, 0.5, LAST_BELOW_ONE], dtype=torch.float64)
    tau = flow.tau(u)
    assert tau[0] == tau[1]
    assert 0 < tau[0] < 1e-3
    assert tau[2] == 0.5
    assert 0.999 < tau[3] < 1
    assert (flow.tau(torch.linspace(0, LAST_BELOW_ONE, 1001, dtype=torch.float64)).diff() > 0).all()
    z_0, eps = draws(4, 2, 3, 3, seed=0, dtype=torch.float32), draws(4, 2, 3, 3, seed=1, dtype=torch.float32)
    for wild in (flow, Flow(0.0, 20.0), Flow(100.0, 1.0)):  # whose τ rounds to 0 or to 1
        noised = wild.noised(z_0, u, eps)
        loss, _ = wild.loss(torch.zeros_like(z_0), z_0, eps, noised)
        for tensor in (*noised, loss):
            assert tensor.isfinite().all()
        assert ((noised.level >= 0) & (noised.level <= 1)).all()


# The objective ------------------------------------------------------------------------------------


def test_the_network_sees_a_point_of_the_line_and_a_thousand_tau() -> None:
    flow, u = Flow(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    z_0, eps = draws(3, 2, 3, 3, seed=2), draws(3, 2, 3, 3, seed=3)
    noised = flow.noised(z_0, u, eps)
    tau = flow.tau(u)
    assert torch.equal(noised.level, tau)
    assert noised.time.dtype == torch.float32
    assert torch.equal(noised.time, (1000 * tau).float())
    for b in range(3):
        torch.testing.assert_close(noised.z[b], (1 - tau[b]) * z_0[b] + tau[b] * eps[b], rtol=1e-14, atol=1e-15)


def test_the_target_is_the_velocity_of_the_line() -> None:
    flow = Flow()
    z_0, eps, output = (draws(3, 2, 3, 3, seed=seed) for seed in (4, 5, 6))
    # By a difference of two points of the line: it is straight, so any two will do.
    near, far = (flow.noised(z_0, torch.full((3,), u, dtype=torch.float64), eps) for u in (0.2, 0.9))
    velocity = (far.z - near.z) / column(far.level - near.level)
    torch.testing.assert_close(velocity, eps - z_0, rtol=0, atol=1e-13)
    for noised in (near, far):
        loss, parts = flow.loss(output, z_0, eps, noised)
        assert parts == {}
        torch.testing.assert_close(loss, (output - velocity).square().flatten(1).mean(1), rtol=1e-12, atol=0)
        assert flow.loss(eps - z_0, z_0, eps, noised)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_the_optimal_velocity_of_a_gaussian_minimises_the_loss(tau: float) -> None:
    # z_0 ~ N(m, s²): z_τ has the variance V = (1-τ)² s² + τ², and E[eps - z_0 | z_τ] is a line in z_τ.
    flow, mean, std, num_draws = Flow(), 0.8, 0.6, 20_000
    z_0, eps = mean + std * draws(num_draws, 1, 1, 1, seed=7), draws(num_draws, 1, 1, 1, seed=8)
    noised = flow.noised(z_0, u_of(flow, torch.full((num_draws,), tau, dtype=torch.float64)), eps)
    total = (1 - tau) ** 2 * std**2 + tau**2
    covariance = tau - (1 - tau) * std**2
    centred = (noised.z - (1 - tau) * mean) / total
    best = -mean + covariance * centred
    loss, _ = flow.loss(best, z_0, eps, noised)
    assert abs(loss.mean() - (1 + std**2 - covariance**2 / total)) < 4 * loss.std() / math.sqrt(num_draws)
    for direction in (torch.ones_like(z_0), noised.z):
        gradient = ((eps - z_0 - best) * direction).flatten()
        assert abs(gradient.mean()) < 4 * gradient.std() / math.sqrt(num_draws)
    for a, b in ((0.2, 0.0), (-0.2, 0.0), (0.0, 0.2), (0.0, -0.2)):
        worse, _ = flow.loss(best + a + b * centred / centred.std(), z_0, eps, noised)
        assert worse.mean() > loss.mean()


def test_results_are_float32_unless_an_input_is_float64() -> None:
    flow, u = Flow(), torch.tensor([0.2, 0.8], dtype=torch.float64)
    wide, single, half = (draws(2, 1, 3, 3, seed=9, dtype=d) for d in (torch.float64, torch.float32, torch.bfloat16))
    for z_0, eps, dtype in ((single, single, torch.float32), (half, half, torch.float32), (half, wide, torch.float64)):
        noised = flow.noised(z_0, u, eps)
        assert (noised.z.dtype, noised.time.dtype, noised.level.dtype) == (dtype, torch.float32, torch.float64)
        assert flow.loss(half, z_0, eps, noised)[0].dtype == dtype
    exact = flow.noised(half.double(), u, single.double())
    assert torch.equal(flow.noised(half, u, single).z, exact.z.float())


def test_the_velocity_of_narrow_latents_is_taken_in_float32() -> None:
    # 1 - 2^-9 has no bfloat16: a difference rounded to it would make 1 of it, and this loss 0.
    z_0 = torch.full((1, 1, 1, 1), 2.0**-9, dtype=torch.bfloat16)
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    level = torch.tensor([0.5], dtype=torch.float64)
    assert Flow().loss(one, z_0, one, Noised(one, level, level))[0].item() == 2.0**-18


def test_the_objective_never_reads_a_value_back_to_the_host() -> None:
    z = torch.empty(2, 4, 8, 8, device="meta")
    noised = Flow().noised(z, torch.tensor([0.2, 0.7], dtype=torch.float64), z)
    assert {tensor.device.type for tensor in noised} == {"meta"}
    assert Flow().loss(z, z, z, noised)[0].shape == (2,)


def test_wrong_outputs_and_settings_are_refused() -> None:
    z, level = torch.zeros(2, 4, 8, 8), torch.full((2,), 0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"one shape \[B,C,h,w\], got \[2, 8, 8, 8\] and \[2, 4, 8, 8\]"):
        Flow().loss(torch.zeros(2, 8, 8, 8), z, z, Noised(z, level, level))
    message = "came, finite numbers were wanted, std above 0"
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=message):
            Flow(mean=wrong)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=message):
            Flow(std=wrong)


# diffusers ----------------------------------------------------------------------------------------


def test_diffusers_noises_and_tells_the_time_as_we_do() -> None:
    flow = Flow()
    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMES)  # typed too loosely to use
    torch.testing.assert_close(scheduler.timesteps, TIMES * scheduler.sigmas, rtol=0, atol=0)
    told = scheduler.timesteps[10:990:70]
    z_0, eps = draws(len(told), 2, 3, 3, seed=10), draws(len(told), 2, 3, 3, seed=11)
    noised = flow.noised(z_0, u_of(flow, told.double() / TIMES), eps)
    torch.testing.assert_close(noised.time, told, rtol=1e-6, atol=0)
    theirs = scheduler.scale_noise(z_0, told, eps)
    torch.testing.assert_close(noised.z, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_stock_scheduler_walks_the_true_velocity_back_to_z_0(steps: int, shift: float) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMES, shift=shift)
    scheduler.set_timesteps(steps)
    z_0, eps = draws(2, 2, 3, 3, seed=12, dtype=torch.float32), draws(2, 2, 3, 3, seed=13, dtype=torch.float32)
    assert scheduler.timesteps[0].item() == TIMES  # pure noise, where sampling starts
    z = eps
    for k, time in enumerate(scheduler.timesteps):
        tau = scheduler.sigmas[k]
        assert time.item() == pytest.approx(TIMES * tau.item(), rel=1e-6)
        torch.testing.assert_close(z, (1 - tau) * z_0 + tau * eps, rtol=0, atol=1e-5)  # on the line
        z = scheduler.step(eps - z_0, time, z, return_dict=False)[0]
    torch.testing.assert_close(z, z_0, rtol=0, atol=1e-5)


def test_a_stock_scheduler_walks_the_optimal_velocity_to_the_exact_gaussian_answer() -> None:
    # The flow of N((1-τ) m, V_τ) carries (z - (1-τ) m)/√V_τ unchanged from τ = 1 to 0; Euler's error halves with its
    # steps.
    mean, std = 0.8, 0.6
    off: list[float] = []
    eps = draws(1, 1, 2, 3, seed=14, dtype=torch.float32)
    for steps in (50, 100, 200):
        scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMES)
        scheduler.set_timesteps(steps)
        z = eps
        for k, time in enumerate(scheduler.timesteps):
            tau = scheduler.sigmas[k].item()
            total = (1 - tau) ** 2 * std**2 + tau**2
            velocity = -mean + (tau - (1 - tau) * std**2) / total * (z - (1 - tau) * mean)
            z = scheduler.step(velocity, time, z, return_dict=False)[0]
        off.append((z - (mean + std * eps)).abs().max().item())
    assert off[2] < 0.02
    assert off[0] > 1.7 * off[1] > 1.7**2 * off[2]
