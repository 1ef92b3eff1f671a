"""Every weighting against its paper, in every parameterisation; the bounds against likelihood and closed forms."""

import itertools
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.diffusion.densities import uniform
from pipeline.diffusion.edm import Edm
from pipeline.diffusion.likelihood import vlb_term
from pipeline.diffusion.objectives import Ddpm, Noised, simple_loss, target
from pipeline.diffusion.process import eps_from_z_0, p_mean, q_sample, reverse_variance, v_from
from pipeline.diffusion.schedule import PredictionType, Schedule, VarianceType, make_schedule
from pipeline.diffusion.weightings import Weighting, weights

PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
FIXED: tuple[VarianceType, ...] = ("fixed_large", "fixed_small")
SCHEDULES = {
    "linear": make_schedule("linear", 1000, 1e-4, 0.02),
    "scaled_linear": make_schedule("scaled_linear", 1000, 0.00085, 0.012),
    "cosine": make_schedule("cosine", 1000, 1e-4, 0.02),
    "shifted": make_schedule("scaled_linear", 1000, 0.00085, 0.012, resolution_shift=2.0),
    "short": make_schedule("linear", 10, 0.01, 0.6),
}
ZERO_SNR = {
    "linear": make_schedule("linear", 1000, 1e-4, 0.02, zero_terminal_snr=True),
    "cosine": make_schedule("cosine", 1000, 1e-4, 0.02, zero_terminal_snr=True),
    "short": make_schedule("linear", 10, 0.01, 0.6, zero_terminal_snr=True),
}
names = pytest.mark.parametrize("name", list(SCHEDULES))
prediction_types = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(ours: Tensor, exact: Tensor | NDArray[np.float64], rtol: float = 1e-11, atol: float = 0.0) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(exact), rtol=rtol, atol=atol)


def of_levels(log_snr: Tensor) -> Schedule:
    """The schedule that has these λ, [T], falling."""
    abar = torch.sigmoid(log_snr)
    return Schedule(1 - abar / torch.cat([abar.new_ones(1), abar[:-1]]))


# The papers' formulas -----------------------------------------------------------------------------

# Weight of the error in ε, v and z_0, from ᾱ alone, as each paper or its follow-ups write them.
FORMULAS: dict[Weighting, dict[PredictionType, Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = {
    "unweighted": {
        "epsilon": np.ones_like,
        "v_prediction": np.ones_like,
        "sample": np.ones_like,
    },
    "simple": {
        "epsilon": np.ones_like,
        "v_prediction": lambda abar: abar,
        "sample": lambda abar: abar / (1 - abar),
    },
    "snr_plus_one": {
        "epsilon": lambda abar: 1 / abar,
        "v_prediction": np.ones_like,
        "sample": lambda abar: 1 / (1 - abar),
    },
    "truncated_snr": {
        "epsilon": lambda abar: np.maximum(1, (1 - abar) / abar),
        "v_prediction": lambda abar: np.maximum(abar, 1 - abar),
        "sample": lambda abar: np.maximum(abar / (1 - abar), 1),
    },
    "min_snr": {
        "epsilon": lambda abar: np.minimum(1, 5 * (1 - abar) / abar),
        "v_prediction": lambda abar: np.minimum(abar, 5 * (1 - abar)),
        "sample": lambda abar: np.minimum(abar / (1 - abar), 5),
    },
}


@names
@prediction_types
@pytest.mark.parametrize("weighting", list(FORMULAS))
def test_a_function_of_the_snr_is_its_papers_formula(
    name: str, weighting: Weighting, prediction_type: PredictionType
) -> None:
    schedule = SCHEDULES[name]
    ours = weights(weighting, schedule, prediction_type)
    assert ours.dtype == torch.float64
    close(ours, FORMULAS[weighting][prediction_type](schedule.alphas_cumprod.numpy()), rtol=1e-10)


@names
@prediction_types
@pytest.mark.parametrize("gamma", [0.5, 1.0, 20.0, math.inf])
def test_min_snr_is_hang_et_al_for_every_gamma(name: str, prediction_type: PredictionType, gamma: float) -> None:
    # As training scripts apply it: min(SNR, γ), over SNR for ε, over SNR + 1 for v.
    snr = SCHEDULES[name].snr
    over = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    ours = weights("min_snr", SCHEDULES[name], prediction_type, min_snr_gamma=gamma)
    close(ours, snr.clamp(max=gamma) / over, rtol=1e-11)
    if gamma == math.inf:
        close(ours, weights("simple", SCHEDULES[name], prediction_type), rtol=1e-12)


def test_the_unweighted_loss_is_the_simple_one_for_eps_and_snr_plus_one_for_v() -> None:
    for schedule in SCHEDULES.values():
        ones = torch.ones_like(schedule.betas)
        assert torch.equal(weights("unweighted", schedule, "epsilon"), ones)
        assert torch.equal(weights("simple", schedule, "epsilon"), ones)
        assert torch.equal(weights("unweighted", schedule, "v_prediction"), ones)
        assert torch.equal(weights("snr_plus_one", schedule, "v_prediction"), ones)


def test_the_weights_keep_their_digits_at_both_ends_of_the_levels() -> None:
    # From |λ| = 20 on 1 is lost beside e^|λ| in float32, and in careless float64; 1/ᾱ and ᾱ are still known.
    schedule = of_levels(torch.linspace(26, -40, 67, dtype=torch.float64))
    abar, snr = schedule.alphas_cumprod, schedule.snr
    close(weights("snr_plus_one", schedule, "epsilon"), 1 / abar, rtol=1e-13)
    close(weights("simple", schedule, "v_prediction"), abar, rtol=1e-13)
    w = weights("edm", schedule, "sample") / weights("elbo", schedule, "sample")
    density = (-0.5 * ((snr.log() - 2.4) / 2.4).square()).exp() / (2.4 * math.sqrt(2 * math.pi))
    close(w, 2 * density * (1 + snr.log().neg().exp()), rtol=1e-12)
    close(w * snr, 2 * density * (snr + 1), rtol=1e-12)


# One loss, three parameterisations ----------------------------------------------------------------


def gradient_by_z_0(schedule: Schedule, weighting: Weighting, prediction_type: PredictionType) -> Tensor:
    """∂/∂z_θ of the loss that the network's output has where it means z_θ, at every t.  [T,1,2,2]."""
    T = schedule.num_timesteps
    t = torch.arange(T)
    z_0, eps, away = (draws(T, 1, 2, 2, seed=seed) for seed in (1, 2, 3))
    z_t = q_sample(z_0, t, eps, schedule)
    guess = (z_0 + away.sign() * (0.5 + away.abs())).requires_grad_()  # no element by chance at z_0
    eps_guess = eps_from_z_0(guess, z_t, t, schedule)
    said = {"epsilon": eps_guess, "v_prediction": v_from(guess, eps_guess, t, schedule), "sample": guess}
    objective = Ddpm(schedule, prediction_type, weights(weighting, schedule, prediction_type), uniform(T))
    loss, _ = objective.loss(said[prediction_type], z_0, eps, Noised(z_t, t, t))
    return torch.autograd.grad(loss.sum(), guess)[0]


@names
@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "unweighted"])
def test_the_gradient_by_z_0_is_that_of_every_parameterisation(name: str, weighting: Weighting) -> None:
    schedule = SCHEDULES[name]
    by_sample = gradient_by_z_0(schedule, weighting, "sample")
    assert (by_sample != 0).all()
    close(gradient_by_z_0(schedule, weighting, "epsilon"), by_sample, rtol=1e-9)
    close(gradient_by_z_0(schedule, weighting, "v_prediction"), by_sample, rtol=1e-9)


@pytest.mark.parametrize("name", list(ZERO_SNR))
@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "unweighted"])
def test_the_gradient_by_z_0_is_that_of_v_and_of_z_0_at_a_zero_terminal_snr(name: str, weighting: Weighting) -> None:
    by_sample = gradient_by_z_0(ZERO_SNR[name], weighting, "sample")
    assert by_sample.isfinite().all()
    close(gradient_by_z_0(ZERO_SNR[name], weighting, "v_prediction"), by_sample, rtol=1e-9)


def test_the_unweighted_gradients_differ() -> None:
    by_type = [gradient_by_z_0(SCHEDULES["linear"], "unweighted", kind) for kind in PREDICTION_TYPES]
    for one, other in itertools.combinations(by_type, 2):
        assert not torch.allclose(one, other, rtol=0.1)
    close(by_type[0], gradient_by_z_0(SCHEDULES["linear"], "simple", "sample"), rtol=1e-9)
    close(by_type[1], gradient_by_z_0(SCHEDULES["linear"], "snr_plus_one", "sample"), rtol=1e-9)


# A zero terminal SNR ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ZERO_SNR))
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weight_is_finite_at_a_zero_terminal_snr_and_eps_is_refused(name: str, weighting: Weighting) -> None:
    schedule = ZERO_SNR[name]
    for prediction_type in ("v_prediction", "sample"):
        for variance_type in FIXED:
            table = weights(weighting, schedule, prediction_type, variance_type=variance_type)
            assert table.shape == schedule.betas.shape
            assert table.isfinite().all()
            assert (table >= 0).all()
            assert (table[:-1] > 0).all()
    # Where nothing of z_0 is left, v is -z_0, and the two weigh the same.
    assert torch.equal(*(weights(weighting, schedule, kind)[-1] for kind in ("v_prediction", "sample")))
    with pytest.raises(ValueError, match="epsilon says nothing about z_0 where alphas_cumprod is 0: predict v or z_0"):
        weights(weighting, schedule, "epsilon")


def test_the_last_weights_of_a_zero_terminal_snr_are_the_limits() -> None:
    schedule, T = ZERO_SNR["linear"], 1000
    step = 0.5 * T * schedule.snr[-2].item()  # ½T (SNR_{T-2} - 0)
    limits = {
        "unweighted": 1, "simple": 0, "snr_plus_one": 1, "truncated_snr": 1, "min_snr": 0,
        "sigmoid": step, "edm": 0, "elbo": step, "vlb": 0.5 * T * schedule.alphas_cumprod[-2].item(),
    }  # fmt: skip
    assert {w: weights(w, schedule, "sample")[-1].item() for w in WEIGHTINGS} == pytest.approx(limits, rel=1e-12)


# L_vlb --------------------------------------------------------------------------------------------


@names
@pytest.mark.parametrize("variance_type", FIXED)
def test_vlb_is_ddpm_equation_12(name: str, variance_type: VarianceType) -> None:
    beta = SCHEDULES[name].betas.numpy()
    abar = np.cumprod(1 - beta)
    before = np.concatenate([[1.0], abar[:-1]])
    variance = beta if variance_type == "fixed_large" else beta * (1 - before) / (1 - abar)
    omega = (beta**2)[1:] / (2 * variance * (1 - beta) * (1 - abar))[1:]
    ours = weights("vlb", SCHEDULES[name], "epsilon", variance_type=variance_type)
    close(ours[1:], len(beta) * omega, rtol=1e-10)
    # At t = 0 the mean is z_θ itself, under a Gaussian of variance σ_0²: ‖z_0-z_θ‖²/(2σ_0²).
    first = variance[0] if variance_type == "fixed_large" else variance[1]
    ours = weights("vlb", SCHEDULES[name], "sample", variance_type=variance_type)
    assert ours[0].item() == pytest.approx(len(beta) / (2 * first), rel=1e-10)


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), *ZERO_SNR.values()])
@pytest.mark.parametrize("variance_type", FIXED)
@prediction_types
def test_vlb_is_the_bound_less_the_constant_of_its_variance(
    schedule: Schedule, variance_type: VarianceType, prediction_type: PredictionType
) -> None:
    if schedule.reaches_zero_snr and prediction_type == "epsilon":
        return
    T = schedule.num_timesteps
    t = torch.arange(T)
    z_0, eps, away = (draws(T, 1, 2, 2, seed=seed) for seed in (4, 5, 6))
    z_t = q_sample(z_0, t, eps, schedule)
    wanted = target(prediction_type, z_0, eps, t, schedule)
    said = wanted + away
    variance = reverse_variance(variance_type, schedule)
    term = vlb_term(
        z_0,
        z_t,
        t,
        schedule,
        mean=p_mean(said, z_t, t, schedule, prediction_type),
        log_variance=variance.log().view(-1, 1, 1, 1),
    )
    ratio = (reverse_variance("fixed_small", schedule) / variance).log()
    constant = torch.where(t == 0, 0.5 * (2 * math.pi * variance).log(), 0.5 * (ratio.exp() - 1 - ratio))
    weight = weights("vlb", schedule, prediction_type, variance_type=variance_type)
    close(T * (term - constant), weight * simple_loss(said, wanted), rtol=1e-9)


@names
@prediction_types
def test_elbo_is_the_bound_with_the_variance_of_the_posterior(name: str, prediction_type: PredictionType) -> None:
    elbo = weights("elbo", SCHEDULES[name], prediction_type)
    close(elbo[1:], weights("vlb", SCHEDULES[name], prediction_type, variance_type="fixed_small")[1:], rtol=1e-9)


@names
def test_elbo_is_the_step_of_the_snr(name: str) -> None:
    schedule = SCHEDULES[name]
    T, lam = schedule.num_timesteps, schedule.log_snr
    close(weights("elbo", schedule, "sample")[1:], 0.5 * T * -schedule.snr.diff(), rtol=1e-9)
    # In ε it is an expm1 of the step of λ, which is the same at t = 0, where λ goes on as a line.
    steps = torch.cat([-lam.diff()[:1], -lam.diff()])
    close(weights("elbo", schedule, "epsilon"), 0.5 * T * torch.expm1(steps), rtol=1e-9)


@names
@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.5])
def test_sigmoid_is_kingma_and_gaos(name: str, bias: float) -> None:
    schedule = SCHEDULES[name]
    w = weights("sigmoid", schedule, "epsilon", sigmoid_bias=bias) / weights("elbo", schedule, "epsilon")
    close(w, 1 / (1 + math.exp(-bias) * schedule.snr), rtol=1e-9)
    assert (w.diff() > 0).all()  # rises with t: a bound of the data with noise added


# The continuous bound -----------------------------------------------------------------------------

# For z_0 ~ N(m, s²), E[Var(z_0 | z_t)] = s²/(1 + s²·SNR), whatever m, and E‖ε-ε̂‖² is SNR times that.
Integrand = Callable[[NDArray[np.float64]], NDArray[np.float64]]
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(20)


def best_eps_error(log_snr: NDArray[np.float64], std: float) -> NDArray[np.float64]:
    """E‖ε - E[ε | z_t]‖², with the best denoiser ε̂ = √(1-ᾱ)(z_t - √ᾱ m)/(ᾱ s² + 1-ᾱ) put in: its error is linear.

    ε - ε̂ = (1 - (1-ᾱ)/V) ε - √(1-ᾱ)√ᾱ/V (z_0 - m) with V = ᾱ s² + 1-ᾱ.
    """
    abar = 1 / (1 + np.exp(-log_snr))
    noise = 1 / (1 + np.exp(log_snr))
    variance = abar * std**2 + noise
    return (abar * std**2 / variance) ** 2 + noise * abar * std**2 / variance**2


def gauss_legendre(f: Integrand, edges: NDArray[np.float64]) -> float:
    """∫ f from the first edge to the last, with 20 nodes in each piece."""
    half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
    points = middle[:, None] + half[:, None] * NODES
    return float((f(points.ravel()).reshape(points.shape) * NODE_WEIGHTS * half[:, None]).sum())


def bound_over_time(level_at: Integrand, slope_at: Integrand, edges: NDArray[np.float64], std: float) -> float:
    """½ ∫ (-λ'(t)) E‖ε-ε̂‖² dt over the pieces of t between edges: VDM's continuous loss."""
    return 0.5 * gauss_legendre(lambda t: -slope_at(t) * best_eps_error(level_at(t), std), edges)


@pytest.mark.parametrize("std", [0.3, 1.0, 4.0])
def test_the_continuous_bound_depends_on_the_end_points_of_the_schedule_alone(std: float) -> None:
    schedule = SCHEDULES["linear"]
    table = schedule.log_snr.numpy()
    high, low = table[0].item(), table[-1].item()
    closed_form = 0.5 * (math.log1p(std**2 * math.exp(high)) - math.log1p(std**2 * math.exp(low)))
    found: dict[str, float] = {}

    # The variance-preserving SDE: -ln ᾱ(t) = β_0 t + ½(β_1-β_0) t², between the t that have the two λ.
    first, rise = 0.1, 19.9

    def loss_of_signal(t: NDArray[np.float64]) -> NDArray[np.float64]:
        return first * t + rise / 2 * t**2

    def time_of(log_snr: float) -> float:
        spent = math.log1p(math.exp(-log_snr))  # -ln ᾱ
        return (math.sqrt(first**2 + 2 * rise * spent) - first) / rise

    found["linear VP"] = bound_over_time(
        lambda t: -np.log(np.expm1(loss_of_signal(t))),
        lambda t: -(first + rise * t) / -np.expm1(-loss_of_signal(t)),
        np.geomspace(time_of(high), time_of(low), 40),
        std,
    )

    # Cosine: ᾱ = cos²(πt/2), so λ = -2 ln tan(πt/2).
    ends = [2 / math.pi * math.atan(math.exp(-end / 2)) for end in (high, low)]
    found["cosine"] = bound_over_time(
        lambda t: -2 * np.log(np.tan(math.pi * t / 2)),
        lambda t: -2 * math.pi / np.sin(math.pi * t),
        np.concatenate([np.geomspace(ends[0], 0.5, 30), 1 - np.geomspace(0.5, 1 - ends[1], 30)[1:]]),
        std,
    )

    # A line of λ.
    found["line"] = bound_over_time(
        lambda t: high + (low - high) * t, lambda t: np.full_like(t, low - high), np.linspace(0, 1, 20), std
    )

    # The project's own: a line between any two neighbours of the table, each a piece of its own.
    indices = np.arange(1000, dtype=np.float64)
    found["log_snr_at"] = bound_over_time(
        lambda t: schedule.log_snr_at(torch.from_numpy(t)).numpy(),
        lambda t: np.diff(table)[np.floor(t).astype(np.int64)],
        indices,
        std,
    )
    assert found == pytest.approx(dict.fromkeys(found, closed_form), rel=1e-9)
    assert max(found.values()) - min(found.values()) < 1e-6


@pytest.mark.parametrize("std", [0.3, 1.0, 4.0])
def test_the_mean_of_elbo_falls_to_the_continuous_bound(std: float) -> None:
    # The discrete bound is a Riemann sum of ½ ∫ V dSNR that takes V where it is larger, at the noisier end of a step:
    # it lies above the integral, and halved steps lie half as far.
    high, low = 9.2, -10.1
    exact = 0.5 * (math.log1p(std**2 * math.exp(high)) - math.log1p(std**2 * math.exp(low)))
    gaps: list[float] = []
    for steps in (50, 100, 200, 400, 800):
        schedule = of_levels(torch.linspace(high, low, steps + 1, dtype=torch.float64))
        variance = std**2 / (1 + std**2 * schedule.snr)
        terms = weights("elbo", schedule, "sample") * variance / schedule.num_timesteps
        gaps.append(terms[1:].sum().item() - exact)
    assert 0 < gaps[-1] < 0.02 * exact
    assert [fine / coarse for coarse, fine in itertools.pairwise(gaps[2:])] == pytest.approx([0.5, 0.5], abs=0.02)
    assert gaps == sorted(gaps, reverse=True)


# EDM ----------------------------------------------------------------------------------------------


def edm_loss(edm: Edm, std: float) -> float:
    """E over ln σ of λ_EDM(σ) E‖D - z_0‖² for z_0 ~ N(m, s²) and its best denoiser, by Gauss-Hermite."""
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(120)
    sigma = torch.from_numpy(np.exp(edm.mean + edm.std * nodes))
    _, _, c_out, _ = edm.coefficients(sigma)
    error = sigma.square() * std**2 / (sigma.square() + std**2)
    values = (error / c_out.square()).numpy()
    return float((node_weights * values).sum() / node_weights.sum())


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("std", [0.3, 1.0, 1.7])
def test_edm_is_the_loss_of_karras_et_al_as_an_integral_over_the_levels(sigma_data: float, std: float) -> None:
    # ½ ∫ w(λ) E‖ε-ε̂‖² dλ by the trapezoid rule, which for a bell of λ converges faster than any power of the step.
    schedule = of_levels(torch.linspace(20, -24, 441, dtype=torch.float64))
    lam = schedule.log_snr
    w = weights("edm", schedule, "epsilon", sigma_data=sigma_data) / weights("elbo", schedule, "epsilon")
    integral = 0.5 * 0.1 * (w * torch.from_numpy(best_eps_error(lam.numpy(), std))).sum().item()
    assert integral == pytest.approx(edm_loss(Edm(sigma_data=sigma_data), std), rel=1e-8)
    if std == sigma_data:
        assert integral == pytest.approx(1, rel=1e-8)  # the best network's F has to guess a variable of variance 1


def test_the_mean_over_t_of_the_edm_weights_is_edms_loss() -> None:
    # On a schedule as it comes, cosine, whose λ cover the bell: a sum over t in the place of the integral.
    std, off = 0.6, list[float]()
    for num_timesteps in (1000, 4000):
        schedule = make_schedule("cosine", num_timesteps, 1e-4, 0.02)
        variance = std**2 / (1 + std**2 * schedule.snr)
        mean = (weights("edm", schedule, "sample", sigma_data=0.5) * variance).mean().item()
        off.append(mean / edm_loss(Edm(sigma_data=0.5), std) - 1)
    assert abs(off[0]) < 0.02
    assert abs(off[1]) < 0.3 * abs(off[0])


# What is refused ----------------------------------------------------------------------------------


def test_what_cannot_be_weighed_is_refused() -> None:
    schedule = SCHEDULES["short"]
    with pytest.raises(ValueError, match="unknown weighting 'snr': want unweighted, simple, snr_plus_one"):
        weights("snr", schedule, "epsilon")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown prediction_type 'eps': want epsilon, v_prediction, sample"):
        weights("simple", schedule, "eps")  # pyright: ignore[reportArgumentType]
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"min_snr_gamma={wrong} and sigma_data=1.0 came, numbers above 0"):
            weights("min_snr", schedule, "epsilon", min_snr_gamma=wrong)
        with pytest.raises(ValueError, match=f"min_snr_gamma=5.0 and sigma_data={wrong} came, numbers above 0"):
            weights("edm", schedule, "epsilon", sigma_data=wrong)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"sigmoid_bias={wrong} came, a finite number was wanted"):
            weights("sigmoid", schedule, "epsilon", sigmoid_bias=wrong)
    with pytest.raises(ValueError, match="learned_range has no fixed variance"):
        weights("vlb", schedule, "epsilon", variance_type="learned_range")
    with pytest.raises(ValueError, match="unknown variance_type 'large'"):
        weights("vlb", schedule, "epsilon", variance_type="large")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_step_of_lambda_wants_two_finite_levels(weighting: Weighting) -> None:
    one = make_schedule("linear", 1, 0.1, 0.1)
    two = make_schedule("linear", 2, 0.1, 0.2, zero_terminal_snr=True)
    if weighting in ("sigmoid", "edm", "elbo"):
        for schedule in (one, two):
            with pytest.raises(ValueError, match="two of them with a finite log SNR, this schedule has 1"):
                weights(weighting, schedule, "sample")
    else:
        assert weights(weighting, one, "epsilon").isfinite().all()
        assert weights(weighting, two, "sample").isfinite().all()
