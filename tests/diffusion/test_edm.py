"""EDM's preconditioning against its table 1, against diffusers, and against the closed form for a Gaussian."""

import math

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler
from scipy import stats  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from pipeline.diffusion.edm import SMALLEST_U, Edm, column
from pipeline.diffusion.objectives import Noised

LAST_BELOW_ONE = math.nextafter(1.0, 0.0)
SIGMAS = torch.logspace(-3, 2.5, 23, dtype=torch.float64)
SIGMA_DATA = pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.3])


def draws(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def u_of(edm: Edm, sigma: Tensor) -> Tensor:
    """The uniform number that `edm` makes this σ of."""
    return torch.special.ndtr((sigma.log() - edm.mean) / edm.std)


def scheduler_of(edm: Edm) -> EDMEulerScheduler:
    return EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=edm.sigma_data, prediction_type="epsilon")


def best_network(edm: Edm, x: Tensor, sigma: Tensor, mean: float, std: float) -> Tensor:
    """F of the best denoiser for z_0 ~ N(mean, std²): D = (std² x + σ² mean)/(std² + σ²)."""
    _, c_skip, c_out, _ = edm.coefficients(sigma)
    total = std**2 + column(sigma).square()
    denoised = (std**2 * x + column(sigma).square() * mean) / total
    return (denoised - column(c_skip) * x) / column(c_out)


# σ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.4, 0.5)])
def test_ln_sigma_is_normal(mean: float, std: float) -> None:
    edm = Edm(mean, std)
    u = torch.from_numpy(np.random.default_rng(5).random(20_000))
    log_sigma = edm.sigma(u).log().numpy()
    assert stats.kstest(log_sigma, stats.norm(mean, std).cdf).pvalue > 1e-3
    assert stats.kstest(log_sigma, stats.norm(mean + 0.05, std).cdf).pvalue < 1e-3  # so that the test says something
    # The median and a deviation to either side, exactly.
    u = torch.special.ndtr(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    assert edm.sigma(u).log().tolist() == pytest.approx([mean - std, mean, mean + std], rel=1e-12)
    assert (edm.sigma(torch.linspace(0, LAST_BELOW_ONE, 1001, dtype=torch.float64)).diff() > 0).all()


def test_the_ends_of_u_give_finite_numbers() -> None:
    edm = Edm()
    u = torch.tensor([0.0, 5e-324, SMALLEST_U, LAST_BELOW_ONE], dtype=torch.float64)
    sigma = edm.sigma(u)
    assert sigma[0] == sigma[1] == sigma[2]
    assert 0 < sigma[0] < 1e-4 * edm.sigma(torch.tensor(0.5, dtype=torch.float64))
    z_0, eps = draws(4, 2, 3, 3, seed=0, dtype=torch.float32), draws(4, 2, 3, 3, seed=1, dtype=torch.float32)
    noised = edm.noised(z_0, u, eps)
    loss, _ = edm.loss(torch.zeros_like(z_0), z_0, eps, noised)
    for tensor in (*noised, loss):
        assert tensor.isfinite().all()
    # At the least σ the target is -eps: all that tells x from z_0.
    exact, _ = edm.loss(-eps, z_0, eps, noised)
    assert exact[0].item() < 1e-6


# Table 1 ------------------------------------------------------------------------------------------


@SIGMA_DATA
def test_the_coefficients_are_those_of_table_1(sigma_data: float) -> None:
    c_in, c_skip, c_out, c_noise = Edm(sigma_data=sigma_data).coefficients(SIGMAS)
    for k, sigma in enumerate(SIGMAS.tolist()):
        root = math.hypot(sigma, sigma_data)
        assert c_in[k].item() == pytest.approx(1 / root, rel=1e-14)
        assert c_skip[k].item() == pytest.approx((sigma_data / root) ** 2, rel=1e-14)
        assert c_out[k].item() == pytest.approx(sigma * sigma_data / root, rel=1e-14)
        assert c_noise[k].item() == pytest.approx(math.log(sigma) / 4, rel=1e-14)
    assert {tensor.dtype for tensor in (c_in, c_skip, c_out, c_noise)} == {torch.float64}
    assert c_in.shape == SIGMAS.shape


@SIGMA_DATA
def test_input_and_target_have_unit_variance_for_data_of_the_deviation_named(sigma_data: float) -> None:
    # x has the variance σ_d² + σ²; the target is ((1-c_skip) z_0 - c_skip σ eps)/c_out. Appendix B.6 chooses the
    # coefficients for these two to be 1, and c_skip for c_out to be the least.
    c_in, c_skip, c_out, _ = Edm(sigma_data=sigma_data).coefficients(SIGMAS)
    one = torch.ones_like(SIGMAS)
    variance = SIGMAS.square() + sigma_data**2
    torch.testing.assert_close(c_in.square() * variance, one, rtol=1e-13, atol=0)

    def left_over(skip: Tensor) -> Tensor:
        return (1 - skip).square() * sigma_data**2 + (skip * SIGMAS).square()

    torch.testing.assert_close(left_over(c_skip) / c_out.square(), one, rtol=1e-9, atol=0)
    for other in (1.01 * c_skip, 0.99 * c_skip):
        assert (left_over(other) > left_over(c_skip)).all()


@pytest.mark.parametrize("sigma", [0.02, 0.3, 1.0, 40.0])
def test_moments_of_the_networks_input_and_target(sigma: float) -> None:
    edm, num_draws = Edm(sigma_data=0.5), 20_000
    z_0, eps = 0.5 * draws(num_draws, 1, 1, 1, seed=2), draws(num_draws, 1, 1, 1, seed=3)
    u = u_of(edm, torch.full((num_draws,), sigma, dtype=torch.float64)).clamp(max=LAST_BELOW_ONE)
    noised = edm.noised(z_0, u, eps)
    assert noised.level.numpy() == pytest.approx(sigma, rel=1e-6)
    # The loss of a network that says 0 is the square of its target.
    squares, _ = edm.loss(torch.zeros_like(z_0), z_0, eps, noised)
    for second_moment in (noised.z.square().mean().item(), squares.mean().item()):
        assert abs(second_moment - 1) < 4 * math.sqrt(2 / num_draws)


# The objective ------------------------------------------------------------------------------------


def test_the_network_sees_the_scaled_latent_and_a_quarter_of_ln_sigma() -> None:
    edm = Edm(sigma_data=0.7)
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    z_0, eps = draws(3, 2, 3, 3, seed=4), draws(3, 2, 3, 3, seed=5)
    noised = edm.noised(z_0, u, eps)
    sigma = edm.sigma(u)
    assert torch.equal(noised.level, sigma)
    assert noised.time.dtype == torch.float32
    assert torch.equal(noised.time, (sigma.log() / 4).float())
    for b in range(3):
        x = z_0[b] + sigma[b] * eps[b]
        torch.testing.assert_close(noised.z[b], x / math.hypot(sigma[b].item(), 0.7), rtol=1e-13, atol=1e-15)


@SIGMA_DATA
def test_the_loss_is_the_weighted_error_of_the_denoiser(sigma_data: float) -> None:
    # Karras et al. eq. 8: λ(σ) c_out² ‖F - …‖² with λ = (σ² + σ_d²)/(σ σ_d)², so λ c_out² = 1.
    edm, batch = Edm(sigma_data=sigma_data), len(SIGMAS)
    z_0, eps, output = (draws(batch, 2, 3, 3, seed=seed) for seed in (6, 7, 8))
    loss, parts = edm.loss(output, z_0, eps, Noised(z_0, SIGMAS, SIGMAS))
    assert parts == {}
    denoised = edm.denoise(output, z_0 + column(SIGMAS) * eps, SIGMAS)
    error = (denoised - z_0).square().flatten(1).mean(1)
    scale = (SIGMAS.square() + sigma_data**2) / (SIGMAS * sigma_data).square()
    torch.testing.assert_close(loss, scale * error, rtol=1e-8, atol=0)


def test_a_network_that_hits_its_target_denoises_to_z_0() -> None:
    edm, batch = Edm(), len(SIGMAS)
    z_0, eps = draws(batch, 2, 3, 3, seed=9), draws(batch, 2, 3, 3, seed=10)
    output = torch.zeros_like(z_0).requires_grad_()
    noised = Noised(z_0, SIGMAS, SIGMAS)
    # The gradient of ‖F - target‖² at F = 0 is -2·target over the number of elements.
    (gradient,) = torch.autograd.grad(edm.loss(output, z_0, eps, noised)[0].sum(), output)
    wanted = -gradient * (2 * 3 * 3) / 2
    assert edm.loss(wanted, z_0, eps, noised)[0].max().item() < 1e-25
    x = z_0 + column(SIGMAS) * eps
    torch.testing.assert_close(edm.denoise(wanted, x, SIGMAS), z_0, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_the_optimal_denoiser_of_a_gaussian_minimises_the_loss(sigma: float) -> None:
    edm, mean, std, num_draws = Edm(sigma_data=0.5), 0.8, 0.6, 20_000
    level = torch.full((num_draws,), sigma, dtype=torch.float64)
    z_0, eps = mean + std * draws(num_draws, 1, 1, 1, seed=11), draws(num_draws, 1, 1, 1, seed=12)
    x = z_0 + sigma * eps
    best = best_network(edm, x, level, mean, std)
    noised = Noised(x, level, level)
    loss, _ = edm.loss(best, z_0, eps, noised)
    # Its value is the variance of z_0 given x, over c_out²; what is left is uncorrelated with 1 and with x.
    c_out = edm.coefficients(level)[2][0].item()
    posterior = std**2 * sigma**2 / (std**2 + sigma**2)
    assert abs(loss.mean() - posterior / c_out**2) < 4 * loss.std() / math.sqrt(num_draws)
    left = edm.denoise(best, x, level) - z_0
    for direction in (torch.ones_like(x), x):
        gradient = (left * direction).flatten()
        assert abs(gradient.mean()) < 4 * gradient.std() / math.sqrt(num_draws)
    away = loss.mean().sqrt()
    for a, b in ((0.2, 0.0), (-0.2, 0.0), (0.0, 0.2), (0.0, -0.2)):
        worse, _ = edm.loss(best + away * (a + b * (x - mean) / x.std()), z_0, eps, noised)
        assert worse.mean() > loss.mean()


def test_results_are_float32_unless_an_input_is_float64() -> None:
    edm, u = Edm(), torch.tensor([0.2, 0.8], dtype=torch.float64)
    wide, single, half = (draws(2, 1, 3, 3, seed=13, dtype=d) for d in (torch.float64, torch.float32, torch.bfloat16))
    for z_0, eps, dtype in ((single, single, torch.float32), (half, half, torch.float32), (half, wide, torch.float64)):
        noised = edm.noised(z_0, u, eps)
        assert (noised.z.dtype, noised.time.dtype, noised.level.dtype) == (dtype, torch.float32, torch.float64)
        assert edm.loss(half, z_0, eps, noised)[0].dtype == dtype
    # Rounded once: a narrow latent is noised in float64.
    exact = edm.noised(half.double(), u, single.double())
    assert torch.equal(edm.noised(half, u, single).z, exact.z.float())


def test_the_objective_never_reads_a_value_back_to_the_host() -> None:
    z = torch.empty(2, 4, 8, 8, device="meta")
    noised = Edm().noised(z, torch.tensor([0.2, 0.7], dtype=torch.float64), z)
    assert {tensor.device.type for tensor in noised} == {"meta"}
    assert Edm().loss(z, z, z, noised)[0].shape == (2,)


def test_wrong_outputs_and_settings_are_refused() -> None:
    z, level = torch.zeros(2, 4, 8, 8), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"one shape \[B,C,h,w\], got \[2, 8, 8, 8\] and \[2, 4, 8, 8\]"):
        Edm().loss(torch.zeros(2, 8, 8, 8), z, z, Noised(z, level, level))
    message = "came, finite numbers were wanted, std and sigma_data above 0"
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match=message):
            Edm(mean=wrong)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=message):
            Edm(std=wrong)
        with pytest.raises(ValueError, match=message):
            Edm(sigma_data=wrong)


# diffusers ----------------------------------------------------------------------------------------


@SIGMA_DATA
def test_diffusers_preconditions_as_we_do(sigma_data: float) -> None:
    edm = Edm(sigma_data=sigma_data)
    scheduler = scheduler_of(edm)
    z_0, eps, output = (draws(len(SIGMAS), 2, 3, 3, seed=seed) for seed in (14, 15, 16))
    x = z_0 + column(SIGMAS) * eps
    noised = edm.noised(z_0, u_of(edm, SIGMAS).clamp(SMALLEST_U, LAST_BELOW_ONE), eps)
    for b, sigma in enumerate(SIGMAS):
        c_in, _, _, c_noise = edm.coefficients(sigma)
        torch.testing.assert_close(scheduler.precondition_inputs(x[b], sigma), c_in * x[b], rtol=1e-12, atol=0)
        torch.testing.assert_close(scheduler.precondition_noise(sigma), c_noise, rtol=1e-12, atol=0)
        denoised = edm.denoise(output[b : b + 1], x[b : b + 1], sigma[None])
        theirs = scheduler.precondition_outputs(x[b : b + 1], output[b : b + 1], sigma)
        torch.testing.assert_close(denoised, theirs, rtol=1e-12, atol=1e-14)
        if 1e-2 < sigma < 1e2:  # of the σ that training draws, what the network is shown and told
            ours = noised.level[b]
            there = scheduler.precondition_inputs(z_0[b] + ours * eps[b], ours)
            torch.testing.assert_close(noised.z[b], there, rtol=1e-12, atol=1e-14)
            assert noised.time[b].item() == pytest.approx(scheduler.precondition_noise(ours).item(), rel=1e-6)


def sampled(edm: Edm, steps: int, mean: float, std: float) -> tuple[Tensor, Tensor]:
    """A stock scheduler's walk with the best network: where it starts, and where it ends."""
    scheduler = scheduler_of(edm)
    scheduler.set_timesteps(steps)
    start = x = mean + 80.0 * draws(1, 1, 2, 3, seed=17, dtype=torch.float32)
    for k, c_noise in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[k]
        seen = scheduler.scale_model_input(x, c_noise)
        torch.testing.assert_close(seen, x * edm.coefficients(sigma)[0], rtol=1e-5, atol=1e-6)
        output = best_network(edm, x.double(), sigma.double()[None], mean, std).float()
        stepped = scheduler.step(output, c_noise, x, return_dict=False)[0]
        # Exactly an Euler step of dx/dσ = σ (x - mean)/(std² + σ²), the probability flow of N(mean, std² + σ²).
        slope = sigma * (x - mean) / (std**2 + sigma**2)
        torch.testing.assert_close(stepped, x + (scheduler.sigmas[k + 1] - sigma) * slope, rtol=1e-4, atol=2e-4)
        x = stepped
    return start, x


@SIGMA_DATA
def test_a_stock_scheduler_steps_with_the_optimal_network_to_the_exact_gaussian_answer(sigma_data: float) -> None:
    # The flow multiplies x - mean by √((std² + σ'²)/(std² + σ²)); Euler's error halves with its steps.
    mean, std = 0.8, 0.6
    off: list[float] = []
    for steps in (50, 100, 200):
        start, end = sampled(Edm(sigma_data=sigma_data), steps, mean, std)
        exact = mean + (start - mean) * std / math.hypot(std, 80.0)
        off.append((end - exact).abs().max().item())
    assert off[2] < 0.02
    assert 1.7 < off[0] / off[1] < 2.4
    assert 1.7 < off[1] / off[2] < 2.4


def test_a_stock_scheduler_lands_on_a_datum_that_the_network_knows() -> None:
    _, end = sampled(Edm(sigma_data=0.5), 5, mean=-0.3, std=1e-6)
    torch.testing.assert_close(end, torch.full_like(end, -0.3), rtol=0, atol=1e-4)
