"""q, its posterior and the conversions: moments, Bayes' rule, algebra, and diffusers."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.diffusion.process import (
    check_timesteps,
    eps_from_v,
    eps_from_z_0,
    predict_z_0,
    q_posterior,
    q_sample,
    v_from,
    z_0_from_eps,
    z_0_from_v,
)
from pipeline.diffusion.schedule import PredictionType, Schedule, ScheduleName, make_schedule

T = 1000
SCHEDULES: dict[ScheduleName, Schedule] = {
    "linear": make_schedule("linear", T, 1e-4, 0.02),
    "scaled_linear": make_schedule("scaled_linear", T, 0.00085, 0.012),
    "cosine": make_schedule("cosine", T, 1e-4, 0.02),
}
ZERO_SNR = Schedule(torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
EVERY_T = torch.arange(T)
names = pytest.mark.parametrize("name", list(SCHEDULES))
Binary = Callable[[Tensor, Tensor, Tensor, Schedule], Tensor]


def draws(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def constant(value: float, batch: int) -> Tensor:
    return torch.full((batch, 1, 1, 1), value, dtype=torch.float64)


# q(z_t | z_0) -------------------------------------------------------------------------------------


@names
@pytest.mark.parametrize("t", [0, 1, 250, 999])
def test_moments_of_q_sample(name: ScheduleName, t: int) -> None:
    schedule = SCHEDULES[name]
    num_draws, z_0 = 20_000, 1.7
    z_t = q_sample(constant(z_0, num_draws), torch.full((num_draws,), t), draws(num_draws, 1, 1, 1, seed=t), schedule)
    abar = schedule.alphas_cumprod[t].item()
    # The standard errors of a Gaussian's sample mean and sample variance.
    assert abs(z_t.mean().item() - math.sqrt(abar) * z_0) < 4 * math.sqrt((1 - abar) / num_draws)
    assert abs(z_t.var().item() - (1 - abar)) < 4 * (1 - abar) * math.sqrt(2 / (num_draws - 1))


@names
def test_q_sample_is_the_chain_of_single_steps(name: ScheduleName) -> None:
    # q(z_t | z_{t-1}) = N(√(1-β_t) z_{t-1}, β_t), DDPM eq. 2. A chain of affine Gaussian steps is Gaussian:
    # its mean is a product, its variance a recursion. q_sample's are read off one input at a time.
    schedule = SCHEDULES[name]
    signal = q_sample(constant(1, T), EVERY_T, constant(0, T), schedule).flatten()
    noise = q_sample(constant(0, T), EVERY_T, constant(1, T), schedule).flatten()
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(schedule.betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert abs(signal[t].item() - mean) < 1e-12
        assert abs(noise[t].item() ** 2 - variance) < 1e-12


@names
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_latents_get_their_noise_at_the_first_timestep(name: ScheduleName, dtype: torch.dtype) -> None:
    schedule = SCHEDULES[name]
    z_0 = torch.ones(1, 4, 32, 32, dtype=dtype)
    eps = draws(1, 4, 32, 32, seed=0, dtype=dtype)
    z_t = q_sample(z_0, torch.tensor([0]), eps, schedule)
    assert z_t.dtype == torch.float32
    beta = schedule.betas[0].item()
    assert (z_t - math.sqrt(1 - beta)).std().item() == pytest.approx(math.sqrt(beta), rel=0.05)
    exact = q_sample(z_0.double(), torch.tensor([0]), eps.double(), schedule)
    assert torch.equal(z_t, exact.float())  # rounded once


def test_result_is_float32_unless_an_input_is_float64() -> None:
    schedule, t = SCHEDULES["linear"], torch.tensor([3, 900])
    wide, single, half = (draws(2, 3, 4, 4, seed=1, dtype=d) for d in (torch.float64, torch.float32, torch.bfloat16))
    functions: list[Binary] = [eps_from_v, eps_from_z_0, z_0_from_eps, z_0_from_v]
    for function in functions:
        assert function(half, half, t, schedule).dtype == torch.float32
        assert function(single, half, t, schedule).dtype == torch.float32
        assert function(single, wide, t, schedule).dtype == torch.float64
    for first, second, dtype in ((half, single, torch.float32), (wide, single, torch.float64)):
        assert v_from(first, second, t, schedule).dtype == dtype
        assert q_sample(first, t, second, schedule).dtype == dtype
        mean, variance = q_posterior(first, second, t, schedule)
        assert mean.dtype == variance.dtype == dtype
        assert predict_z_0(first, second, t, schedule, "sample").dtype == dtype


# q(z_{t-1} | z_t, z_0) ----------------------------------------------------------------------------


@names
@pytest.mark.parametrize("t", [1, 2, 30, 500, 998, 999])
@pytest.mark.parametrize(("z_0", "z_t"), [(0.7, -0.4), (-2.0, 1.5)])
def test_posterior_is_bayes_rule_on_a_grid(name: ScheduleName, t: int, z_0: float, z_t: float) -> None:
    # q(z_{t-1} | z_t, z_0) ∝ q(z_t | z_{t-1}) q(z_{t-1} | z_0), multiplied out on a grid.
    schedule = SCHEDULES[name]
    beta, abar_prev = schedule.betas[t].item(), schedule.alphas_cumprod_prev[t].item()
    prior_mean, prior_std = math.sqrt(abar_prev) * z_0, math.sqrt(1 - abar_prev)
    half_width = 14 * prior_std + 5
    grid = torch.linspace(prior_mean - half_width, prior_mean + half_width, 100_001, dtype=torch.float64)
    log_prior = -0.5 * ((grid - prior_mean) / prior_std).square()
    log_likelihood = -0.5 * (z_t - math.sqrt(1 - beta) * grid).square() / beta
    weight = torch.softmax(log_prior + log_likelihood, dim=0)
    mean = (weight * grid).sum()
    variance = (weight * (grid - mean).square()).sum()
    ours_mean, ours_variance = q_posterior(constant(z_0, 1), constant(z_t, 1), torch.tensor([t]), schedule)
    assert ours_mean.item() == pytest.approx(mean.item(), rel=1e-10, abs=1e-10)
    assert ours_variance.item() == pytest.approx(variance.item(), rel=1e-10)


@names
def test_posterior_before_index_zero_is_the_clean_latent(name: ScheduleName) -> None:
    z_0, z_t = draws(1, 2, 3, 3, seed=2), draws(1, 2, 3, 3, seed=3)
    mean, variance = q_posterior(z_0, z_t, torch.tensor([0]), SCHEDULES[name])
    torch.testing.assert_close(mean, z_0, rtol=1e-11, atol=0)
    assert variance.shape == (1, 1, 1, 1)
    assert variance.item() == 0


@names
def test_marginalising_the_posterior_gives_the_previous_marginal(name: ScheduleName) -> None:
    # ∫ q(z_{t-1} | z_t, z_0) q(z_t | z_0) dz_t = q(z_{t-1} | z_0), for every t, by the rules for Gaussians.
    schedule = SCHEDULES[name]
    z_0 = constant(1.3, T)
    at_zero, variance = q_posterior(z_0, constant(0, T), EVERY_T, schedule)
    slope = q_posterior(constant(0, T), constant(1, T), EVERY_T, schedule)[0]
    abar, abar_prev = (a.view(-1, 1, 1, 1) for a in (schedule.alphas_cumprod, schedule.alphas_cumprod_prev))
    mean = at_zero + slope * abar.sqrt() * z_0
    torch.testing.assert_close(mean, abar_prev.sqrt() * z_0, rtol=0, atol=1e-11)
    torch.testing.assert_close(slope.square() * (1 - abar) + variance, 1 - abar_prev, rtol=0, atol=1e-11)


# ε, v and z_0 -------------------------------------------------------------------------------------


@names
def test_conversions_round_trip_at_every_timestep(name: ScheduleName) -> None:
    schedule = SCHEDULES[name]
    z_0, eps = draws(T, 1, 2, 2, seed=4), draws(T, 1, 2, 2, seed=5)
    z_t, v = q_sample(z_0, EVERY_T, eps, schedule), v_from(z_0, eps, EVERY_T, schedule)
    predictions: dict[PredictionType, Tensor] = {"epsilon": eps, "v_prediction": v, "sample": z_0}

    def close(one: Tensor, other: Tensor) -> None:
        # Dividing by √ᾱ or √(1-ᾱ) magnifies the rounding: cosine ends at √ᾱ = 5e-5.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)

    for prediction_type, prediction in predictions.items():
        close(predict_z_0(prediction, z_t, EVERY_T, schedule, prediction_type), z_0)
    close(z_0_from_eps(eps, z_t, EVERY_T, schedule), z_0)
    close(z_0_from_v(v, z_t, EVERY_T, schedule), z_0)
    close(eps_from_z_0(z_0, z_t, EVERY_T, schedule), eps)
    close(eps_from_v(v, z_t, EVERY_T, schedule), eps)


@given(
    t=st.integers(0, T - 1),
    z_0=st.floats(-100, 100),
    eps=st.floats(-6, 6),
    name=st.sampled_from(list(SCHEDULES)),
)
@settings(max_examples=80, deadline=None)
def test_v_is_the_other_leg_of_a_rotation(t: int, z_0: float, eps: float, name: ScheduleName) -> None:
    # Salimans & Ho 2022, appendix D: (z_t, v) is (z_0, ε) turned by the angle φ_t, so lengths are kept.
    at = torch.tensor([t])
    z_t = q_sample(constant(z_0, 1), at, constant(eps, 1), SCHEDULES[name]).item()
    v = v_from(constant(z_0, 1), constant(eps, 1), at, SCHEDULES[name]).item()
    assert z_t**2 + v**2 == pytest.approx(z_0**2 + eps**2, rel=1e-12, abs=1e-12)


@names
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
def test_agreement_with_diffusers(
    name: ScheduleName, scheduler_class: type[DDIMScheduler] | type[DDPMScheduler]
) -> None:
    schedule = SCHEDULES[name]
    scheduler = scheduler_class(num_train_timesteps=T)
    scheduler.alphas_cumprod = schedule.alphas_cumprod  # ours, so that only the formulas are compared
    z_0, eps = draws(T, 1, 2, 2, seed=6), draws(T, 1, 2, 2, seed=7)
    theirs = scheduler.add_noise(z_0, eps, EVERY_T)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(q_sample(z_0, EVERY_T, eps, schedule), theirs, rtol=0, atol=1e-12)
    theirs = scheduler.get_velocity(z_0, eps, EVERY_T)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(v_from(z_0, eps, EVERY_T, schedule), theirs, rtol=0, atol=1e-12)


def test_zero_snr_refuses_eps_and_serves_the_rest() -> None:
    t = torch.tensor([0, 2])
    z_0, eps = draws(2, 1, 2, 2, seed=8), draws(2, 1, 2, 2, seed=9)
    z_t, v = q_sample(z_0, t, eps, ZERO_SNR), v_from(z_0, eps, t, ZERO_SNR)
    assert torch.equal(z_t[1], eps[1])
    with pytest.raises(ValueError, match="alphas_cumprod is 0"):
        z_0_from_eps(eps, z_t, t, ZERO_SNR)
    with pytest.raises(ValueError, match="alphas_cumprod is 0"):
        predict_z_0(eps, z_t, t, ZERO_SNR, "epsilon")
    # At t = 0 the same schedule is well defined.
    torch.testing.assert_close(z_0_from_eps(eps[:1], z_t[:1], t[:1], ZERO_SNR), z_0[:1])
    torch.testing.assert_close(predict_z_0(v, z_t, t, ZERO_SNR, "v_prediction"), z_0)
    torch.testing.assert_close(eps_from_v(v, z_t, t, ZERO_SNR), eps)
    torch.testing.assert_close(eps_from_z_0(z_0, z_t, t, ZERO_SNR), eps)
    mean, variance = q_posterior(z_0, z_t, t, ZERO_SNR)
    assert mean.isfinite().all()
    assert variance.isfinite().all()


# What is refused, and what is never asked ---------------------------------------------------------


def test_nothing_reads_a_value_back_to_the_host() -> None:
    # Tensors on the meta device have shapes and no values: whatever would wait for a GPU raises there.
    schedule = SCHEDULES["linear"].to("meta")
    z, t = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        check_timesteps(t, schedule)
    functions: list[Binary] = [eps_from_v, eps_from_z_0, v_from, z_0_from_eps, z_0_from_v]
    for function in functions:
        assert function(z, z, t, schedule).shape == z.shape
    assert q_sample(z, t, z, schedule).shape == z.shape
    assert q_posterior(z, z, t, schedule)[0].shape == z.shape
    types: list[PredictionType] = ["epsilon", "v_prediction", "sample"]
    for prediction_type in types:
        assert predict_z_0(z, z, t, schedule, prediction_type).shape == z.shape


def test_check_timesteps() -> None:
    schedule = SCHEDULES["linear"]
    check_timesteps(torch.tensor([0, T - 1]), schedule)
    check_timesteps(torch.tensor([], dtype=torch.int64), schedule)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1000\), got 1000"):
        check_timesteps(torch.tensor([5, T]), schedule)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1000\), got -1"):
        check_timesteps(torch.tensor([-1, 5]), schedule)
    with pytest.raises(ValueError, match="int64 vector"):
        check_timesteps(torch.tensor([1.0]), schedule)
    with pytest.raises(ValueError, match="int64 vector"):
        check_timesteps(torch.tensor([1], dtype=torch.int32), schedule)
    with pytest.raises(ValueError, match="int64 vector"):
        check_timesteps(torch.tensor(1), schedule)


@pytest.mark.parametrize(
    ("z", "other", "t", "message"),
    [
        (
            torch.zeros(2, 4, 8, 8),
            torch.zeros(2, 4, 8, 8),
            torch.zeros(2),
            "t must be int64, got torch.float32",
        ),
        (torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), torch.tensor([1]), r"t must be \[B\] with B = 2"),
        (torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), torch.tensor(1), r"t must be \[B\]"),
        (torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 1), torch.tensor([1, 2]), "shape"),
        (torch.zeros(4, 8, 8), torch.zeros(4, 8, 8), torch.tensor([1, 2, 3, 4]), r"must be \[B,C,h,w\]"),
        (
            torch.zeros(2, 4, 8, 8, dtype=torch.uint8),
            torch.zeros(2, 4, 8, 8),
            torch.tensor([1, 2]),
            "must be floating-point, got torch.uint8",
        ),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(z: Tensor, other: Tensor, t: Tensor, message: str) -> None:
    schedule = SCHEDULES["linear"]
    functions: list[Binary] = [eps_from_v, eps_from_z_0, v_from, z_0_from_eps, z_0_from_v]
    for function in functions:
        with pytest.raises(ValueError, match=message):
            function(z, other, t, schedule)
    with pytest.raises(ValueError, match=message):
        q_sample(z, t, other, schedule)
    with pytest.raises(ValueError, match=message):
        q_posterior(z, other, t, schedule)
    with pytest.raises(ValueError, match=message):
        predict_z_0(z, other, t, schedule, "sample")


def test_unknown_prediction_type_is_refused() -> None:
    z = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="unknown prediction_type 'eps'"):
        predict_z_0(z, z, torch.tensor([0]), SCHEDULES["linear"], "eps")  # pyright: ignore[reportArgumentType]
