"""The SDE against moments, Fokker-Planck and exact laws: orders of convergence by densities, samples by their law."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from gaussian_mixture import Mixture
from scipy.integrate import quad
from scipy.stats import kstest
from torch import Tensor

from pipeline.diffusion.schedule import Schedule, make_schedule
from pipeline.diffusion.sde import (
    Score,
    VpSde,
    euler,
    euler_maruyama,
    euler_maruyama_step,
    euler_step,
    even_times,
    heun,
    heun_step,
    integrate,
    ode_drift,
    reverse_drift,
)

SDE = VpSde.linear()
SD = make_schedule("scaled_linear", 1000, 0.00085, 0.012)
ZERO_SNR = make_schedule("scaled_linear", 1000, 0.00085, 0.012, zero_terminal_snr=True)
DATA = Mixture((0.35, 0.65), (-1.0, 0.8), (0.45, 0.35))
INVERSE_STEPS = (64, 128, 256, 512)  # 1/h
every_sde = pytest.mark.parametrize("sde", [SDE, VpSde.of_schedule(SD)], ids=["linear", "of_schedule"])


def law(t: float, sde: VpSde = SDE, data: Mixture = DATA) -> Mixture:
    """p_t, exactly."""
    return data.diffused(sde.alpha(t), sde.sigma(t))


def exact_score(z: Tensor, t: float) -> Tensor:
    return law(t).score(z)


def line(reach: float, num_points: int) -> Tensor:
    return torch.linspace(-reach, reach, num_points, dtype=torch.float64)


def p_value(z: Tensor, wanted: Mixture) -> float:
    """Of the Kolmogorov-Smirnov test that z [N] was drawn from the mixture."""
    return float(kstest(z.numpy(), lambda x: wanted.cdf(torch.from_numpy(x)).numpy(), method="asymp").pvalue)


def order(errors: list[float]) -> float:
    """Least-squares slope of log error over log h."""
    return float(np.polyfit(-np.log(INVERSE_STEPS), np.log(np.abs(errors)), 1)[0])


# The SDE itself ----------------------------------------------------------------------------------


@every_sde
def test_signal_and_noise_keep_the_variance(sde: VpSde) -> None:
    for t in even_times(0, sde.end, 37):
        assert sde.alpha(t) ** 2 + sde.sigma(t) ** 2 == pytest.approx(1, abs=1e-15)
        assert sde.diffusion(t) ** 2 == pytest.approx(sde.beta(t), rel=1e-15)
        z = torch.tensor([2.0, -1.0], dtype=torch.float64)
        torch.testing.assert_close(sde.drift(z, t), -0.5 * sde.beta(t) * z, rtol=1e-15, atol=0)
        mean, std = sde.marginal(z, t)
        assert std == sde.sigma(t)
        assert torch.equal(mean, sde.alpha(t) * z)


def test_linear_beta_is_integrated_in_closed_form() -> None:
    # Song et al. 2021b, appendix C: α² = exp(-½t²(β_max-β_min) - tβ_min).
    for t in even_times(0, 1, 10):
        assert SDE.alpha(t) == pytest.approx(math.exp(-t * t * 19.9 / 4 - t * 0.1 / 2), rel=1e-14)
        assert SDE.integrated_beta(t) == pytest.approx(quad(SDE.beta, 0, t)[0], abs=1e-12)
        assert SDE.time_of(SDE.integrated_beta(t)) == pytest.approx(t, abs=1e-14)
    assert (SDE.alpha(0), SDE.sigma(0)) == (1, 0)
    assert SDE.sigma(1e-9) == pytest.approx(math.sqrt(1e-10), rel=1e-6)  # expm1: 1 - exp(-1e-10) would lose digits


@every_sde
def test_beta_is_the_slope_of_its_integral(sde: VpSde) -> None:
    for t in (0.0315, 0.2505, 0.7777, 0.9995):  # between indices, where of_schedule has a slope
        rise = sde.integrated_beta(t + 1e-5) - sde.integrated_beta(t - 1e-5)
        assert sde.beta(t) == pytest.approx(rise / 2e-5, rel=1e-6)


@pytest.mark.parametrize("schedule", [SD, ZERO_SNR], ids=["sd", "zero_snr"])
def test_of_schedule_is_the_schedule_at_its_indices(schedule: Schedule) -> None:
    sde = VpSde.of_schedule(schedule)
    num_finite = 999 if schedule.reaches_zero_snr else 1000
    assert sde.end == num_finite / 1000
    for i in range(num_finite):
        t = (i + 1) / 1000
        assert sde.alpha(t) ** 2 == pytest.approx(schedule.alphas_cumprod[i].item(), rel=1e-11)
        assert sde.sigma(t) ** 2 == pytest.approx(1 - schedule.alphas_cumprod[i].item(), rel=1e-11)
        assert sde.time_of(sde.integrated_beta(t)) == pytest.approx(t, abs=1e-11)
    # The β of an index is what the SDE's β adds up to on the way to it: 1 - β_i = exp(-∫β).
    for i in (1, 2, 500, num_finite - 1):
        between = quad(sde.beta, i / 1000 + 1e-12, (i + 1) / 1000 - 1e-12, epsabs=1e-13)[0]
        assert -math.expm1(-between) == pytest.approx(schedule.betas[i].item(), rel=1e-7)
    # Before index 0 it goes on in a line, and begins a little noised.
    first, second = schedule.log_snr[:2].tolist()
    assert math.log(sde.alpha(0) ** 2 / sde.sigma(0) ** 2) == pytest.approx(2 * first - second, rel=1e-12)


def test_prior_is_the_standard_normal_and_p_end_is_near_it() -> None:
    z = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(0, 1)
    torch.testing.assert_close(SDE.prior_log_density(z), normal.log_prob(z.double()).sum((1, 2, 3)))
    assert SDE.prior_log_density(z).dtype == torch.float64
    assert SDE.prior_log_density(torch.zeros(5)).shape == (5,)
    grid = line(6, 200)
    assert (law(1.0).density(grid) - SDE.prior_log_density(grid).exp()).abs().max() < 5e-3


@every_sde
def test_densities_obey_fokker_planck(sde: VpSde) -> None:
    # ∂p/∂t = -∂(f p)/∂z + ½g² ∂²p/∂z², each derivative by a central difference.
    z, h = line(3, 61), 1e-4
    for t in (0.1005, 0.4005, 0.9005):
        late, early = (law(t + s, sde).density(z) for s in (1e-5, -1e-5))
        p, above, below = (law(t, sde).density(z + s) for s in (0, h, -h))
        flux = (sde.drift(z + h, t) * above - sde.drift(z - h, t) * below) / (2 * h)
        spread = 0.5 * sde.diffusion(t) ** 2 * (above - 2 * p + below) / h**2
        torch.testing.assert_close((late - early) / 2e-5, spread - flux, rtol=0, atol=1e-5)


def test_moments_obey_the_sde_and_end_at_the_marginal() -> None:
    # An affine drift keeps a Gaussian one: d mean/dt = f(mean), d var/dt = 2 f(var) + g².
    def change(t: float, moments: Tensor) -> Tensor:
        return torch.stack([SDE.drift(moments[0], t), 2 * SDE.drift(moments[1], t) + SDE.diffusion(t) ** 2])

    z_0 = torch.tensor(1.7, dtype=torch.float64)
    found, _ = integrate(change, torch.stack([z_0, torch.zeros_like(z_0)]), 0, 0.6, rtol=1e-11, atol=1e-11)
    mean, std = SDE.marginal(z_0, 0.6)
    assert found.tolist() == pytest.approx([mean.item(), std**2], abs=1e-10)


def test_the_forward_sde_simulated_has_the_marginal() -> None:
    generator = torch.Generator().manual_seed(1)
    num_draws, num_steps, end = 20_000, 300, 0.6
    z = torch.full((num_draws,), 1.7, dtype=torch.float64)
    for k in range(num_steps):
        t, h = end * k / num_steps, end / num_steps
        noise = torch.randn(num_draws, generator=generator, dtype=torch.float64)
        z = z + h * SDE.drift(z, t) + math.sqrt(h) * SDE.diffusion(t) * noise
    mean, std = SDE.marginal(torch.tensor(1.7), end)
    assert p_value(z, Mixture((1.0,), (mean.item(),), (std,))) > 0.01


# Orders ------------------------------------------------------------------------------------------

# Expectations whose errors shrink at the order of the method, without sampling.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda z: z,
    "second moment": torch.square,
    "cosine": torch.cos,
    "share above 0, smoothed": lambda z: torch.sigmoid(4 * z),
}
START, END = 1.0, 0.125  # whole numbers of each step apart


def test_euler_maruyama_has_weak_order_one() -> None:
    # The density itself goes from step to step: p_next(z') = ∫ N(z'; mean(z), std²) p(z) dz, mean and std those of
    # the step under test. Sums over an even grid are as good as exact for functions as smooth as these.
    grid = line(9, 400)
    spacing, zeros, ones = grid[1] - grid[0], torch.zeros_like(grid), torch.ones_like(grid)
    exact = law(END).density(grid)
    errors: dict[str, list[float]] = {name: [] for name in (*FUNCTIONS, "density, L1")}
    for inverse in INVERSE_STEPS:
        times = even_times(START, END, round((START - END) * inverse))
        p = law(START).density(grid)
        for start, end in pairwise(times):
            mean = euler_maruyama_step(exact_score, SDE, grid, start=start, end=end, noise=zeros)
            std = euler_maruyama_step(exact_score, SDE, grid, start=start, end=end, noise=ones) - mean
            kernel = torch.exp(-0.5 * ((grid[:, None] - mean) / std).square()) / (std * math.sqrt(2 * math.pi))
            p = spacing * kernel @ p
        assert (spacing * p.sum()).item() == pytest.approx(1, abs=1e-10)  # the grid is wide and fine enough
        for name, function in FUNCTIONS.items():
            errors[name].append((spacing * (function(grid) * (p - exact)).sum()).item())
        errors["density, L1"].append((spacing * (p - exact).abs().sum()).item())
    for name, found in errors.items():
        print(f"Euler-Maruyama, {name}: weak order {order(found):.3f}")
        assert order(found) == pytest.approx(1, abs=0.15), name
        assert abs(found[-1]) > 1e-6, name  # far above rounding


@pytest.mark.parametrize(("step", "wanted", "slack"), [(euler_step, 1, 0.15), (heun_step, 2, 0.2)])
def test_order_of_the_ode_steps(step: Callable[..., Tensor], wanted: int, slack: float) -> None:
    # On a line the ODE keeps every quantile, so its solution is known without solving it.
    nodes = line(9, 2001)
    weights = (nodes[1] - nodes[0]) * law(START).density(nodes)
    solution = law(END).quantile(law(START).cdf(nodes))
    expected = (nodes[1] - nodes[0]) * law(END).density(nodes)
    errors: dict[str, list[float]] = {name: [] for name in (*FUNCTIONS, "solution, root mean square")}
    for inverse in INVERSE_STEPS:
        z = nodes
        for start, end in pairwise(even_times(START, END, round((START - END) * inverse))):
            z = step(exact_score, SDE, z, start=start, end=end)
        for name, function in FUNCTIONS.items():
            errors[name].append(((function(z) * weights).sum() - (function(nodes) * expected).sum()).item())
        inside = nodes.abs() < 6  # beyond, the cdf is 0 or 1 to the last bit, and no quantile comes back
        far = ((z - solution).square() * weights)[inside].sum().sqrt()
        errors["solution, root mean square"].append(far.item())
    if step is euler_step:
        # Its error in the second moment is 0.016 h + 0.5 h²: of order 1 in the end, but not yet at 1/64.
        del errors["second moment"]
    for name, found in errors.items():
        print(f"{step.__name__}, {name}: order {order(found):.3f}")
        assert order(found) == pytest.approx(wanted, abs=slack), name
        assert abs(found[-1]) > 1e-9, name  # far above rounding


def test_walks_are_their_steps_one_after_another() -> None:
    z, times = line(3, 7), [1.0, 0.7, 0.65, 0.2]
    noises = [torch.full_like(z, k) for k in range(3)]
    by_hand = [z, z, z]
    for k, (start, end) in enumerate(pairwise(times)):
        by_hand = [
            euler_maruyama_step(exact_score, SDE, by_hand[0], start=start, end=end, noise=noises[k]),
            euler_step(exact_score, SDE, by_hand[1], start=start, end=end),
            heun_step(exact_score, SDE, by_hand[2], start=start, end=end),
        ]
    assert torch.equal(euler_maruyama(exact_score, SDE, z, times, noises.__getitem__), by_hand[0])
    assert torch.equal(euler(exact_score, SDE, z, times), by_hand[1])
    assert torch.equal(heun(exact_score, SDE, z, times), by_hand[2])
    # z + ½β(z + 2s)h + √(βh)·noise, h the step: all at its start.
    beta, score = 0.1 + 19.9 * 0.7, exact_score(z, 0.7)
    step = euler_maruyama_step(exact_score, SDE, z, start=0.7, end=0.65, noise=torch.ones_like(z))
    torch.testing.assert_close(step, z + beta / 2 * (z + 2 * score) * 0.05 + math.sqrt(beta * 0.05))
    torch.testing.assert_close(
        reverse_drift(exact_score, SDE, z, 0.3) - SDE.drift(z, 0.3),
        2 * (ode_drift(exact_score, SDE, z, 0.3) - SDE.drift(z, 0.3)),
    )


# Laws --------------------------------------------------------------------------------------------

NUM_DRAWS = 100_000
NARROW = Mixture((0.35, 0.65), (-1.0, 0.8), (0.3, 0.2))
SCORES: dict[str, Score] = {
    "exact": lambda z, t: law(t, data=NARROW).score(z),
    "scaled by 1.05": lambda z, t: 1.05 * law(t, data=NARROW).score(z),
    "0.01 late": lambda z, t: law(min(t + 0.01, 1.0), data=NARROW).score(z),
}


def closing_in(num_steps: int) -> list[float]:
    """Times from 1 to 0 in steps that shrink towards the data, where the score changes fastest."""
    return [(1 - k / num_steps) ** 2 for k in range(num_steps + 1)]


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("way", ["sde", "ode"])
def test_samples_have_the_law_of_the_data_and_not_with_a_wrong_score(kind: str, way: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z = law(1.0, data=NARROW).draw(NUM_DRAWS, generator)

    def noise(k: int) -> Tensor:
        del k
        return torch.randn(NUM_DRAWS, generator=generator, dtype=torch.float64)

    if way == "sde":
        z = euler_maruyama(SCORES[kind], SDE, z, closing_in(400), noise)
    else:
        z = heun(SCORES[kind], SDE, z, closing_in(100))
    p = p_value(z, NARROW)
    print(f"{way}, score {kind}: p = {p:.3g}")
    assert p > 0.01 if kind == "exact" else p < 0.01
