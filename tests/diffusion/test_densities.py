"""Uniform numbers are stratified, t falls as its density says, and the densities are what they are called."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from pipeline.diffusion.densities import UNIFORM_SHARE, from_table, log_normal, stratified, timesteps, uniform
from pipeline.diffusion.schedule import Schedule, make_schedule

LAST_BELOW_ONE = math.nextafter(1.0, 0.0)
SCHEDULES = {
    "linear": make_schedule("linear", 1000, 1e-4, 0.02),
    "shifted": make_schedule("linear", 1000, 1e-4, 0.02, resolution_shift=4.0),
    "cosine": make_schedule("cosine", 1000, 1e-4, 0.02),
    "zero": make_schedule("scaled_linear", 1000, 0.00085, 0.012, zero_terminal_snr=True),
}
DENSITIES = {
    "uniform": uniform(1000),
    "log_normal": log_normal(SCHEDULES["linear"], -1.2, 1.2),
    "narrow": log_normal(SCHEDULES["cosine"], 0.5, 0.3),
    "zero": log_normal(SCHEDULES["zero"], 0.0, 1.0),
    "table": from_table([8, 4, 2, 1, 0, 1, 5], 1000),
}
densities = pytest.mark.parametrize("name", list(DENSITIES))


# u ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [1, 2, 7, 64, 1000, 4096])
def test_every_stratum_gets_exactly_one_point(num_slots: int) -> None:
    for u_0 in np.random.default_rng(num_slots).random(50).tolist():
        u = stratified(u_0, np.arange(num_slots), num_slots)
        assert np.array_equal(np.sort(np.floor(u * num_slots)), np.arange(num_slots))


@given(
    u_0=st.one_of(
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 4095).map(lambda k: k / 4096),
        st.sampled_from([0.0, 5e-324, 2**-53, 0.5 - 2**-54, LAST_BELOW_ONE]),
    ),
    num_slots=st.integers(1, 300),
)
@settings(max_examples=150, deadline=None)
def test_points_are_one_stratum_apart_and_below_one(u_0: float, num_slots: int) -> None:
    u = [stratified(u_0, slot, num_slots) for slot in range(num_slots)]
    assert all(0 <= point < 1 for point in u)
    # On the circle, so that an edge that rounds to the other side of 0 is no exception.
    circle = sorted(u)
    gaps = [after - before for before, after in pairwise([*circle, circle[0] + 1])]
    assert gaps == pytest.approx([1 / num_slots] * num_slots, abs=1e-15)


@pytest.mark.parametrize("slot", [0, 1, 30, 63])
def test_each_slot_alone_is_uniform(slot: int) -> None:
    u = stratified(np.random.default_rng(slot).random(4000), slot, 64)
    assert stats.kstest(u, "uniform").pvalue > 1e-3


def test_floats_arrays_and_tensors_agree_bitwise() -> None:
    num_slots = 37
    for u_0 in (0.0, 0.3, 1 / 3, LAST_BELOW_ONE):
        one_by_one = [stratified(u_0, slot, num_slots) for slot in range(num_slots)]
        of_array = stratified(u_0, np.arange(num_slots), num_slots)
        of_tensor = stratified(u_0, torch.arange(num_slots), num_slots)
        of_tensor_u_0 = stratified(torch.tensor(u_0, dtype=torch.float64), torch.arange(num_slots), num_slots)
        assert of_array.dtype == np.float64
        assert of_tensor.dtype == of_tensor_u_0.dtype == torch.float64
        assert of_array.tolist() == of_tensor.tolist() == of_tensor_u_0.tolist() == one_by_one


@pytest.mark.parametrize(
    ("u_0", "slot", "num_slots", "message"),
    [
        (1.0, 0, 4, r"u_0 must lie in \[0, 1\), got 1.0"),
        (-1e-20, 0, 4, "u_0 must lie"),  # -1e-20 % 1.0 is 1.0
        (math.nan, 0, 4, "u_0 must lie"),
        (0.5, 4, 4, r"slot must lie in \[0, 4\), got 4"),
        (0.5, -1, 4, "slot must lie"),
        (0.5, 0, 0, "num_slots must be at least 1, got 0"),
    ],
)
def test_stratified_refuses(u_0: float, slot: int, num_slots: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stratified(u_0, slot, num_slots)
    with pytest.raises(ValueError, match=message.split(", got", maxsplit=1)[0]):
        stratified(u_0, torch.tensor([slot]), num_slots)
    with pytest.raises(ValueError, match=message.split(", got", maxsplit=1)[0]):
        stratified(np.array([u_0]), slot, num_slots)


# t ------------------------------------------------------------------------------------------------


def test_timesteps_of_a_uniform_density_are_equal_shares_of_the_unit_interval() -> None:
    middles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.equal(timesteps(middles, uniform(1000)), torch.arange(1000))
    assert timesteps(torch.zeros(3, dtype=torch.float64), uniform(1000)).tolist() == [0, 0, 0]
    assert timesteps(middles, uniform(1000)).dtype == torch.int64
    assert timesteps(middles[:0], uniform(1000)).shape == (0,)
    # 1000 times 1/1000 is 1 in float64, so the edges themselves are k/1000, and belong to the t above them.
    assert torch.equal(timesteps(torch.arange(1000, dtype=torch.float64) / 1000, uniform(1000)), torch.arange(1000))


def test_timesteps_is_the_inverse_of_the_cumulative_sum() -> None:
    quarters = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    u = [0.0, math.nextafter(0.25, 0), 0.25, math.nextafter(0.75, 0), 0.75, LAST_BELOW_ONE]
    assert timesteps(torch.tensor(u, dtype=torch.float64), quarters).tolist() == [0, 0, 1, 1, 2, 2]
    # A t of probability 0 is passed over.
    holes = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    assert timesteps(torch.tensor([0.0, 0.49, 0.5, 0.99], dtype=torch.float64), holes).tolist() == [1, 1, 3, 3]


@densities
def test_every_u_lies_between_the_edges_of_its_t(name: str) -> None:
    density = DENSITIES[name]
    u = torch.from_numpy(np.random.default_rng(3).random(20_000))
    t = timesteps(u, density)
    exact = [0.0, *(math.fsum(density[: k + 1].tolist()) for k in range(len(density)))]
    low, high = torch.tensor(exact[:-1], dtype=torch.float64)[t], torch.tensor(exact[1:], dtype=torch.float64)[t]
    assert (low - 1e-13 <= u).all()
    assert (u < high + 1e-13).all()


def test_the_largest_u_gives_the_last_timestep() -> None:
    u = torch.tensor([LAST_BELOW_ONE], dtype=torch.float64)
    for num_timesteps in [*range(1, 2050), 4096, 4999, 5000]:
        assert timesteps(u, uniform(num_timesteps)).item() == num_timesteps - 1
    for density in DENSITIES.values():
        assert timesteps(u, density).item() == 999


@given(u=st.floats(0, 1, exclude_max=True), num_timesteps=st.integers(1, 5000))
@settings(max_examples=150, deadline=None)
def test_timesteps_stay_in_range(u: float, num_timesteps: int) -> None:
    t = timesteps(torch.tensor([u], dtype=torch.float64), uniform(num_timesteps))
    assert 0 <= t.item() < num_timesteps
    assert abs(t.item() + 0.5 - u * num_timesteps) <= 0.5 + 1e-9


@densities
def test_t_follows_its_density(name: str) -> None:
    num_draws, density = 200_000, DENSITIES[name]
    t = timesteps(torch.from_numpy(np.random.default_rng(11).random(num_draws)), density)
    counts = torch.bincount(t, minlength=1000).numpy()
    # The least p is 0.05/1000, so every t is expected 10 times and more: enough for χ².
    assert stats.chisquare(counts, num_draws * density.numpy(), sum_check=False).pvalue > 1e-3
    other = DENSITIES["table" if name == "uniform" else "uniform"].numpy()
    assert stats.chisquare(counts, num_draws * other, sum_check=False).pvalue < 1e-12  # so that the test says something


def test_a_global_batch_of_t_slots_visits_every_timestep_once() -> None:
    u = stratified(0.0371, torch.arange(1000), 1000)
    assert torch.equal(timesteps(u, uniform(1000)).sort().values, torch.arange(1000))


@densities
@pytest.mark.parametrize("num_slots", [7, 64, 1000, 4096])
def test_a_global_batch_holds_every_t_as_often_as_expected(name: str, num_slots: int) -> None:
    # One point in each stratum of length 1/N: an interval of length p holds N·p of them, rounded down or up.
    expected = num_slots * DENSITIES[name]
    for u_0 in np.random.default_rng(num_slots).random(5).tolist():
        t = timesteps(stratified(u_0, torch.arange(num_slots), num_slots), DENSITIES[name])
        counts = torch.bincount(t, minlength=1000)
        assert ((counts - expected).abs() < 1 + 1e-9).all()
        # The same of any run of neighbours, such as a decile of the levels.
        assert ((counts.view(10, 100).sum(1) - expected.view(10, 100).sum(1)).abs() < 1 + 1e-9).all()


@pytest.mark.parametrize(
    ("u", "message"),
    [
        (torch.tensor([0.5]), r"u must be a float64 vector \[B\], got torch.float32 of shape \[1\]"),
        (torch.tensor(0.5, dtype=torch.float64), "u must be a float64 vector"),
        (torch.tensor([0.5, 1.0], dtype=torch.float64), r"u must lie in \[0, 1\), got values from 0.5 to 1.0"),
        (torch.tensor([-0.1], dtype=torch.float64), r"u must lie in \[0, 1\)"),
        (torch.tensor([math.nan], dtype=torch.float64), r"u must lie in \[0, 1\)"),
    ],
)
def test_timesteps_refuses(u: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timesteps(u, uniform(1000))


@pytest.mark.parametrize("density", [uniform(4).float(), uniform(4)[:0], uniform(4).view(2, 2), torch.tensor([1, 0])])
def test_timesteps_refuses_what_is_no_row_of_probabilities(density: Tensor) -> None:
    with pytest.raises(ValueError, match=r"density must be a float64 vector \[T\], got torch"):
        timesteps(torch.tensor([0.5], dtype=torch.float64), density)


# The densities ------------------------------------------------------------------------------------


@densities
def test_every_density_sums_to_one_and_leaves_no_t_out(name: str) -> None:
    density = DENSITIES[name]
    assert density.dtype == torch.float64
    assert density.shape == (1000,)
    assert math.fsum(density.tolist()) == pytest.approx(1, abs=1e-13)
    # What divides the loss, T·p_t, is 1/20 at least: no draw counts for more than 20.
    assert (1000 * density >= UNIFORM_SHARE).all()
    assert UNIFORM_SHARE == 1 / 20


def test_uniform_is_one_over_t() -> None:
    assert torch.equal(uniform(8), torch.full((8,), 0.125, dtype=torch.float64))
    assert uniform(1).tolist() == [1.0]
    for num_timesteps in (0, -3):
        with pytest.raises(ValueError, match=f"num_timesteps must be at least 1, got {num_timesteps}"):
            uniform(num_timesteps)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.0, 1.0), (2.0, 0.4), (-4.0, 3.0)])
def test_log_normal_is_the_normals_mass_about_each_ln_sigma(name: str, mean: float, std: float) -> None:
    abar = SCHEDULES[name].alphas_cumprod.numpy()
    with np.errstate(divide="ignore"):
        log_sigma = 0.5 * np.log((1 - abar) / abar)  # +∞ where nothing of z_0 is left
    edges = np.concatenate([[-np.inf], (log_sigma[1:] + log_sigma[:-1]) / 2, [np.inf]])
    mass = np.diff(stats.norm.cdf(edges, loc=mean, scale=std))
    density = log_normal(SCHEDULES[name], mean, std)
    np.testing.assert_allclose(density.numpy(), 0.95 * mass + 0.05 / 1000, rtol=0, atol=1e-12)


def test_ln_sigma_has_the_mean_and_the_deviation_asked_for() -> None:
    # The moments of ln σ_t, t ~ p, less the uniform share: the schedule reaches five deviations to either side.
    schedule, density = SCHEDULES["cosine"], DENSITIES["narrow"]
    log_sigma = -0.5 * schedule.log_snr
    shaped = (density - UNIFORM_SHARE / 1000) / (1 - UNIFORM_SHARE)
    mean = (shaped * log_sigma).sum().item()
    assert mean == pytest.approx(0.5, abs=1e-4)
    assert (shaped * (log_sigma - mean).square()).sum().sqrt().item() == pytest.approx(0.3, abs=1e-3)


def test_log_normal_of_a_zero_terminal_snr_leaves_the_last_t_to_the_uniform_share() -> None:
    density = log_normal(SCHEDULES["zero"], 0.0, 1.0)
    assert density[-1].item() == pytest.approx(UNIFORM_SHARE / 1000, rel=1e-12)
    assert density.isfinite().all()
    # Levels noisier than the last finite one belong to that one.
    noisy = log_normal(SCHEDULES["zero"], 50.0, 1.0)
    assert noisy[-2].item() == pytest.approx(0.95 + UNIFORM_SHARE / 1000, rel=1e-12)


def test_log_normal_of_a_single_timestep_is_certain() -> None:
    assert log_normal(Schedule(torch.tensor([0.5], dtype=torch.float64)), 0.0, 1.0).tolist() == [1.0]


@pytest.mark.parametrize(
    ("mean", "std"),
    [(0.0, 0.0), (0.0, -1.0), (0.0, math.nan), (0.0, math.inf), (math.nan, 1.0), (math.inf, 1.0)],
)
def test_log_normal_refuses(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match="ln sigma wants a finite mean and a finite standard deviation above 0"):
        log_normal(SCHEDULES["zero"], mean, std)


def test_from_table_gives_each_part_its_entry() -> None:
    # Ten timesteps in four parts: t·4 // 10 is 0 0 0 1 1 2 2 2 3 3.
    density = from_table([3, 0, 1, 4], 10)
    shares = torch.tensor([3, 3, 3, 0, 0, 1, 1, 1, 4, 4], dtype=torch.float64)
    torch.testing.assert_close(density, 0.95 * shares / 20 + 0.05 / 10, rtol=1e-14, atol=0)
    torch.testing.assert_close(from_table([0.3, 0, 0.1, 0.4], 10), density, rtol=1e-14, atol=0)  # in proportion only
    torch.testing.assert_close(from_table([7], 10), uniform(10), rtol=1e-14, atol=0)
    each = [1.0, 2.0, 3.0, 4.0, 5.0]
    torch.testing.assert_close(from_table(each, 5), 0.95 * torch.tensor(each).double() / 15 + 0.01, rtol=1e-14, atol=0)
    for scale in (1e308, 5e-324):  # whose sum, or whose share, float64 does not hold
        torch.testing.assert_close(from_table([scale, scale], 10), uniform(10), rtol=1e-14, atol=0)


def test_the_root_mean_square_of_the_loss_is_the_table_of_least_variance() -> None:
    # Losses whose second moment is known for each t: E[L_t] = a_t, E[L_t²] = 2 a_t², as of a squared normal's half.
    a = torch.linspace(5, 0.1, 1000, dtype=torch.float64)

    def second_moment(density: Tensor) -> float:
        """E[(L_t/(T p_t))²] for t ~ density; its mean is that of the loss, whatever the density."""
        assert (density * a / (1000 * density)).sum().item() == pytest.approx(a.mean().item(), rel=1e-12)
        return (2 * a.square() / (1000**2 * density)).sum().item()

    best = second_moment(from_table((2 * a.square()).sqrt().tolist(), 1000))
    least = 2 * a.mean().item() ** 2  # Cauchy-Schwarz: (Σ √E[L_t²] / T)²
    assert least <= best < 1.06 * least
    assert best < second_moment(uniform(1000))
    assert best < second_moment(from_table(a.square().tolist(), 1000))
    assert best < second_moment(from_table(a.sqrt().tolist(), 1000))


@pytest.mark.parametrize(
    ("table", "num_timesteps", "message"),
    [
        ([], 10, "the importance table must have 1 to 10 entries, got 0"),
        ([1.0] * 11, 10, "the importance table must have 1 to 10 entries, got 11"),
        ([1.0], 0, "the importance table must have 1 to 0 entries, got 1"),
        ([1.0, -1e-9], 10, "finite numbers, none below 0, not all 0"),
        ([1.0, math.nan], 10, "finite numbers, none below 0, not all 0"),
        ([1.0, math.inf], 10, "finite numbers, none below 0, not all 0"),
        ([0.0, 0.0], 10, "finite numbers, none below 0, not all 0"),
    ],
)
def test_from_table_refuses(table: list[float], num_timesteps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_table(table, num_timesteps)
