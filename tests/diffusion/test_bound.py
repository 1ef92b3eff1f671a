"""The bound of whole chains against closed forms: Gaussian data, a best denoiser, expectations without chance."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.diffusion.bound import Bound, Reverse, reverse_of, variational_bound
from pipeline.diffusion.likelihood import discretized_gaussian_nll
from pipeline.diffusion.process import reverse_variance
from pipeline.diffusion.schedule import PredictionType, Schedule, ScheduleName, VarianceType, make_schedule, respaced

T = 1000
SCHEDULES: dict[ScheduleName, Schedule] = {
    "linear": make_schedule("linear", T, 1e-4, 0.02),
    "scaled_linear": make_schedule("scaled_linear", T, 0.00085, 0.012),
    "cosine": make_schedule("cosine", T, 1e-4, 0.02),
}
FIXED: tuple[VarianceType, ...] = ("fixed_large", "fixed_small")
names = pytest.mark.parametrize("name", list(SCHEDULES))
fixed_variances = pytest.mark.parametrize("variance_type", FIXED)

# The data of most tests: N(MEAN, COVARIANCE), two correlated channels of one pixel.
MEAN = torch.tensor([0.7, -1.1], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.9, -0.5], [-0.5, 0.4]], dtype=torch.float64)


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nodes(dimensions: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite points [N,dimensions] and weights [N]: exact means over N(0, I) of polynomials of degree 5."""
    point, weight = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    points = torch.cartesian_prod(*[point] * dimensions)
    weights = torch.cartesian_prod(*[weight / weight.sum()] * dimensions)
    return points.view(-1, dimensions), weights.view(-1, dimensions).prod(dim=1)


POINTS, WEIGHTS = nodes(4)  # two dimensions of z_0, two of ε
Z_0 = (MEAN + POINTS[:, :2] @ torch.linalg.cholesky(COVARIANCE).T).view(-1, 2, 1, 1)
EPS = POINTS[:, 2:].reshape(-1, 2, 1, 1)


def denoiser(schedule: Schedule, prediction_type: PredictionType = "epsilon"):
    """E[ε | z_t], or v or z_0 of it, for the data above: Gaussian conditioning."""

    def network(z_t: Tensor, t: Tensor) -> Tensor:
        abar = schedule.alphas_cumprod[t].view(-1, 1, 1)
        marginal = abar * COVARIANCE + (1 - abar) * torch.eye(2, dtype=torch.float64)  # [B,2,2]
        off = z_t.view(-1, 2, 1) - abar.sqrt() * MEAN.view(1, 2, 1)
        eps = ((1 - abar).sqrt() * torch.linalg.solve(marginal, off)).view_as(z_t)
        z_0 = (MEAN.view(1, 2, 1) + abar.sqrt() * COVARIANCE @ torch.linalg.solve(marginal, off)).view_as(z_t)
        abar = abar.unsqueeze(-1)
        said = {"epsilon": eps, "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * z_0, "sample": z_0}
        return said[prediction_type]

    return network


def mean_square_error(schedule: Schedule) -> Tensor:
    """tr Cov(z_0 | z_t) / 2, from the eigenvalues of the covariance.  [T]."""
    abar = schedule.alphas_cumprod[:, None]
    eigenvalues = torch.linalg.eigvalsh(COVARIANCE)
    return (eigenvalues * (1 - abar) / (abar * eigenvalues + 1 - abar)).mean(dim=1)


def expected_terms(schedule: Schedule, variance: Tensor) -> Tensor:
    """E L_0 at t = 0, E L_{t-1} at t ≥ 1, per element, for the best denoiser and a variance [T] of the reverse steps.

    L_{t-1} = ½ (β̃/σ² - 1 - ln(β̃/σ²)) + c² tr Cov(z_0|z_t) / 2σ²D, c what μ̃_t takes of z_0; at t = 0 c is 1.
    """
    beta, abar, before = schedule.betas, schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    ratio = beta * (1 - before) / (1 - abar) / variance
    c = before.sqrt() * beta / (1 - abar)
    of_mean = c.square() * mean_square_error(schedule) / (2 * variance)
    kl = 0.5 * (ratio - 1 - ratio.log()) + of_mean
    nll = 0.5 * (2 * math.pi * variance).log() + of_mean
    return torch.cat([nll[:1], kl[1:]])


def expected_prior(schedule: Schedule) -> float:
    abar = schedule.alphas_cumprod[-1].item()
    second = (MEAN.square().sum() + COVARIANCE.trace()).item() / 2
    return 0.5 * (abar * second - abar - math.log1p(-abar))


def expectation(schedule: Schedule, reverse: Reverse) -> tuple[float, Tensor, float]:
    """E L_T, E of each term [T] and E of the bound, by quadrature through the real functions."""
    bound = variational_bound(Z_0, schedule, reverse, lambda t: EPS)
    mean = WEIGHTS @ bound.terms
    return float(WEIGHTS @ bound.prior), mean, float(WEIGHTS @ bound.total)


# Every term of the chain, in closed form ----------------------------------------------------------


@names
@fixed_variances
def test_every_term_is_that_of_the_closed_form(name: ScheduleName, variance_type: VarianceType) -> None:
    schedule = SCHEDULES[name]
    prior, terms, total = expectation(schedule, reverse_of(denoiser(schedule), schedule, "epsilon", variance_type))
    wanted = expected_terms(schedule, reverse_variance(variance_type, schedule))
    assert prior == pytest.approx(expected_prior(schedule), rel=1e-9)
    torch.testing.assert_close(terms, wanted, rtol=1e-9, atol=0)
    assert total == pytest.approx(expected_prior(schedule) + wanted.sum().item(), rel=1e-9)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_the_bound_does_not_depend_on_what_is_predicted(prediction_type: PredictionType) -> None:
    schedule = SCHEDULES["linear"]
    reverse = reverse_of(denoiser(schedule, prediction_type), schedule, prediction_type, "fixed_small")
    _, terms, _ = expectation(schedule, reverse)
    wanted = expected_terms(schedule, reverse_variance("fixed_small", schedule))
    torch.testing.assert_close(terms, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kept", [[999], [0, 999], [99, 199, 399, 799, 999], list(range(9, 1000, 10))])
@fixed_variances
def test_a_respaced_chain_is_a_chain_and_tells_the_network_its_own_times(
    kept: list[int], variance_type: VarianceType
) -> None:
    trained = SCHEDULES["linear"]
    told = torch.tensor(kept)
    schedule = respaced(trained, told)
    _, terms, _ = expectation(schedule, reverse_of(denoiser(trained), schedule, "epsilon", variance_type, told=told))
    wanted = expected_terms(schedule, reverse_variance(variance_type, schedule))
    torch.testing.assert_close(terms, wanted, rtol=1e-9, atol=0)


@names
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_the_bound_of_unit_gaussian_data_is_no_bound_but_their_density(
    name: ScheduleName, zero_terminal_snr: bool
) -> None:
    # N(0, I) stays N(0, I): q(z_{t-1} | z_t) = N(√(1-β_t) z_t, β_t) is what fixed_large says, so q(z_{1:T} | z_0) =
    # p(z_{1:T} | z_0), and the bound is -ln N(z_0; 0, I) for each z_0 alone, at any T.
    schedule = make_schedule(name, 50, 1e-3, 0.2, zero_terminal_snr=zero_terminal_snr)
    z_0 = draws(5, 1, 1, 1, seed=0)
    points, weights = nodes(1)
    reverse = reverse_of(lambda z_t, t: torch.zeros_like(z_t), schedule, "v_prediction", "fixed_large")
    by_eps = [
        variational_bound(z_0, schedule, reverse, lambda t, e=eps: torch.full_like(z_0, e)).total
        for eps in points.flatten().tolist()
    ]
    bound = (weights[:, None] * torch.stack(by_eps)).sum(dim=0)
    wanted = 0.5 * (math.log(2 * math.pi) + z_0.flatten().square())
    torch.testing.assert_close(bound, wanted, rtol=1e-11, atol=1e-11)


def test_no_network_takes_the_bound_below_its_own_likelihood() -> None:
    # A chain of affine steps has a Gaussian p(z_0), by recursion: the bound lies above -ln of it, for each z_0.
    schedule = make_schedule("linear", 12, 0.01, 0.4)
    slopes, offsets = draws(12, seed=1), draws(12, seed=2)
    variances = (0.5 * draws(12, seed=3)).exp() * schedule.betas

    def reverse(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        column = (a[t].view(-1, 1, 1, 1) for a in (slopes, offsets, variances.log()))
        slope, offset, log_variance = column
        return slope * z_t + offset, log_variance

    mean, variance = 0.0, 1.0
    for t in reversed(range(12)):
        mean = slopes[t].item() * mean + offsets[t].item()
        variance = slopes[t].item() ** 2 * variance + variances[t].item()
    z_0 = torch.linspace(-20, 20, 81, dtype=torch.float64).view(-1, 1, 1, 1)
    points, weights = nodes(1)
    by_eps = [
        variational_bound(z_0, schedule, reverse, lambda t, e=eps: torch.full_like(z_0, e)).total
        for eps in points.flatten().tolist()
    ]
    bound = (weights[:, None] * torch.stack(by_eps)).sum(dim=0)
    nll = 0.5 * (math.log(2 * math.pi * variance) + (z_0.flatten() - mean).square() / variance)
    assert (bound - nll).min().item() > 0


def test_float32_latents_and_networks_cost_no_digits_but_their_own() -> None:
    schedule = make_schedule("linear", 50, 1e-3, 0.2)
    z_0, eps, said = (draws(3, 2, 2, 2, seed=seed) for seed in (10, 11, 12))

    def bound(dtype: torch.dtype) -> Bound:
        reverse = reverse_of(lambda z_t, t: said.to(z_t.dtype), schedule, "epsilon", "fixed_small")
        assert reverse(z_0.to(dtype), torch.tensor([3, 3, 3]))[0].dtype == torch.float64  # the mean is not rounded
        return variational_bound(z_0.to(dtype), schedule, reverse, lambda t: eps.to(dtype))

    assert bound(torch.float32).total.dtype == torch.float64
    torch.testing.assert_close(bound(torch.float32).terms, bound(torch.float64).terms, rtol=1e-4, atol=0)


# The weight of each term, and the variance ---------------------------------------------------------


@fixed_variances
def test_a_term_is_a_weighted_error_and_a_constant(variance_type: VarianceType) -> None:
    # DDPM eq. 12, and what it leaves out: L_{t-1} = ω_t ‖ε - ε_θ‖² + ½ (β̃/σ² - 1 - ln(β̃/σ²)), for any network.
    schedule = SCHEDULES["linear"]
    beta, abar, before = schedule.betas, schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    variance = reverse_variance(variance_type, schedule)
    z_0, eps, said = (draws(3, 2, 2, 2, seed=seed) for seed in (4, 5, 6))
    reverse = reverse_of(lambda z_t, t: said, schedule, "epsilon", variance_type)
    bound = variational_bound(z_0, schedule, reverse, lambda t: eps)
    omega = beta.square() / (2 * variance * (1 - beta) * (1 - abar))
    ratio = beta * (1 - before) / (1 - abar) / variance
    constant = 0.5 * (ratio - 1 - ratio.log())
    error = (eps - said).square().mean(dim=(1, 2, 3))  # [B]
    wanted = error[:, None] * omega + constant
    wanted[:, 0] = error * omega[0] + 0.5 * math.log(2 * math.pi * variance[0].item())
    torch.testing.assert_close(bound.terms, wanted, rtol=1e-9, atol=0)
    # The constants are what fixing σ² costs: none for β̃; for β, 0.337 nats in all.
    wanted_sum = {"fixed_large": 0.337160, "fixed_small": 0.0}[variance_type]
    assert constant[1:].sum().item() == pytest.approx(wanted_sum, abs=1e-6)


def learned_output(schedule: Schedule, log_variance: Tensor) -> Tensor:
    """The v of Nichol & Dhariwal 2021 eq. 15 that means each log variance.  [T]."""
    smallest, largest = reverse_variance("fixed_small", schedule).log(), schedule.betas.log()
    return 2 * (log_variance - smallest) / (largest - smallest) - 1


def best_variance(schedule: Schedule) -> Tensor:
    """σ_t² = β̃_t + c² tr Cov(z_0|z_t)/D, where E L_{t-1} is least (Bao et al. 2022, theorem 1).  [T]."""
    beta, abar, before = schedule.betas, schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    c = before.sqrt() * beta / (1 - abar)
    return beta * (1 - before) / (1 - abar) + c.square() * mean_square_error(schedule)


@pytest.mark.parametrize("spacing", [1, 20])
def test_the_best_learned_variance_costs_no_more_than_either_fixed_one(spacing: int) -> None:
    trained = SCHEDULES["linear"]
    told = torch.arange(spacing - 1, T, spacing)
    schedule = respaced(trained, told)
    place = torch.full((T,), -1).index_put((told,), torch.arange(len(told)))  # the inverse of told

    def learned(log_variance: Tensor) -> Reverse:
        v = learned_output(schedule, log_variance)

        def network(z_t: Tensor, t: Tensor) -> Tensor:
            column = v[place[t]].view(-1, 1, 1, 1).expand_as(z_t)
            return torch.cat([denoiser(trained)(z_t, t), column], dim=1)

        return reverse_of(network, schedule, "epsilon", "learned_range", told=told)

    variance = best_variance(schedule)
    assert (variance < schedule.betas)[1:].all()  # data with less variance than 1: it lies between the two
    assert (variance >= reverse_variance("fixed_small", schedule))[1:].all()
    _, terms, total = expectation(schedule, learned(variance.log()))
    torch.testing.assert_close(terms, expected_terms(schedule, variance), rtol=1e-9, atol=0)
    for variance_type in FIXED:
        fixed = reverse_of(denoiser(trained), schedule, "epsilon", variance_type, told=told)
        _, fixed_terms, fixed_total = expectation(schedule, fixed)
        assert total < fixed_total
        assert (terms <= fixed_terms + 1e-12).all()
        t = torch.full((len(Z_0),), 3)  # the same mean, to the last bit
        assert torch.equal(learned(variance.log())(Z_0, t)[0], fixed(Z_0, t)[0])
    for step in (-0.01, 0.01):
        assert (expectation(schedule, learned(variance.log() + step))[1] > terms).all()


# What is refused ----------------------------------------------------------------------------------


def test_a_log_variance_that_would_be_broadcast_is_refused() -> None:
    schedule, z_0 = make_schedule("linear", 8, 0.01, 0.4), draws(2, 2, 2, 2, seed=9)
    with pytest.raises(ValueError, match=r"log_variance must have shape \[2, 2, 2, 2\] or \[2, 1, 1, 1\], got \[2\]"):
        variational_bound(z_0, schedule, lambda z_t, t: (z_t, schedule.betas[t].log()), lambda t: z_0)


@pytest.mark.parametrize("told", [torch.arange(7), torch.arange(8.0)])
def test_times_that_are_not_one_for_each_step_are_refused(told: Tensor) -> None:
    schedule = make_schedule("linear", 8, 0.01, 0.4)
    with pytest.raises(ValueError, match=r"told must be int64 of shape \[8\], .* got"):
        reverse_of(lambda z_t, t: z_t, schedule, "epsilon", "fixed_large", told=told)


def test_pixels_cost_at_least_their_entropy_in_levels() -> None:
    # Two levels with probabilities 0.3 and 0.7, the best denoiser in closed form, ε by quadrature: a bound on a
    # probability, so never below the entropy.  The chain tells the level, at the entropy's cost; what L_0 adds is the
    # share of the last Gaussian, as wide as β̃_1 says, that falls beside the level.
    schedule = make_schedule("linear", 1000, 1e-4, 0.02)
    levels, shares = torch.tensor([40.0, 200.0]).double() / 127.5 - 1, torch.tensor([0.3, 0.7]).double()
    nodes, quadrature = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(64))
    eps = nodes.repeat(2).view(-1, 1, 1, 1)
    z_0 = levels.repeat_interleave(64).view(-1, 1, 1, 1)
    weight = (shares[:, None] * quadrature / quadrature.sum()).flatten()

    def best_eps(z_t: Tensor, t: Tensor) -> Tensor:
        abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        likely = shares.log() - 0.5 * (z_t - abar.sqrt() * levels).square() / (1 - abar)  # [B,1,1,2]
        best = (likely.softmax(-1) * levels).sum(-1, keepdim=True)
        return (z_t - abar.sqrt() * best) / (1 - abar).sqrt()

    reverse = reverse_of(best_eps, schedule, "epsilon", "fixed_small")
    found = variational_bound(z_0, schedule, reverse, lambda t: eps, nll=discretized_gaussian_nll)
    entropy = -float((shares * shares.log()).sum())
    assert entropy <= float((weight * found.total).sum())
    assert entropy <= float((weight * found.rate).sum()) < entropy + 0.01
    half_level = 1 / 255 / math.sqrt(float(reverse_variance("fixed_small", schedule)[0]))
    beside = -math.log(math.erf(half_level / math.sqrt(2)))
    assert float((weight * found.distortion).sum()) == pytest.approx(beside, rel=1e-3)
    with pytest.raises(ValueError, match="8-bit levels"):
        variational_bound(z_0 + 0.001, schedule, reverse, lambda t: eps, nll=discretized_gaussian_nll)
