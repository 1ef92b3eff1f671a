"""q, its posterior and the conversions: moments, Bayes' rule, algebra, and diffusers."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from pipeline.diffusion.process import (
    check_shapes,
    check_timesteps,
    eps_from_score,
    eps_from_v,
    eps_from_z_0,
    learned_log_variance,
    p_mean,
    predict_eps,
    predict_z_0,
    q_posterior,
    q_sample,
    q_step,
    result_dtype,
    reverse_variance,
    score_from_eps,
    v_from,
    z_0_from_eps,
    z_0_from_mean,
    z_0_from_v,
)
from pipeline.diffusion.schedule import PredictionType, Schedule, ScheduleName, VarianceType, make_schedule

T = 1000
SCHEDULES: dict[ScheduleName, Schedule] = {
    "linear": make_schedule("linear", T, 1e-4, 0.02),
    "scaled_linear": make_schedule("scaled_linear", T, 0.00085, 0.012),
    "cosine": make_schedule("cosine", T, 1e-4, 0.02),
}
ZERO_SNR = Schedule(torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
EVERY_T = torch.arange(T)
STRETCHED = make_schedule("linear", T, 1e-4, 0.02, zero_terminal_snr=True)
names = pytest.mark.parametrize("name", list(SCHEDULES))
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
prediction_types = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
Binary = Callable[[Tensor, Tensor, Tensor, Schedule], Tensor]
# Every function of two latents of one shape, as f(latent, latent, t, schedule); and of one latent.
BINARY: dict[str, Binary] = {
    "q_sample": lambda z_0, eps, t, schedule: q_sample(z_0, t, eps, schedule),
    "q_step": lambda z_prev, noise, t, schedule: q_step(z_prev, t, noise, schedule),
    "q_posterior": lambda z_0, z_t, t, schedule: q_posterior(z_0, z_t, t, schedule)[0],
    "z_0_from_mean": z_0_from_mean,
    "z_0_from_eps": z_0_from_eps,
    "eps_from_z_0": eps_from_z_0,
    "v_from": v_from,
    "z_0_from_v": z_0_from_v,
    "eps_from_v": eps_from_v,
    **{f"predict_z_0 {p}": lambda said, z_t, t, s, p=p: predict_z_0(said, z_t, t, s, p) for p in PREDICTION_TYPES},
    **{f"predict_eps {p}": lambda said, z_t, t, s, p=p: predict_eps(said, z_t, t, s, p) for p in PREDICTION_TYPES},
    **{f"p_mean {p}": lambda said, z_t, t, s, p=p: p_mean(said, z_t, t, s, p) for p in PREDICTION_TYPES},
}
UNARY: dict[str, Callable[[Tensor, Tensor, Schedule], Tensor]] = {
    "score_from_eps": score_from_eps,
    "eps_from_score": eps_from_score,
    "learned_log_variance": lambda output, t, schedule: learned_log_variance(output, t, schedule)[1],
}


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
    wide, single, half, tiny = (
        draws(2, 4, 3, 3, seed=1, dtype=d) for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    )
    for function in BINARY.values():
        for first, second in ((half, half), (tiny, half), (single, half), (half, single), (single, single)):
            assert function(first, second, t, schedule).dtype == torch.float32
        for first, second in ((single, wide), (wide, single), (half, wide), (wide, wide)):
            assert function(first, second, t, schedule).dtype == torch.float64
    for one in UNARY.values():
        assert one(half, t, schedule).dtype == one(single, t, schedule).dtype == torch.float32
        assert one(wide, t, schedule).dtype == torch.float64
    for first, second, dtype in ((half, single, torch.float32), (wide, single, torch.float64)):
        mean, variance = q_posterior(first, second, t, schedule)
        assert mean.dtype == variance.dtype == result_dtype(first, second) == dtype


@pytest.mark.parametrize("name", [*BINARY, *UNARY])
def test_float32_is_rounded_once_at_the_end(name: str) -> None:
    # Of inputs that float32 holds, the result is that of float64, rounded: no step in between is.
    schedule, t = SCHEDULES["cosine"], torch.arange(0, T, 7)
    first, second = (draws(len(t), 2, 3, 3, seed=seed, dtype=torch.float32) for seed in (40, 41))
    if name in UNARY:
        one = UNARY[name]
        assert torch.equal(one(first, t, schedule), one(first.double(), t, schedule).float())
    else:
        function = BINARY[name]
        exact = function(first.double(), second.double(), t, schedule)
        assert torch.equal(function(first, second, t, schedule), exact.float())


# q(z_t | z_{t-1}) ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), STRETCHED, ZERO_SNR])
def test_q_step_over_and_over_is_q_sample(schedule: Schedule) -> None:
    # Each step is a·z + b·noise with a noise of its own: a chain of them has the mean Π a and the variance
    # V ← a² V + b². Both are read off the functions, one input at a time.
    length = schedule.num_timesteps
    every_t = torch.arange(length)
    one, none = constant(1, length), constant(0, length)
    a, b = (q_step(z, every_t, noise, schedule).flatten().tolist() for z, noise in ((one, none), (none, one)))
    signal, noise = (q_sample(z, every_t, eps, schedule).flatten().tolist() for z, eps in ((one, none), (none, one)))
    mean, variance = 1.0, 0.0
    for t in range(length):
        assert a[t] ** 2 + b[t] ** 2 == pytest.approx(1, abs=1e-15)  # variance preserving
        assert b[t] ** 2 == pytest.approx(schedule.betas[t].item(), rel=1e-14)
        mean, variance = a[t] * mean, a[t] ** 2 * variance + b[t] ** 2
        assert abs(signal[t] - mean) <= 1e-12
        assert abs(noise[t] ** 2 - variance) <= 1e-12


def test_moments_of_a_chain_of_q_steps() -> None:
    schedule, num_draws, z_0 = make_schedule("linear", 12, 0.01, 0.4), 20_000, 1.7
    z = constant(z_0, num_draws)
    for t, abar in enumerate(schedule.alphas_cumprod.tolist()):
        z = q_step(z, torch.full((num_draws,), t), draws(num_draws, 1, 1, 1, seed=t), schedule)
        assert abs(z.mean().item() - math.sqrt(abar) * z_0) < 4 * math.sqrt((1 - abar) / num_draws)
        assert abs(z.var().item() - (1 - abar)) < 4 * (1 - abar) * math.sqrt(2 / (num_draws - 1))


def test_the_last_step_to_a_zero_terminal_snr_forgets_all() -> None:
    z, noise = draws(1, 2, 3, 3, seed=42), draws(1, 2, 3, 3, seed=43)
    assert torch.equal(q_step(z, torch.tensor([T - 1]), noise, STRETCHED), noise)


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


def test_posterior_of_a_zero_terminal_snr_has_forgotten_z_t() -> None:
    # q(z_T | z_{T-1}) does not depend on z_{T-1}, so z_T says nothing about it: what is left is q(z_{T-1} | z_0).
    z_0, last = draws(1, 2, 3, 3, seed=44), torch.tensor([T - 1])
    for seed in (45, 46):
        mean, variance = q_posterior(z_0, draws(1, 2, 3, 3, seed=seed), last, STRETCHED)
        before = STRETCHED.alphas_cumprod[T - 2]
        torch.testing.assert_close(mean, before.sqrt() * z_0, rtol=1e-14, atol=0)
        assert variance.item() == pytest.approx(1 - before.item(), rel=1e-14)


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), STRETCHED])
def test_z_0_from_mean_undoes_the_posterior(schedule: Schedule) -> None:
    z_0, z_t = draws(T, 1, 2, 2, seed=47), draws(T, 1, 2, 2, seed=48)
    mean, _ = q_posterior(z_0, z_t, EVERY_T, schedule)
    # The mean holds z_0 times √ᾱ_{t-1} β_t / (1-ᾱ_t), 1e-4 at the least: the rounding grows by its inverse.
    torch.testing.assert_close(z_0_from_mean(mean, z_t, EVERY_T, schedule), z_0, rtol=0, atol=1e-10)
    # And the other way round: any mean is that of the z_0 found for it.
    any_mean = draws(T, 1, 2, 2, seed=49)
    found = z_0_from_mean(any_mean, z_t, EVERY_T, schedule)
    torch.testing.assert_close(q_posterior(found, z_t, EVERY_T, schedule)[0], any_mean, rtol=0, atol=1e-10)


# p(z_{t-1} | z_t) ---------------------------------------------------------------------------------


@names
def test_p_mean_is_ddpm_equation_11(name: str) -> None:
    schedule = SCHEDULES[name]  # pyright: ignore[reportArgumentType]
    eps, z_t = draws(T, 1, 2, 2, seed=50), draws(T, 1, 2, 2, seed=51)
    beta = schedule.betas.view(-1, 1, 1, 1)
    abar = (1 - beta).cumprod(0)
    exact = (z_t - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()
    torch.testing.assert_close(p_mean(eps, z_t, EVERY_T, schedule, "epsilon"), exact, rtol=1e-9, atol=1e-10)
    # The same ε said as v or as z_0 is the same mean.
    z_0 = z_0_from_eps(eps, z_t, EVERY_T, schedule)
    torch.testing.assert_close(p_mean(z_0, z_t, EVERY_T, schedule, "sample"), exact, rtol=1e-9, atol=1e-10)
    v = v_from(z_0, eps, EVERY_T, schedule)
    torch.testing.assert_close(p_mean(v, z_t, EVERY_T, schedule, "v_prediction"), exact, rtol=1e-9, atol=1e-9)


@prediction_types
def test_p_mean_before_index_zero_is_the_z_0_that_the_network_means(prediction_type: PredictionType) -> None:
    said, z_t, t = draws(1, 2, 3, 3, seed=52), draws(1, 2, 3, 3, seed=53), torch.tensor([0])
    schedule = SCHEDULES["linear"]
    z_0 = predict_z_0(said, z_t, t, schedule, prediction_type)
    torch.testing.assert_close(p_mean(said, z_t, t, schedule, prediction_type), z_0, rtol=1e-11, atol=0)


@names
@prediction_types
def test_p_mean_of_the_truth_is_the_posteriors(name: ScheduleName, prediction_type: PredictionType) -> None:
    schedule = SCHEDULES[name]
    z_0, eps = draws(T, 1, 2, 2, seed=54), draws(T, 1, 2, 2, seed=55)
    z_t = q_sample(z_0, EVERY_T, eps, schedule)
    said = {"epsilon": eps, "v_prediction": v_from(z_0, eps, EVERY_T, schedule), "sample": z_0}[prediction_type]
    mean, _ = q_posterior(z_0, z_t, EVERY_T, schedule)
    torch.testing.assert_close(p_mean(said, z_t, EVERY_T, schedule, prediction_type), mean, rtol=0, atol=1e-10)


def of_diffusers(schedule: Schedule, variance_type: VarianceType) -> DDPMScheduler:
    scheduler = DDPMScheduler(num_train_timesteps=T, variance_type=variance_type, clip_sample=False)
    scheduler.alphas_cumprod = schedule.alphas_cumprod  # ours, so that only the formulas are compared
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


@names
@pytest.mark.parametrize("variance_type", ["fixed_large", "fixed_small"])
def test_reverse_variance_is_beta_or_that_of_the_posterior(name: ScheduleName, variance_type: VarianceType) -> None:
    schedule = SCHEDULES[name]
    variance = reverse_variance(variance_type, schedule)
    assert variance.dtype == torch.float64
    assert variance.shape == (T,)
    if variance_type == "fixed_large":
        assert torch.equal(variance, schedule.betas)
    else:
        _, posterior = q_posterior(constant(0, T), constant(0, T), EVERY_T, schedule)
        torch.testing.assert_close(variance[1:], posterior.flatten()[1:], rtol=1e-14, atol=0)
        assert variance[0] == variance[1]  # 0 has no logarithm; Nichol & Dhariwal's code does the same
        assert (variance[1:] < schedule.betas[1:]).all()
    theirs = of_diffusers(schedule, variance_type)
    for t in (1, 2, 400, 998, 999):
        expected = float(theirs._get_variance(t))  # pyright: ignore[reportPrivateUsage]
        assert variance[t].item() == pytest.approx(expected, rel=1e-9)


def test_reverse_variance_of_a_single_step_is_its_beta() -> None:
    single = Schedule(torch.tensor([0.3], dtype=torch.float64))
    assert reverse_variance("fixed_small", single).tolist() == [0.3]
    assert reverse_variance("fixed_large", single).tolist() == [0.3]
    assert reverse_variance("fixed_small", ZERO_SNR).isfinite().all()
    with pytest.raises(ValueError, match="learned_range has no fixed variance: split the network's output"):
        reverse_variance("learned_range", single)
    with pytest.raises(ValueError, match="unknown variance_type 'learned': want fixed_large, fixed_small or learned"):
        reverse_variance("learned", single)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), STRETCHED])
def test_a_learned_variance_lies_between_the_fixed_ones(schedule: Schedule) -> None:
    small, large = (reverse_variance(kind, schedule).log().view(-1, 1, 1, 1) for kind in ("fixed_small", "fixed_large"))

    def at(v: float) -> Tensor:
        output = torch.cat([draws(T, 2, 3, 3, seed=56), torch.full((T, 2, 3, 3), v, dtype=torch.float64)], dim=1)
        prediction, log_variance = learned_log_variance(output, EVERY_T, schedule)
        assert torch.equal(prediction, output[:, :2])
        assert log_variance.shape == (T, 2, 3, 3)
        return log_variance

    everywhere = torch.ones(T, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(at(-1), small * everywhere, rtol=0, atol=1e-14)
    torch.testing.assert_close(at(1), large * everywhere, rtol=0, atol=1e-14)
    torch.testing.assert_close(at(0), (small + large) / 2 * everywhere, rtol=0, atol=1e-13)  # their geometric mean
    torch.testing.assert_close(at(0.5), (small + 3 * large) / 4 * everywhere, rtol=0, atol=1e-13)
    torch.testing.assert_close(at(3), (2 * large - small) * everywhere, rtol=0, atol=1e-13)  # no clamp
    assert at(-1).isfinite().all()


@names
def test_a_learned_variance_is_that_of_diffusers(name: ScheduleName) -> None:
    schedule, theirs = SCHEDULES[name], of_diffusers(SCHEDULES[name], "learned_range")
    for t in (1, 2, 400, 998, 999):
        output = draws(1, 4, 3, 3, seed=t)
        _, log_variance = learned_log_variance(output, torch.tensor([t]), schedule)
        wanted = theirs._get_variance(t, predicted_variance=output[:, 2:])  # pyright: ignore[reportPrivateUsage]
        torch.testing.assert_close(log_variance, wanted, rtol=1e-9, atol=1e-9)


def test_each_element_has_its_own_learned_variance_and_gradient() -> None:
    output = draws(2, 2, 3, 3, seed=57).requires_grad_()
    t = torch.tensor([0, 700])
    _, log_variance = learned_log_variance(output, t, SCHEDULES["linear"])
    (gradient,) = torch.autograd.grad(log_variance.sum(), output)
    assert torch.equal(gradient[:, :1], torch.zeros(2, 1, 3, 3, dtype=torch.float64))
    small = reverse_variance("fixed_small", SCHEDULES["linear"])[t]
    slope = (SCHEDULES["linear"].betas[t] / small).log() / 2
    torch.testing.assert_close(gradient[:, 1:], slope.view(-1, 1, 1, 1).expand(2, 1, 3, 3), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("channels", [1, 3, 9])
def test_an_odd_number_of_channels_holds_no_variance(channels: int) -> None:
    with pytest.raises(ValueError, match=f"wants 2C output channels, prediction and variance, got {channels}"):
        learned_log_variance(torch.zeros(2, channels, 4, 4), torch.tensor([0, 1]), SCHEDULES["linear"])


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


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), STRETCHED])
def test_predict_eps_says_the_noise_whatever_is_predicted(schedule: Schedule) -> None:
    z_0, eps = draws(T, 1, 2, 2, seed=60), draws(T, 1, 2, 2, seed=61)
    z_t, v = q_sample(z_0, EVERY_T, eps, schedule), v_from(z_0, eps, EVERY_T, schedule)
    predictions: dict[PredictionType, Tensor] = {"epsilon": eps, "v_prediction": v, "sample": z_0}
    for prediction_type, prediction in predictions.items():
        found = predict_eps(prediction, z_t, EVERY_T, schedule, prediction_type)
        torch.testing.assert_close(found, eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), STRETCHED])
@prediction_types
def test_the_z_0_and_the_eps_of_any_prediction_make_up_z_t(schedule: Schedule, prediction_type: PredictionType) -> None:
    # A network may say what it likes: its z_0 and its ε are two readings of one pair that q_sample joins to z_t.
    t = EVERY_T[:-1] if prediction_type == "epsilon" and schedule.reaches_zero_snr else EVERY_T
    said, z_t = draws(len(t), 1, 2, 2, seed=62), draws(len(t), 1, 2, 2, seed=63)
    z_0 = predict_z_0(said, z_t, t, schedule, prediction_type)
    eps = predict_eps(said, z_t, t, schedule, prediction_type)
    torch.testing.assert_close(q_sample(z_0, t, eps, schedule), z_t, rtol=0, atol=1e-11)


def test_where_nothing_of_z_0_is_left_eps_is_z_t_itself() -> None:
    last = torch.tensor([T - 1, 2])
    for schedule, t in ((STRETCHED, last[:1]), (ZERO_SNR, last[1:])):
        said, z_t = draws(1, 2, 3, 3, seed=64), draws(1, 2, 3, 3, seed=65)
        assert torch.equal(predict_eps(said, z_t, t, schedule, "v_prediction"), z_t)
        assert torch.equal(predict_eps(said, z_t, t, schedule, "sample"), z_t)
        assert torch.equal(predict_eps(said, z_t, t, schedule, "epsilon"), said)  # taken at its word
        assert torch.equal(predict_z_0(said, z_t, t, schedule, "v_prediction"), -said)


# The score ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), STRETCHED])
def test_the_score_is_the_gradient_of_the_log_density(schedule: Schedule) -> None:
    z_0, eps = draws(T, 1, 2, 2, seed=66), draws(T, 1, 2, 2, seed=67)
    z_t = q_sample(z_0, EVERY_T, eps, schedule).requires_grad_()
    abar = schedule.alphas_cumprod.view(-1, 1, 1, 1)
    log_density = Normal(abar.sqrt() * z_0, (1 - abar).sqrt()).log_prob(z_t).sum()
    (gradient,) = torch.autograd.grad(log_density, z_t)
    torch.testing.assert_close(score_from_eps(eps, EVERY_T, schedule), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), STRETCHED])
def test_score_and_eps_round_trip(schedule: Schedule) -> None:
    eps = draws(T, 1, 2, 2, seed=68)
    score = score_from_eps(eps, EVERY_T, schedule)
    torch.testing.assert_close(eps_from_score(score, EVERY_T, schedule), eps, rtol=1e-14, atol=0)
    torch.testing.assert_close(score_from_eps(eps_from_score(eps, EVERY_T, schedule), EVERY_T, schedule), eps)


def test_tweedies_formula_gives_z_0_from_the_score() -> None:
    # Robbins 1956, Efron 2011: E[z_0 | z_t] = (z_t + (1-ᾱ) ∇ ln q(z_t)) / √ᾱ.
    schedule, eps, z_t = SCHEDULES["scaled_linear"], draws(T, 1, 2, 2, seed=69), draws(T, 1, 2, 2, seed=70)
    abar = schedule.alphas_cumprod.view(-1, 1, 1, 1)
    tweedie = (z_t + (1 - abar) * score_from_eps(eps, EVERY_T, schedule)) / abar.sqrt()
    torch.testing.assert_close(z_0_from_eps(eps, z_t, EVERY_T, schedule), tweedie, rtol=0, atol=1e-10)


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
    for function in BINARY.values():
        assert function(z, z, t, schedule).shape == z.shape
    assert score_from_eps(z, t, schedule).shape == eps_from_score(z, t, schedule).shape == z.shape
    prediction, log_variance = learned_log_variance(z, t, schedule)
    assert prediction.shape == log_variance.shape == (2, 2, 8, 8)
    mean, variance = q_posterior(z, z, t, schedule)
    assert (mean.shape, variance.shape) == (z.shape, (2, 1, 1, 1))
    for variance_type in ("fixed_large", "fixed_small"):
        assert reverse_variance(variance_type, schedule).shape == (T,)
    # Nor does anything but ε look at where a zero terminal SNR is.
    for name, function in BINARY.items():
        if name not in ("z_0_from_eps", "predict_z_0 epsilon", "p_mean epsilon"):
            assert function(z, z, t, STRETCHED.to("meta")).shape == z.shape


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


IMAGES = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize("name", list(BINARY))
@pytest.mark.parametrize(
    ("z", "other", "t", "message"),
    [
        (IMAGES, IMAGES, torch.zeros(2), "t must be int64, got torch.float32"),
        (IMAGES, IMAGES, torch.zeros(2, dtype=torch.int32), "t must be int64, got torch.int32"),
        (IMAGES, IMAGES, torch.tensor([1]), r"t must be \[B\] with B = 2 as in \w+, got shape \[1\]"),
        (IMAGES, IMAGES, torch.tensor([1, 2, 3]), r"t must be \[B\] with B = 2"),
        (IMAGES, IMAGES, torch.tensor(1), r"t must be \[B\] with B = 2 as in \w+, got shape \[\]"),
        (IMAGES, IMAGES, torch.tensor([[1], [2]]), r"t must be \[B\] with B = 2"),
        (
            IMAGES,
            IMAGES[..., :1],
            torch.tensor([1, 2]),
            r"\w+ must have \w+'s shape \[2, 4, 8, 8\], got \[2, 4, 8, 1\]",
        ),
        (IMAGES, IMAGES[:1], torch.tensor([1, 2]), r"\w+ must have \w+'s shape \[2, 4, 8, 8\], got \[1, 4, 8, 8\]"),
        (IMAGES, torch.zeros(()), torch.tensor([1, 2]), r"\w+ must have \w+'s shape \[2, 4, 8, 8\], got \[\]"),
        (IMAGES[0], IMAGES[0], torch.tensor([1, 2, 3, 4]), r"\w+ must be \[B,C,h,w\], got shape \[4, 8, 8\]"),
        (IMAGES.byte(), IMAGES, torch.tensor([1, 2]), "must be floating-point, got torch.uint8"),
        (IMAGES, IMAGES.long(), torch.tensor([1, 2]), "must be floating-point, got torch.int64"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(name: str, z: Tensor, other: Tensor, t: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BINARY[name](z, other, t, SCHEDULES["linear"])


@pytest.mark.parametrize("name", list(UNARY))
@pytest.mark.parametrize(
    ("z", "t", "message"),
    [
        (IMAGES, torch.zeros(2), "t must be int64, got torch.float32"),
        (IMAGES, torch.tensor([1]), r"t must be \[B\] with B = 2 as in \w+, got shape \[1\]"),
        (IMAGES[0], torch.tensor([1, 2, 3, 4]), r"\w+ must be \[B,C,h,w\], got shape \[4, 8, 8\]"),
        (IMAGES.int(), torch.tensor([1, 2]), "must be floating-point, got torch.int32"),
    ],
)
def test_wrong_shapes_and_dtypes_of_one_latent_are_refused(name: str, z: Tensor, t: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNARY[name](z, t, SCHEDULES["linear"])


def test_the_message_names_the_latent_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^mean must have z_0's shape \[2, 4, 8, 8\], got \[2, 4, 8, 4\]$"):
        check_shapes(torch.tensor([1, 2]), z_0=IMAGES, z_t=IMAGES, mean=IMAGES[..., :4])
    with pytest.raises(ValueError, match=r"^z_t must be floating-point, got torch\.bool$"):
        check_shapes(torch.tensor([1, 2]), z_0=IMAGES, z_t=IMAGES.bool())


def test_unknown_prediction_type_is_refused() -> None:
    z = torch.zeros(1, 1, 1, 1)
    for function in (predict_z_0, predict_eps, p_mean):
        with pytest.raises(ValueError, match="unknown prediction_type 'eps': want epsilon, v_prediction or sample"):
            function(z, z, torch.tensor([0]), SCHEDULES["linear"], "eps")  # pyright: ignore[reportArgumentType]
