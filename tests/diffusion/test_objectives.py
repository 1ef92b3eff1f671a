"""Targets are what they say, the best denoiser minimises the loss, and DDPM's objective is the sum of its terms."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pipeline.diffusion.densities import from_table, log_normal, stratified, timesteps, uniform
from pipeline.diffusion.likelihood import gaussian_kl, gaussian_nll, prior_term, vlb_term
from pipeline.diffusion.objectives import Ddpm, Noised, denoising_score_matching, simple_loss, target
from pipeline.diffusion.process import predict_z_0, q_sample, score_from_eps
from pipeline.diffusion.schedule import PredictionType, Schedule, VarianceType, make_schedule
from pipeline.diffusion.weightings import Weighting, weights

PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
SCHEDULE = make_schedule("linear", 1000, 1e-4, 0.02)
SHORT = make_schedule("linear", 40, 1e-3, 0.2)
ZERO_SNR = make_schedule("scaled_linear", 40, 1e-3, 0.2, zero_terminal_snr=True)
prediction_types = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def draws(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ddpm(
    schedule: Schedule,
    prediction_type: PredictionType,
    *,
    weighting: Weighting = "unweighted",
    density: Tensor | None = None,
    variance_type: VarianceType = "fixed_large",
    vlb_weight: float = 1.0,
) -> Ddpm:
    return Ddpm(
        schedule,
        prediction_type,
        weights(weighting, schedule, prediction_type),
        uniform(schedule.num_timesteps) if density is None else density,
        variance_type,
        vlb_weight,
    )


def middle_u(density: Tensor) -> Tensor:
    """One u for each t, in the middle of those that mean it."""
    return density.cumsum(0) - density / 2


# The target and the loss --------------------------------------------------------------------------


@prediction_types
def test_a_network_that_hits_its_target_means_z_0(prediction_type: PredictionType) -> None:
    t = torch.arange(1000)
    z_0, eps = draws(1000, 1, 2, 2, seed=0), draws(1000, 1, 2, 2, seed=1)
    z_t = q_sample(z_0, t, eps, SCHEDULE)
    wanted = target(prediction_type, z_0, eps, t, SCHEDULE)
    assert wanted.dtype == torch.float64
    torch.testing.assert_close(predict_z_0(wanted, z_t, t, SCHEDULE, prediction_type), z_0, rtol=0, atol=1e-10)
    assert target(prediction_type, z_0.bfloat16(), eps.float(), t, SCHEDULE).dtype == torch.float32


def test_targets_are_the_named_tensors() -> None:
    t, z_0, eps = torch.tensor([10, 990]), draws(2, 1, 2, 2, seed=2), draws(2, 1, 2, 2, seed=3)
    assert torch.equal(target("epsilon", z_0, eps, t, SCHEDULE), eps)
    assert torch.equal(target("sample", z_0, eps, t, SCHEDULE), z_0)
    # v is the derivative of z_t by the angle: almost ε near the data, almost -z_0 near the noise.
    v = target("v_prediction", z_0, eps, t, SCHEDULE)
    torch.testing.assert_close(v[0], eps[0], rtol=0, atol=0.2)
    torch.testing.assert_close(v[1], -z_0[1], rtol=0, atol=0.05)


@prediction_types
@pytest.mark.parametrize("t", [0, 100, 400, 999])
def test_the_optimal_denoiser_of_a_gaussian_minimises_the_loss(prediction_type: PredictionType, t: int) -> None:
    # For z_0 ~ N(m, s²): E[z_0 | z_t] = m + √ᾱ s² (z_t - √ᾱ m) / (ᾱ s² + 1-ᾱ), and E[ε | z_t] and E[v |
    # z_t] follow from it linearly. At the minimum of a squared loss the residual is uncorrelated with every
    # function of z_t: here with 1 and z_t, which span all affine denoisers.
    mean, std, num_draws = 0.8, 0.5, 20_000
    at = torch.full((num_draws,), t)
    z_0 = mean + std * draws(num_draws, 1, 1, 1, seed=4)
    eps = draws(num_draws, 1, 1, 1, seed=5)
    z_t = q_sample(z_0, at, eps, SCHEDULE)
    abar = SCHEDULE.alphas_cumprod[t].item()
    centred = (z_t - math.sqrt(abar) * mean) / (abar * std**2 + 1 - abar)
    optimal_z_0 = mean + math.sqrt(abar) * std**2 * centred
    optimal_eps = math.sqrt(1 - abar) * centred
    # Every target is linear in z_0 and ε, so their conditional means give its own.
    optimal = target(prediction_type, optimal_z_0, optimal_eps, at, SCHEDULE)
    wanted = target(prediction_type, z_0, eps, at, SCHEDULE)
    loss = simple_loss(optimal, wanted)
    assert loss.shape == (num_draws,)

    residual = wanted - optimal
    for direction in (torch.ones_like(z_t), z_t):
        gradient = (residual * direction).flatten()
        assert abs(gradient.mean()) < 4 * gradient.std() / math.sqrt(num_draws)

    # And its value is the posterior variance of what is predicted.
    posterior = std**2 * (1 - abar) / (abar * std**2 + 1 - abar)  # of z_0 given z_t
    share = {"sample": 1.0, "epsilon": abar / (1 - abar), "v_prediction": 1 / (1 - abar)}[prediction_type]
    assert abs(loss.mean() - posterior * share) < 4 * loss.std() / math.sqrt(num_draws)

    # Any affine step away costs more; 0.2 is far outside the noise of this many draws.
    scale = wanted.std()
    for a, b in ((0.2, 0.0), (-0.2, 0.0), (0.0, 0.2), (0.0, -0.2)):
        worse = simple_loss(optimal + scale * (a + b * centred / centred.std()), wanted)
        assert worse.mean() > loss.mean()


def test_simple_loss_is_a_mean_per_sample() -> None:
    prediction, wanted = draws(3, 2, 4, 5, seed=6), draws(3, 2, 4, 5, seed=7)
    loss = simple_loss(prediction, wanted)
    assert loss.dtype == torch.float64
    for b in range(3):
        difference = (wanted[b] - prediction[b]).flatten().tolist()
        assert loss[b].item() == pytest.approx(math.fsum(d * d for d in difference) / 40, rel=1e-14)


def test_simple_loss_subtracts_in_float32() -> None:
    # 1 + 2^-9 has no bfloat16: rounding the target before the subtraction would make this loss 0.
    prediction = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    loss = simple_loss(prediction, torch.full((1, 1, 1, 1), 1 + 2**-9))
    assert loss.dtype == torch.float32
    assert loss.item() == 2**-18
    assert simple_loss(prediction, prediction).dtype == torch.float32
    assert simple_loss(prediction, prediction.double()).dtype == torch.float64


def test_simple_loss_has_the_gradient_of_a_square() -> None:
    prediction = draws(2, 1, 2, 2, seed=8).requires_grad_()
    wanted = draws(2, 1, 2, 2, seed=9)
    simple_loss(prediction, wanted).sum().backward()  # pyright: ignore[reportUnknownMemberType]
    assert prediction.grad is not None
    torch.testing.assert_close(prediction.grad, 2 * (prediction - wanted).detach() / 4)


def test_target_and_loss_never_read_a_value_back_to_the_host() -> None:
    z, t = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    for prediction_type in PREDICTION_TYPES:
        assert simple_loss(z, target(prediction_type, z, z, t, SCHEDULE.to("meta"))).shape == (2,)


def test_wrong_shapes_and_names_are_refused() -> None:
    z, t = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"one shape \[B,C,h,w\], got \[2, 4, 8, 8\] and \[2, 1, 8, 8\]"):
        simple_loss(z, z[:, :1])
    with pytest.raises(ValueError, match="one shape"):
        simple_loss(z[0], z[0])
    for prediction_type in PREDICTION_TYPES:
        with pytest.raises(ValueError, match="eps must have z_0's shape"):
            target(prediction_type, z, z[:1], t, SCHEDULE)
        with pytest.raises(ValueError, match="t must be int64"):
            target(prediction_type, z, z, t.int(), SCHEDULE)
    with pytest.raises(ValueError, match="unknown prediction_type 'noise'"):
        target("noise", z, z, t, SCHEDULE)  # pyright: ignore[reportArgumentType]


# DDPM's objective ---------------------------------------------------------------------------------


@prediction_types
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_timesteps", [40, 49, 1000])  # 49 · (1/49) is not 1 in float64
def test_unweighted_and_uniform_is_the_simple_loss_exactly(
    prediction_type: PredictionType, dtype: torch.dtype, num_timesteps: int
) -> None:
    schedule = make_schedule("linear", num_timesteps, 1e-4, 0.02)
    objective = ddpm(schedule, prediction_type)
    u = stratified(0.3, torch.arange(64), 64)
    z_0, eps, output = (draws(64, 2, 3, 3, seed=seed, dtype=dtype) for seed in (10, 11, 12))
    noised = objective.noised(z_0, u, eps)
    t = timesteps(u, uniform(num_timesteps))
    assert torch.equal(noised.time, t)
    assert torch.equal(noised.level, t)
    assert torch.equal(noised.z, q_sample(z_0, t, eps, schedule))
    loss, parts = objective.loss(output, z_0, eps, noised)
    expected = simple_loss(output, target(prediction_type, z_0, eps, t, schedule))
    assert loss.dtype == dtype
    assert torch.equal(loss, expected)
    assert parts == {}


@prediction_types
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_any_density_leaves_the_mean_of_the_loss_what_it_is_under_the_uniform_one(
    prediction_type: PredictionType, variance_type: VarianceType
) -> None:
    z_0, eps = draws(40, 2, 3, 3, seed=13), draws(40, 2, 3, 3, seed=14)
    output = draws(40, 4 if variance_type == "learned_range" else 2, 3, 3, seed=15)

    def expectation(density: Tensor) -> dict[str, float]:
        """E over u: the loss of t, that of one fixed sample, times p_t."""
        objective = ddpm(SHORT, prediction_type, weighting="min_snr", density=density, variance_type=variance_type)
        noised = objective.noised(z_0, middle_u(density), eps)
        assert torch.equal(noised.level, torch.arange(40))
        loss, parts = objective.loss(output, z_0, eps, noised)
        return {name: (density * part).sum().item() for name, part in {"loss": loss, **parts}.items()}

    unbiased = expectation(uniform(40))
    assert len(unbiased) == (3 if variance_type == "learned_range" else 1)
    for density in (log_normal(SHORT, -0.5, 0.7), from_table([5, 1, 0, 2], 40)):
        assert expectation(density) == pytest.approx(unbiased, rel=1e-12)


def test_the_mean_over_equally_spaced_u_is_the_mean_over_t() -> None:
    # The same by quadrature over u, through `noised` and its draw of t: 1/N is the width that an edge may be off by.
    density, num_points = log_normal(SHORT, -0.5, 0.7), 40_000
    u = (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points
    z_0, eps, output = (torch.full((num_points, 1, 1, 1), x, dtype=torch.float64) for x in (0.7, -0.4, 0.1))
    means: list[float] = []
    for density_of_t in (uniform(40), density):
        objective = ddpm(SHORT, "epsilon", weighting="elbo", density=density_of_t)
        means.append(objective.loss(output, z_0, eps, objective.noised(z_0, u, eps))[0].mean().item())
    assert means[1] == pytest.approx(means[0], rel=2e-3)


@prediction_types
def test_the_weight_of_t_multiplies_its_loss(prediction_type: PredictionType) -> None:
    z_0, eps, output = (draws(40, 1, 2, 2, seed=seed) for seed in (16, 17, 18))
    t = torch.arange(40)
    noised = Noised(q_sample(z_0, t, eps, SHORT), t, t)
    plain = ddpm(SHORT, prediction_type).loss(output, z_0, eps, noised)[0]
    weighted = ddpm(SHORT, prediction_type, weighting="truncated_snr").loss(output, z_0, eps, noised)[0]
    torch.testing.assert_close(weighted, plain * weights("truncated_snr", SHORT, prediction_type), rtol=1e-14, atol=0)


# Denoising score matching -------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [SCHEDULE, make_schedule("cosine", 1000, 1e-4, 0.02)])
def test_denoising_score_matching_is_the_simple_loss_over_the_noises_variance(schedule: Schedule) -> None:
    t, eps, prediction = torch.arange(1000), draws(1000, 1, 2, 2, seed=19), draws(1000, 1, 2, 2, seed=20)
    matched = denoising_score_matching(score_from_eps(prediction, t, schedule), eps, t, schedule)
    simple = simple_loss(prediction, eps)
    torch.testing.assert_close(matched, simple / (1 - schedule.alphas_cumprod), rtol=1e-12, atol=0)
    torch.testing.assert_close((1 - schedule.alphas_cumprod) * matched, simple, rtol=1e-12, atol=0)


def test_denoising_score_matching_has_its_minimum_at_the_score_of_the_noised_data() -> None:
    # For z_0 ~ N(m, s²) the marginal of z_t is N(√ᾱ m, ᾱ s² + 1-ᾱ), whose score is a line. Vincent 2011: the score of
    # the marginal minimises the distance to that of q(z_t | z_0), so what is left is uncorrelated with all of z_t.
    mean, std, num_draws, t = 0.8, 0.5, 20_000, 300
    at = torch.full((num_draws,), t)
    z_0, eps = mean + std * draws(num_draws, 1, 1, 1, seed=21), draws(num_draws, 1, 1, 1, seed=22)
    z_t = q_sample(z_0, at, eps, SCHEDULE)
    abar = SCHEDULE.alphas_cumprod[t].item()
    score = -(z_t - math.sqrt(abar) * mean) / (abar * std**2 + 1 - abar)
    residual = score_from_eps(eps, at, SCHEDULE) - score
    for direction in (torch.ones_like(z_t), z_t):
        gradient = (residual * direction).flatten()
        assert abs(gradient.mean()) < 4 * gradient.std() / math.sqrt(num_draws)
    best = denoising_score_matching(score, eps, at, SCHEDULE).mean()
    for worse in (1.1 * score, 0.9 * score, score + 0.1 * score.std()):
        assert denoising_score_matching(worse, eps, at, SCHEDULE).mean() > best


def test_denoising_score_matching_refuses_shapes_that_do_not_fit() -> None:
    z, t = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="one shape"):
        denoising_score_matching(z[:, :1], z, t, SCHEDULE)
    with pytest.raises(ValueError, match="t must be int64"):
        denoising_score_matching(z, z, t.float(), SCHEDULE)


# The hybrid: a mean squared error, and the bound for the variance ---------------------------------


def bound_by_hand(
    prediction: Tensor, v: Tensor, z_0: Tensor, eps: Tensor, t: int, schedule: Schedule, prediction_type: PredictionType
) -> Tensor:
    """The term of L_vlb at t in nats, [B,C,h,w], from β alone and the distributions of torch.

    q(z_{t-1} | z_t, z_0) by adding the precisions of its two factors; μ_θ by DDPM eq. 11 in ε; ln σ² by its two ends.
    """
    betas = schedule.betas.tolist()
    abar = math.prod(1 - beta for beta in betas[: t + 1])
    z_t = math.sqrt(abar) * z_0 + math.sqrt(1 - abar) * eps

    def reverse_of(t: int) -> tuple[float, float]:
        """Variance of q(z_{t-1} | z_t, z_0), and ᾱ_{t-1}."""
        before = math.prod(1 - beta for beta in betas[:t])
        return 1 / ((1 - betas[t]) / betas[t] + 1 / (1 - before)), before

    match prediction_type:
        case "epsilon":
            eps_theta = prediction
        case "v_prediction":
            eps_theta = math.sqrt(1 - abar) * z_t + math.sqrt(abar) * prediction
        case "sample":
            eps_theta = (z_t - math.sqrt(abar) * prediction) / math.sqrt(1 - abar)
    alpha = 1 - betas[t]
    mean = (z_t - betas[t] / math.sqrt(1 - abar) * eps_theta) / math.sqrt(alpha)
    smallest, largest = reverse_of(max(t, 1))[0], betas[t]
    model = Normal(mean, (math.log(smallest) + (v + 1) / 2 * math.log(largest / smallest)).div(2).exp())
    if t == 0:
        return -model.log_prob(z_0)
    variance, before = reverse_of(t)
    true_mean = variance * (math.sqrt(alpha) / betas[t] * z_t + math.sqrt(before) / (1 - before) * z_0)
    return kl_divergence(Normal(true_mean, math.sqrt(variance)), model)


@prediction_types
@pytest.mark.parametrize("t", [0, 1, 2, 20, 39])
def test_the_hybrid_is_the_squared_error_beside_the_bound_in_bits(prediction_type: PredictionType, t: int) -> None:
    vlb_weight, batch = 0.37, 5
    z_0, eps = draws(batch, 2, 3, 3, seed=30 + t), draws(batch, 2, 3, 3, seed=80 + t)
    output = draws(batch, 4, 3, 3, seed=130 + t).requires_grad_()
    density = from_table([2, 1], 40)
    objective = ddpm(
        SHORT,
        prediction_type,
        weighting="min_snr",
        density=density,
        variance_type="learned_range",
        vlb_weight=vlb_weight,
    )
    at = torch.full((batch,), t)
    loss, parts = objective.loss(output, z_0, eps, Noised(q_sample(z_0, at, eps, SHORT), at, at))

    prediction, v = output.detach().chunk(2, dim=1)
    mse = (prediction - target(prediction_type, z_0, eps, at, SHORT)).square().flatten(1).mean(1)
    nats = bound_by_hand(prediction, v, z_0, eps, t, SHORT, prediction_type).flatten(1).mean(1)
    bits = nats / math.log(2)
    weight, share = weights("min_snr", SHORT, prediction_type)[t], 40 * density[t]
    torch.testing.assert_close(loss.detach(), (weight * mse + vlb_weight * 40 / 1000 * bits) / share, rtol=1e-9, atol=0)
    # The parts are estimates: their means over t ~ p are L_simple and the sum of the bound's terms.
    assert set(parts) == {"simple", "vlb_bits_per_dim"}
    torch.testing.assert_close(parts["simple"], mse / share, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts["vlb_bits_per_dim"], 40 * bits / share, rtol=1e-9, atol=0)
    assert loss.requires_grad
    assert not any(part.requires_grad for part in parts.values())


def test_the_hybrid_of_a_zero_terminal_snr_is_the_same_sum() -> None:
    # At the last t β is 1 and ᾱ 0: μ̃_t forgets z_t, and v says -z_0.
    z_0, eps, output = draws(3, 2, 3, 3, seed=40), draws(3, 2, 3, 3, seed=41), draws(3, 4, 3, 3, seed=42)
    at = torch.full((3,), 39)
    for prediction_type in ("v_prediction", "sample"):
        objective = ddpm(ZERO_SNR, prediction_type, variance_type="learned_range")
        _, parts = objective.loss(output, z_0, eps, Noised(q_sample(z_0, at, eps, ZERO_SNR), at, at))
        before = ZERO_SNR.alphas_cumprod_prev[39].item()
        z_theta = output[:, :2] if prediction_type == "sample" else -output[:, :2]
        log_variance = (1 - (output[:, 2:] + 1) / 2) * math.log(1 - before)
        nats = kl_divergence(
            Normal(math.sqrt(before) * z_0, math.sqrt(1 - before)),
            Normal(math.sqrt(before) * z_theta, (log_variance / 2).exp()),
        )
        bits = nats.flatten(1).mean(1) / math.log(2)
        torch.testing.assert_close(parts["vlb_bits_per_dim"], 40 * bits, rtol=1e-9, atol=0)


@prediction_types
def test_the_bound_teaches_the_variance_alone(prediction_type: PredictionType) -> None:
    t = torch.arange(40)
    z_0, eps = draws(40, 2, 3, 3, seed=50), draws(40, 2, 3, 3, seed=51)
    noised = Noised(q_sample(z_0, t, eps, SHORT), t, t)

    def gradient(vlb_weight: float, weighting: Weighting = "unweighted") -> tuple[Tensor, Tensor]:
        output = draws(40, 4, 3, 3, seed=52).requires_grad_()
        objective = ddpm(
            SHORT, prediction_type, weighting=weighting, variance_type="learned_range", vlb_weight=vlb_weight
        )
        (grad,) = torch.autograd.grad(objective.loss(output, z_0, eps, noised)[0].sum(), output)
        return grad[:, :2], grad[:, 2:]

    # The channels of the prediction: exactly the gradient of the squared error, whatever stands beside it.
    output = draws(40, 4, 3, 3, seed=52)
    wanted = target(prediction_type, z_0, eps, t, SHORT)
    of_error = 2 * (output[:, :2] - wanted) / (2 * 3 * 3)
    without, with_bound = gradient(0.0), gradient(1.0)
    torch.testing.assert_close(without[0], of_error, rtol=1e-12, atol=0)
    assert torch.equal(with_bound[0], without[0])
    assert torch.equal(gradient(1000.0)[0], without[0])

    # Those of the variance: nothing but the bound, in proportion to its weight, untouched by that of the error.
    assert torch.equal(without[1], torch.zeros_like(without[1]))
    assert (with_bound[1] != 0).all()
    torch.testing.assert_close(gradient(3.0)[1], 3 * with_bound[1], rtol=1e-12, atol=1e-15)
    assert torch.equal(gradient(1.0, "truncated_snr")[1], with_bound[1])
    v = output[:, 2:].clone().requires_grad_()
    bits = torch.stack(
        [bound_by_hand(output[k, :2], v[k], z_0[k], eps[k], k, SHORT, prediction_type).mean() for k in range(40)]
    ) / math.log(2)
    (by_hand,) = torch.autograd.grad(40 / 1000 * bits.sum(), v)
    torch.testing.assert_close(with_bound[1], by_hand, rtol=1e-7, atol=1e-10)


def test_the_best_variance_is_between_its_ends_and_found_by_the_bound() -> None:
    # For a datum that the network knows, q's own variance β̃ is the best: v = -1 has the least bound at t ≥ 1.
    t = torch.full((201,), 5)
    z_0, eps = torch.full((201, 1, 1, 1), 0.3).double(), torch.full((201, 1, 1, 1), -0.9).double()
    v = torch.linspace(-2, 1, 201, dtype=torch.float64).view(-1, 1, 1, 1)
    objective = ddpm(SHORT, "epsilon", variance_type="learned_range")
    noised = Noised(q_sample(z_0, t, eps, SHORT), t, t)
    bits = objective.loss(torch.cat([eps, v], dim=1), z_0, eps, noised)[1]["vlb_bits_per_dim"]
    assert v[bits.argmin()].item() == pytest.approx(-1, abs=0.015)
    assert bits.min().item() == pytest.approx(0, abs=1e-3)
    assert (bits >= -1e-12).all()  # a divergence


def test_the_loss_is_float32_unless_an_input_is_float64() -> None:
    t = torch.tensor([0, 20])
    cases: list[tuple[VarianceType, int]] = [("fixed_large", 1), ("learned_range", 2)]
    for variance_type, channels in cases:
        objective = ddpm(SHORT, "v_prediction", density=log_normal(SHORT, 0, 1), variance_type=variance_type)
        for dtypes, wanted in (
            ((torch.bfloat16, torch.float32, torch.bfloat16), torch.float32),
            ((torch.float32, torch.float32, torch.float32), torch.float32),
            ((torch.float64, torch.float32, torch.float32), torch.float64),
            ((torch.float32, torch.float32, torch.float64), torch.float64),
        ):
            output, z_0, eps = (
                draws(2, width, 3, 3, seed=60, dtype=dtype)
                for width, dtype in zip((channels, 1, 1), dtypes, strict=True)
            )
            loss, parts = objective.loss(output, z_0, eps, Noised(q_sample(z_0, t, eps, SHORT), t, t))
            assert {tensor.dtype for tensor in (loss, *parts.values())} == {wanted}
            assert all(tensor.shape == (2,) for tensor in (loss, *parts.values()))


def test_the_loss_never_reads_a_value_back_to_the_host() -> None:
    z, t = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    cases: list[tuple[VarianceType, Tensor]] = [("fixed_small", z), ("learned_range", torch.cat([z, z], dim=1))]
    for prediction_type in PREDICTION_TYPES:
        for variance_type, output in cases:
            objective = Ddpm(
                SCHEDULE.to("meta"),
                prediction_type,
                weights("min_snr", SCHEDULE, prediction_type).to("meta"),
                log_normal(SCHEDULE, 0, 1),
                variance_type,
            )
            assert objective.importance.device.type == "meta"
            loss, _ = objective.loss(output, z, z, Noised(z, t, t))
            assert loss.shape == (2,)
            # u stays on the CPU; t goes to the latents' device.
            noised = objective.noised(z, torch.tensor([0.2, 0.7], dtype=torch.float64), z)
            assert noised.z.device.type == noised.time.device.type == "meta"


def test_an_output_of_the_wrong_number_of_channels_is_refused() -> None:
    z, t = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
    noised = Noised(z, t, t)
    with pytest.raises(ValueError, match=r"one shape \[B,C,h,w\], got \[2, 8, 8, 8\] and \[2, 4, 8, 8\]"):
        ddpm(SHORT, "epsilon").loss(torch.zeros(2, 8, 8, 8), z, z, noised)
    learned = ddpm(SHORT, "epsilon", variance_type="learned_range")
    with pytest.raises(ValueError, match="2C output channels, prediction and variance, got 5"):
        learned.loss(torch.zeros(2, 5, 8, 8), z, z, noised)
    with pytest.raises(ValueError, match=r"one shape \[B,C,h,w\], got \[2, 2, 8, 8\] and \[2, 4, 8, 8\]"):
        learned.loss(z, z, z, noised)


# The terms of the bound ---------------------------------------------------------------------------


def test_gaussian_kl_and_nll_are_those_of_the_distributions() -> None:
    mean_1, mean_2, log_1, log_2 = (2 * draws(7, 2, 3, 3, seed=seed) for seed in (70, 71, 72, 73))
    first, second = Normal(mean_1, (log_1 / 2).exp()), Normal(mean_2, (log_2 / 2).exp())
    kl = gaussian_kl(mean_1, log_1, mean_2, log_2)
    torch.testing.assert_close(kl, kl_divergence(first, second), rtol=1e-12, atol=1e-13)
    assert (kl > 0).all()
    assert torch.equal(gaussian_kl(mean_1, log_1, mean_1, log_1), torch.zeros_like(kl))
    torch.testing.assert_close(gaussian_nll(mean_2, mean_1, log_1), -first.log_prob(mean_2), rtol=1e-12, atol=1e-13)
    assert gaussian_kl(*(x.float() for x in (mean_1, log_1, mean_2, log_2))).dtype == torch.float64
    assert gaussian_nll(mean_2.float(), mean_1.float(), log_1.float()).dtype == torch.float64


def test_gaussian_kl_keeps_its_digits_where_the_variances_are_near() -> None:
    # ½(e^r - 1 - r) is r²/4 (1 + r/3 + r²/12 + …); exp(r) - 1 would leave it 4 digits at r = 1e-6.
    r = torch.tensor([1e-6, -1e-6, 3e-6, 1e-5], dtype=torch.float64)
    zero = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(gaussian_kl(zero, r, zero, zero), r.square() / 4 * (1 + r / 3), rtol=1e-8, atol=0)


@pytest.mark.parametrize("schedule", [SCHEDULE, SHORT, ZERO_SNR])
def test_the_prior_term_is_the_divergence_of_the_last_latent_from_pure_noise(schedule: Schedule) -> None:
    z_0 = draws(4, 2, 3, 3, seed=74)
    abar = math.prod(1 - beta for beta in schedule.betas.tolist())
    last = Normal(math.sqrt(abar) * z_0, torch.tensor(math.sqrt(1 - abar), dtype=torch.float64))
    wanted = kl_divergence(last, Normal(torch.zeros_like(z_0), torch.ones_like(z_0))).flatten(1).mean(1)
    prior = prior_term(z_0, schedule)
    torch.testing.assert_close(prior, wanted, rtol=1e-9, atol=1e-15)
    assert prior_term(z_0.float(), schedule).dtype == torch.float64
    if schedule is ZERO_SNR:
        assert torch.equal(prior, torch.zeros_like(prior))


def test_the_terms_of_the_bound_add_up_to_the_entropy_for_a_known_gaussian() -> None:
    # z_0 ~ N(0, 1): every z_t ~ N(0, 1) too, and p(z_{t-1} | z_t) = q(z_{t-1} | z_t) is Gaussian, N(√α_t z_t, β_t).
    # Such a model is the data itself, so E[L_T + Σ L_{t-1} + L_0] is the entropy of N(0, 1), ½ ln 2πe: the bound is
    # tight. Each term is a quadratic in (z_0, ε), whose mean over the four points (±√2, 0), (0, ±√2) is exact.
    r = math.sqrt(2)
    z_0 = torch.tensor([r, -r, 0, 0], dtype=torch.float64).view(4, 1, 1, 1)
    eps = torch.tensor([0, 0, r, -r], dtype=torch.float64).view(4, 1, 1, 1)
    total = prior_term(z_0, SHORT).mean().item()
    for t, beta in enumerate(SHORT.betas.tolist()):
        at = torch.full((4,), t)
        z_t = q_sample(z_0, at, eps, SHORT)
        log_variance = torch.full((4, 1, 1, 1), math.log(beta), dtype=torch.float64)
        term = vlb_term(z_0, z_t, at, SHORT, mean=math.sqrt(1 - beta) * z_t, log_variance=log_variance)
        total += term.mean().item()
    assert total == pytest.approx(0.5 * math.log(2 * math.pi * math.e), rel=1e-12)


def test_vlb_term_takes_one_variance_for_a_sample_or_one_for_each_element() -> None:
    t = torch.tensor([0, 1, 39])
    z_0, z_t, mean = (draws(3, 2, 3, 3, seed=seed) for seed in (75, 76, 77))
    log_variance = draws(3, 1, 1, 1, seed=78)
    one = vlb_term(z_0, z_t, t, SHORT, mean=mean, log_variance=log_variance)
    each = vlb_term(z_0, z_t, t, SHORT, mean=mean, log_variance=log_variance.expand(3, 2, 3, 3))
    assert one.shape == (3,)
    torch.testing.assert_close(one, each, rtol=1e-14, atol=0)
    refused: list[Callable[[], Tensor]] = [
        lambda: vlb_term(z_0, z_t[:, :1], t, SHORT, mean=mean, log_variance=log_variance),
        lambda: vlb_term(z_0, z_t, t, SHORT, mean=mean[:1], log_variance=log_variance),
        lambda: vlb_term(z_0, z_t, t.int(), SHORT, mean=mean, log_variance=log_variance),
    ]
    for call in refused:
        with pytest.raises(ValueError, match="must"):
            call()
