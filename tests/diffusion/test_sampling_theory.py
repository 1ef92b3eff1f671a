"""The reverse steps against theory: q's marginals, the shorter chain, and the ODE that DDIM solves."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from gaussian_mixture import Mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.diffusion.process import learned_log_variance, p_mean, reverse_variance
from pipeline.diffusion.sampling import ancestral_step, chain, ddim_step, timesteps_of
from pipeline.diffusion.schedule import PredictionType, VarianceType, make_schedule, respaced

T = 1000
SCHEDULE = make_schedule("scaled_linear", T, 0.00085, 0.012)
COSINE = make_schedule("cosine", T, 1e-4, 0.02)
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
VARIANCE_TYPES: tuple[VarianceType, ...] = ("fixed_small", "fixed_large", "learned_range")
every_prediction = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_indices() -> st.SearchStrategy[tuple[int, int]]:
    """(t, t_prev), T > t > t_prev ≥ -1."""
    return st.integers(0, T - 1).flatmap(lambda t: st.tuples(st.just(t), st.integers(-1, t - 1)))


@given(pair=two_indices(), prediction_type=st.sampled_from(PREDICTION_TYPES), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_ddim_with_eta_one_is_ancestral_with_the_small_variance(
    pair: tuple[int, int], prediction_type: PredictionType, seed: int
) -> None:
    # DDIM section 4.1: with that σ the generative process becomes a DDPM.
    prediction, z_t, noise = (draws(2, 3, 2, 2, seed=3 * seed + k) for k in range(3))
    words: dict[str, Any] = {"prediction_type": prediction_type, "noise": noise}
    ddim = ddim_step(prediction, z_t, *pair, SCHEDULE, eta=1.0, **words)
    ancestral = ancestral_step(prediction, z_t, *pair, SCHEDULE, variance_type="fixed_small", **words)
    torch.testing.assert_close(ddim, ancestral, rtol=0, atol=1e-11)


@given(pair=two_indices(), z_0=st.floats(-3, 3), eta=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_perfect_step_keeps_the_marginal_of_q(pair: tuple[int, int], z_0: float, eta: float) -> None:
    # DDIM lemma 1: from z_t ~ q(z_t | z_0), with z_0 known, z_prev ~ q(z_prev | z_0), whatever σ. A step is affine in
    # z_t and the noise: three inputs tell its mean and its variance.
    t, t_prev = pair
    z_t, noise = (torch.tensor(values).double().view(3, 1, 1, 1) for values in ([0.0, 1, 0], [0.0, 0, 1]))
    known = torch.full((3, 1, 1, 1), z_0, dtype=torch.float64)
    abar = SCHEDULE.alphas_cumprod[t].item()
    abar_prev = SCHEDULE.alphas_cumprod[t_prev].item() if t_prev >= 0 else 1.0
    words: dict[str, Any] = {"prediction_type": "sample", "noise": noise}
    for step in (
        ddim_step(known, z_t, t, t_prev, SCHEDULE, eta=eta, **words),
        ancestral_step(known, z_t, t, t_prev, SCHEDULE, variance_type="fixed_small", **words),
    ):
        at_zero, with_z_t, with_noise = step.flatten().tolist()
        slope, sigma = with_z_t - at_zero, with_noise - at_zero
        assert abs(at_zero + slope * math.sqrt(abar) * z_0 - math.sqrt(abar_prev) * z_0) < 1e-10
        assert abs(slope**2 * (1 - abar) + sigma**2 - (1 - abar_prev)) < 1e-11


@every_prediction
def test_one_index_down_is_the_p_of_process(prediction_type: PredictionType) -> None:
    for t in (1, 2, 500, T - 1):
        at = torch.full((2,), t)
        output, z_t, noise = draws(2, 6, 2, 2, seed=t), draws(2, 3, 2, 2, seed=t + 1), draws(2, 3, 2, 2, seed=t + 2)
        prediction, learned = learned_log_variance(output, at, SCHEDULE)
        mean = p_mean(prediction, z_t, at, SCHEDULE, prediction_type)
        for variance_type in VARIANCE_TYPES:
            if variance_type == "learned_range":
                std, said = (0.5 * learned).exp(), output
            else:
                std, said = reverse_variance(variance_type, SCHEDULE)[t].sqrt(), prediction
            words: dict[str, Any] = {"prediction_type": prediction_type, "variance_type": variance_type}
            step = ancestral_step(said, z_t, t, t - 1, SCHEDULE, **words, noise=noise)
            torch.testing.assert_close(step, mean + std * noise, rtol=0, atol=1e-11)


@every_prediction
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_skipping_indices_is_the_respaced_chain(prediction_type: PredictionType, variance_type: VarianceType) -> None:
    # Nichol & Dhariwal 2021 section 4: a schedule of its own, of the kept indices, walked without a skip.
    kept = timesteps_of("trailing", T, 10)[::-1]
    short = respaced(COSINE, torch.tensor(kept))
    words: dict[str, Any] = {"prediction_type": prediction_type, "variance_type": variance_type}
    for i, t in enumerate(kept):
        output = draws(2, 6 if variance_type == "learned_range" else 3, 2, 2, seed=i)
        z_t, noise = draws(2, 3, 2, 2, seed=i + 50), draws(2, 3, 2, 2, seed=i + 90)
        t_prev = kept[i - 1] if i > 0 else -1
        skipping = ancestral_step(output, z_t, t, t_prev, COSINE, **words, noise=noise)
        one_down = ancestral_step(output, z_t, i, i - 1, short, **words, noise=noise)
        torch.testing.assert_close(skipping, one_down, rtol=1e-11, atol=1e-11)  # z_0 is up to 1e5 at √ᾱ = 5e-5


def test_ddim_converges_to_the_probability_flow_ode() -> None:
    # DDIM section 4.3: Euler's method for an ODE, in other coordinates; so first order. On a line that ODE keeps order,
    # and with it every quantile: its solution is known without solving it.
    total = 8192  # fine, so that the table of ᾱ is near enough to a function of time
    schedule = make_schedule("linear", total, 0.1 / total, 20 / total)
    data = Mixture((0.35, 0.65), (-1.0, 0.8), (0.45, 0.35))

    def law(t: int) -> Mixture:
        abar = schedule.alphas_cumprod[t].item()
        return data.diffused(math.sqrt(abar), math.sqrt(1 - abar))

    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    exact, start = data.quantile(u), law(total - 1).quantile(u)
    step_counts, errors = (32, 64, 128, 256), []
    for num_steps in step_counts:
        z = start.view(-1, 1, 1, 1)
        for t, t_prev in chain(timesteps_of("trailing", total, num_steps)):
            eps = -(1 - schedule.alphas_cumprod[t]).sqrt() * law(t).score(z)
            z = ddim_step(eps, z, t, t_prev, schedule, prediction_type="epsilon")
        errors.append((z.flatten() - exact).square().mean().sqrt().item())
    assert errors[-1] < 0.01
    assert -np.polyfit(np.log(step_counts), np.log(errors), 1)[0] == pytest.approx(1, abs=0.05)
