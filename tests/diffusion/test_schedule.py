"""The schedule against exact arithmetic, against its papers, and against diffusers."""

import copy
import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.diffusion.schedule import (
    PredictionType,
    Schedule,
    ScheduleName,
    from_scheduler_config,
    make_schedule,
    respaced,
    scheduler_config,
    shifted,
    with_zero_terminal_snr,
)

NAMES: tuple[ScheduleName, ...] = ("linear", "scaled_linear", "cosine")
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
names = pytest.mark.parametrize("name", NAMES)
SchedulerClass = type[DDIMScheduler] | type[DDPMScheduler]
scheduler_classes = pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
RANGES = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}


def usual(name: ScheduleName, num_timesteps: int = 1000) -> Schedule:
    return make_schedule(name, num_timesteps, *RANGES[name])


def float32_bound(schedule: Schedule) -> torch.Tensor:
    """How far, relatively, a float32 cumulative product may be from ours: first-order error analysis, [T].

    Each 1 - β in float32 carries the rounding of β (4 ulp for a linspace and a square) and of the
    subtraction: at most 5·2^-24 absolute, 5·2^-24/α relative. Each product adds 2^-24.
    """
    return (2**-24 * (5 / (1 - schedule.betas) + 1)).cumsum(0)


@names
def test_everything_is_float64_and_of_length_t(name: ScheduleName) -> None:
    schedule = usual(name, 37)
    assert schedule.num_timesteps == 37
    for table in (
        schedule.betas,
        schedule.alphas_cumprod,
        schedule.alphas_cumprod_prev,
        schedule.snr,
        schedule.log_snr,
    ):
        assert table.dtype == torch.float64
        assert table.shape == (37,)


@names
def test_alphas_cumprod_is_the_exact_product(name: ScheduleName) -> None:
    schedule = usual(name)
    exact = Fraction(1)
    previous = 1.0
    for t, (beta, abar, abar_prev) in enumerate(
        zip(
            schedule.betas.tolist(),
            schedule.alphas_cumprod.tolist(),
            schedule.alphas_cumprod_prev.tolist(),
            strict=True,
        )
    ):
        if t < 150:  # exact fractions grow by 53 bits a step
            exact *= 1 - Fraction(beta)
            assert abs(Fraction(abar) / exact - 1) <= Fraction(2 * (t + 1), 2**53)
        assert abar_prev == previous
        previous = abar
    by_logs = [math.fsum(math.log1p(-b) for b in schedule.betas.tolist()[: t + 1]) for t in (499, 999)]
    assert schedule.alphas_cumprod[[499, 999]].log().tolist() == pytest.approx(by_logs, rel=1e-12)


def test_betas_are_the_exact_lines() -> None:
    num_timesteps, start, end = 1000, 0.00085, 0.012
    linear = make_schedule("linear", num_timesteps, start, end).betas.tolist()
    scaled = make_schedule("scaled_linear", num_timesteps, start, end).betas.tolist()
    for t in range(num_timesteps):
        share = Fraction(t, num_timesteps - 1)
        exact = Fraction(start) + (Fraction(end) - Fraction(start)) * share
        assert linear[t] == pytest.approx(float(exact), rel=1e-14)
        root = math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * float(share)
        assert scaled[t] == pytest.approx(root**2, rel=1e-14)


def test_cosine_is_nichol_and_dhariwal_equation_17() -> None:
    num_timesteps = 1000
    schedule = usual("cosine", num_timesteps)

    def f(step: int) -> float:
        return math.cos((step / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    # The closed form holds up to the cap, which only the last β reaches.
    exact = [f(step + 1) / f(0) for step in range(num_timesteps - 1)]
    assert schedule.alphas_cumprod[:-1].tolist() == pytest.approx(exact, rel=1e-9)
    assert schedule.betas[-1].item() == 0.999
    assert (schedule.betas[:-1] < 0.999).all()
    other = make_schedule("cosine", num_timesteps, 0.3, 0.4)
    assert torch.equal(other.betas, schedule.betas)  # the range does not enter


@names
@scheduler_classes
@pytest.mark.parametrize("num_timesteps", [1, 2, 100, 1000])
def test_alphas_cumprod_is_that_of_diffusers(
    name: ScheduleName, scheduler_class: SchedulerClass, num_timesteps: int
) -> None:
    schedule = usual(name, num_timesteps)
    theirs = scheduler_class(
        num_train_timesteps=num_timesteps,
        beta_start=RANGES[name][0],
        beta_end=RANGES[name][1],
        beta_schedule="squaredcos_cap_v2" if name == "cosine" else name,
    ).alphas_cumprod.double()
    relative = (theirs / schedule.alphas_cumprod - 1).abs()
    assert (relative <= float32_bound(schedule)).all()
    assert float32_bound(schedule)[-1] < 1e-3  # so that the bound says something


@names
def test_snr_is_signal_over_noise(name: ScheduleName) -> None:
    schedule = usual(name)
    exact = [Fraction(a) / (1 - Fraction(a)) for a in schedule.alphas_cumprod.tolist()]
    assert schedule.snr.tolist() == pytest.approx([float(r) for r in exact], rel=1e-12)
    assert schedule.log_snr.tolist() == pytest.approx([math.log(r) for r in exact], abs=1e-10)
    assert (schedule.snr.diff() < 0).all()


@given(
    name=st.sampled_from(NAMES),
    num_timesteps=st.integers(1, 300),
    ends=st.tuples(st.floats(1e-12, 0.999), st.floats(1e-12, 0.999)),
)
@settings(max_examples=60, deadline=None)
def test_every_schedule_falls_from_below_one(name: ScheduleName, num_timesteps: int, ends: tuple[float, float]) -> None:
    start, end = min(ends), max(ends)
    try:
        schedule = make_schedule(name, num_timesteps, start, end)
    except ValueError as refused:
        # Only where float64 itself ends before the last step: the product of all but one of 1 - β is below 1e-307.
        assert "falls no further" in str(refused)
        assert name != "cosine"
        assert (num_timesteps - 1) * math.log1p(-end) < math.log(1e-307)
        return
    abar = schedule.alphas_cumprod
    assert abar[0] < 1
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    assert (abar[:-1] > 0).all()
    assert (abar < schedule.alphas_cumprod_prev).all()
    assert schedule.alphas_cumprod_prev[0] == 1
    assert schedule.reaches_zero_snr == (abar[-1].item() == 0)


def test_a_last_beta_of_one_reaches_zero_snr() -> None:
    schedule = Schedule(torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
    assert schedule.reaches_zero_snr
    assert schedule.snr[-1] == 0
    assert schedule.log_snr[-1] == -math.inf
    assert not usual("linear").reaches_zero_snr
    assert not usual("cosine").reaches_zero_snr
    assert Schedule(torch.ones(1, dtype=torch.float64)).reaches_zero_snr  # one step that keeps nothing


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 1.0, 0.2], r"alphas_cumprod is 0.0 at t = 1 already \(beta_1 is 1.0\) .* only at the last, t = 2,"),
        ([1.0, 1.0], "alphas_cumprod is 0.0 at t = 0 already"),
        ([0.5] * 1100, "alphas_cumprod is 0.0 at t = 1074 already"),  # 2^-1074 is the least float64
        ([0.1, 1.1, 0.2], r"betas must lie in \(0, 1\], and 1 - beta below 1 in float64; beta_1 is 1.1"),
        ([0.1, 0.2, math.nan], "beta_2 is nan"),
        ([0.1, math.inf], "beta_1 is inf"),
        ([0.1, -math.inf], "beta_1 is -inf"),
        ([-0.1, 0.2], "beta_0 is -0.1"),
        ([0.1, 0.0, 0.0], "beta_1 is 0.0"),
    ],
)
def test_a_beta_that_ends_the_chain_too_soon_or_is_none_is_named(betas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(torch.tensor(betas, dtype=torch.float64))


def test_alphas_cumprod_that_stalls_above_zero_is_refused() -> None:
    # 0.9 times the least float64 rounds to itself: ᾱ would stand still at 5e-324, and λ with it.
    betas = torch.tensor([0.5] * 1074 + [0.1, 0.1], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"alphas_cumprod is 5e-324 at t = 1073 already .* falls no further"):
        Schedule(betas)
    assert Schedule(betas[:1074]).alphas_cumprod[-1] == 5e-324


def test_to_copies_every_table_and_keeps_the_original() -> None:
    schedule = make_schedule("linear", 10, 1e-4, 0.02)
    moved = schedule.to("cpu")
    assert moved is not schedule
    assert torch.equal(moved.alphas_cumprod, schedule.alphas_cumprod)
    elsewhere = schedule.to(torch.device("meta"))
    for table in (elsewhere.betas, elsewhere.alphas_cumprod, elsewhere.alphas_cumprod_prev, elsewhere.snr):
        assert table.device.type == "meta"
        assert table.dtype == torch.float64
    assert elsewhere.num_timesteps == 10
    assert not elsewhere.reaches_zero_snr
    assert schedule.betas.device.type == "cpu"
    assert torch.equal(copy.deepcopy(schedule).alphas_cumprod_prev, schedule.alphas_cumprod_prev)


@names
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_scheduler_config_means_the_same_in_diffusers(name: ScheduleName, prediction_type: PredictionType) -> None:
    schedule = usual(name)
    scheduler = DDIMScheduler(**scheduler_config(name, 1000, *RANGES[name], prediction_type))
    relative = (scheduler.alphas_cumprod.double() / schedule.alphas_cumprod - 1).abs()
    assert (relative <= float32_bound(schedule)).all()
    assert scheduler.config["prediction_type"] == prediction_type
    assert scheduler.config["clip_sample"] is False
    for num_inference_steps in (1, 4, 50, 1000):
        scheduler.set_timesteps(num_inference_steps)
        assert scheduler.timesteps[0].item() == 999
        assert len(scheduler.timesteps) == num_inference_steps


@names
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_network_is_sampled_to_the_clean_latent(name: ScheduleName, prediction_type: PredictionType) -> None:
    # With every datum at z_0 = 3 the right prediction is known in closed form. The last DDIM step must land
    # on 3: not on √ᾱ_0·3 plus the noise of t = 0 (set_alpha_to_one), and not on 1 (clip_sample).
    schedule = usual(name)
    scheduler = DDIMScheduler(**scheduler_config(name, 1000, *RANGES[name], prediction_type))
    scheduler.set_timesteps(10)
    z_0 = torch.full((1, 1, 2, 2), 3.0)
    z_t = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        abar = schedule.alphas_cumprod[t].float()
        eps = (z_t - abar.sqrt() * z_0) / (1 - abar).sqrt()
        v = abar.sqrt() * eps - (1 - abar).sqrt() * z_0
        prediction = {"epsilon": eps, "sample": z_0, "v_prediction": v}[prediction_type]
        z_t = scheduler.step(prediction, int(t), z_t, return_dict=False)[0]
    torch.testing.assert_close(z_t, z_0, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("num_timesteps", "beta_start", "beta_end", "message"),
    [
        (0, 1e-4, 0.02, "num_timesteps must be at least 1, got 0"),
        (-5, 1e-4, 0.02, "num_timesteps"),
        (10, 0.0, 0.02, r"beta_start must lie in \(0, 1\), got 0.0"),
        (10, 1e-4, 1.0, "beta_end must lie"),
        (10, -0.1, 0.02, "beta_start must lie"),
        (10, math.nan, 0.02, "beta_start must lie"),
        (10, 1e-4, math.inf, "beta_end must lie"),
        (10, 0.03, 0.02, "beta_start must not exceed beta_end, got 0.03 > 0.02"),
    ],
)
def test_bad_ranges_are_refused(num_timesteps: int, beta_start: float, beta_end: float, message: str) -> None:
    for name in NAMES:
        with pytest.raises(ValueError, match=message):
            make_schedule(name, num_timesteps, beta_start, beta_end)
        with pytest.raises(ValueError, match=message):
            scheduler_config(name, num_timesteps, beta_start, beta_end, "epsilon")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'sigmoid'"):
        make_schedule("sigmoid", 10, 1e-4, 0.02)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown schedule 'sigmoid'"):
        scheduler_config("sigmoid", 10, 1e-4, 0.02, "epsilon")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown prediction_type 'eps'"):
        scheduler_config("linear", 10, 1e-4, 0.02, "eps")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "betas",
    [
        torch.tensor([0.1, 0.2], dtype=torch.float32),
        torch.tensor([[0.1, 0.2]], dtype=torch.float64),
        torch.tensor([], dtype=torch.float64),
        torch.tensor([0.1, 1.1], dtype=torch.float64),
        torch.tensor([0.0, 0.1], dtype=torch.float64),
        torch.tensor([1e-17, 0.1], dtype=torch.float64),  # 1 - 1e-17 is 1
        torch.tensor([math.nan, 0.1], dtype=torch.float64),
    ],
)
def test_bad_betas_are_refused(betas: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="betas must"):
        Schedule(betas)


# Shifted, stretched, respaced ---------------------------------------------------------------------


@names
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 3.7, 16.0])
def test_a_resolution_shift_divides_the_snr_by_the_square_of_its_factor(name: ScheduleName, factor: float) -> None:
    schedule = usual(name)
    moved = shifted(schedule, factor)
    torch.testing.assert_close(moved.snr, schedule.snr / factor**2, rtol=1e-9, atol=0)
    # In λ it is a move: simple diffusion writes it so.
    torch.testing.assert_close(moved.log_snr, schedule.log_snr - 2 * math.log(factor), rtol=0, atol=1e-9)
    torch.testing.assert_close(moved.alphas_cumprod, (1 - moved.betas).cumprod(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(shifted(moved, 1 / factor).snr, schedule.snr, rtol=1e-9, atol=0)
    by_name = make_schedule(name, 1000, *RANGES[name], resolution_shift=factor)
    torch.testing.assert_close(by_name.betas, moved.betas, rtol=1e-9, atol=0)


def test_averaging_pixels_undoes_a_resolution_shift() -> None:
    # The mean of 2 × 2 noises has a quarter of their variance: a picture of equal 2 × 2 blocks under the shifted
    # schedule has, averaged, the SNR of the small picture under the schedule as it is.
    schedule = usual("linear")
    moved = shifted(schedule, 2.0)
    blocks = torch.randn(4000, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    averaged = (1 - moved.alphas_cumprod[500]) * blocks.mean(dim=(1, 2)).var() / moved.alphas_cumprod[500]
    assert averaged.item() == pytest.approx(1 / schedule.snr[500].item(), rel=4 * math.sqrt(2 / 4000))


def test_a_resolution_shift_keeps_a_zero_terminal_snr() -> None:
    moved = shifted(with_zero_terminal_snr(usual("linear")), 3.0)
    assert moved.reaches_zero_snr
    assert moved.betas[-1] == 1


@pytest.mark.parametrize("factor", [0.0, -2.0, math.nan, math.inf])
def test_a_resolution_shift_must_be_a_number_above_zero(factor: float) -> None:
    with pytest.raises(ValueError, match=f"resolution_shift must be a finite number above 0, got {factor}"):
        shifted(usual("linear"), factor)
    with pytest.raises(ValueError, match="resolution_shift must be"):
        make_schedule("linear", 10, 1e-4, 0.02, resolution_shift=factor)
    with pytest.raises(ValueError, match="resolution_shift must be"):
        scheduler_config("linear", 10, 1e-4, 0.02, "epsilon", resolution_shift=factor)


@pytest.mark.parametrize("factor", [1e-12, 1e-300, 1e300])
def test_a_resolution_shift_beyond_float64_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=r"betas must lie|falls no further"):
        shifted(usual("linear"), factor)


def every_schedule(num_timesteps: int = 1000) -> list[Schedule]:
    return [usual(name, num_timesteps) for name in NAMES] + [shifted(usual("linear", num_timesteps), 4.0)]


@pytest.mark.parametrize("num_timesteps", [2, 3, 50, 1000])
def test_zero_terminal_snr_is_lin_et_al_algorithm_1(num_timesteps: int) -> None:
    for schedule in every_schedule(num_timesteps):
        stretched = with_zero_terminal_snr(schedule)
        abar = stretched.alphas_cumprod
        assert abar[-1].item() == 0
        assert stretched.betas[-1].item() == 1
        assert stretched.reaches_zero_snr
        assert abar[0].item() == pytest.approx(schedule.alphas_cumprod[0].item(), rel=1e-14)
        # √ᾱ is moved and stretched: its ratios of differences stay.
        before, after = schedule.alphas_cumprod.sqrt(), abar.sqrt()
        torch.testing.assert_close(
            (after - after[-1]) / (after[0] - after[-1]),
            (before - before[-1]) / (before[0] - before[-1]),
            rtol=1e-10,
            atol=1e-15,
        )
        # diffusers' function is their algorithm; it takes float64 too.
        theirs = rescale_zero_terminal_snr(schedule.betas)
        torch.testing.assert_close(stretched.betas, theirs, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(abar, (1 - theirs).cumprod(0), rtol=1e-9, atol=1e-15)
        # Once stretched there is nothing left to stretch.
        torch.testing.assert_close(with_zero_terminal_snr(stretched).betas, stretched.betas, rtol=1e-9, atol=0)


def test_make_schedule_shifts_first_and_stretches_then() -> None:
    plain = make_schedule("linear", 100, 1e-4, 0.1)
    both = make_schedule("linear", 100, 1e-4, 0.1, resolution_shift=2.0, zero_terminal_snr=True)
    assert torch.equal(both.betas, with_zero_terminal_snr(shifted(plain, 2.0)).betas)
    assert not torch.allclose(both.betas, shifted(with_zero_terminal_snr(plain), 2.0).betas, rtol=1e-3)


def test_one_step_cannot_be_stretched_to_a_zero_terminal_snr() -> None:
    calls: list[Callable[[], Any]] = [
        lambda: with_zero_terminal_snr(usual("linear", 1)),
        lambda: make_schedule("linear", 1, 1e-4, 0.02, zero_terminal_snr=True),
        lambda: scheduler_config("linear", 1, 1e-4, 0.02, "sample", zero_terminal_snr=True),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="zero_terminal_snr wants two timesteps at least"):
            call()


@pytest.mark.parametrize("num_kept", [1, 2, 7, 50, 999, 1000])
def test_respaced_is_improved_diffusions_recursion(num_kept: int) -> None:
    kept = torch.linspace(0, 999, num_kept, dtype=torch.float64).round().long()
    for schedule in [*every_schedule(), with_zero_terminal_snr(usual("linear"))]:
        fewer = respaced(schedule, kept)
        assert fewer.num_timesteps == num_kept
        assert torch.equal(fewer.alphas_cumprod, schedule.alphas_cumprod[kept])
        assert torch.equal(fewer.alphas_cumprod_prev[1:], fewer.alphas_cumprod[:-1])
        assert fewer.alphas_cumprod_prev[0] == 1
        last, new_betas = 1.0, list[float]()
        for t, abar in enumerate(schedule.alphas_cumprod.tolist()):
            if t in set(kept.tolist()):
                new_betas.append(1 - abar / last)
                last = abar
        torch.testing.assert_close(fewer.betas, torch.tensor(new_betas, dtype=torch.float64), rtol=1e-12, atol=0)
        # One step of the short chain is the steps it leaves out, one after the other.
        if num_kept > 1:
            skipped = 1 - (1 - schedule.betas[int(kept[0]) + 1 : int(kept[1]) + 1]).prod()
            assert fewer.betas[1].item() == pytest.approx(skipped.item(), rel=1e-11)
        assert fewer.reaches_zero_snr == (schedule.reaches_zero_snr and num_kept > 1)


def test_respaced_to_steps_too_long_for_beta_still_has_their_levels() -> None:
    # ᾱ falls by more than 2^53 in the last step: β rounds to 1, ᾱ does not round to 0, and ε still determines z_0.
    long = Schedule(torch.full((60,), 0.5, dtype=torch.float64))
    fewer = respaced(long, torch.tensor([1, 59]))
    assert fewer.alphas_cumprod.tolist() == [2**-2, 2**-60]
    assert fewer.betas[-1].item() == 1
    assert not fewer.reaches_zero_snr


def test_respaced_may_leave_out_both_ends() -> None:
    fewer = respaced(usual("linear"), torch.tensor([300, 700]))
    assert fewer.betas[0].item() == pytest.approx(1 - usual("linear").alphas_cumprod[300].item(), rel=1e-14)
    assert not respaced(with_zero_terminal_snr(usual("linear")), torch.tensor([300, 700])).reaches_zero_snr


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.tensor([0.0, 1.0]), r"kept must be a non-empty int64 vector \[S\], got torch.float32 of shape \[2\]"),
        (torch.tensor([0, 1], dtype=torch.int32), "kept must be a non-empty int64 vector"),
        (torch.tensor([[0, 1]]), "kept must be a non-empty int64 vector"),
        (torch.tensor([], dtype=torch.int64), "kept must be a non-empty int64 vector"),
        (torch.tensor([0, 5, 5]), r"kept must rise within \[0, 10\), got \[0, 5, 5\]"),
        (torch.tensor([5, 0]), "kept must rise"),
        (torch.tensor([-1, 5]), "kept must rise"),
        (torch.tensor([5, 10]), "kept must rise"),
    ],
)
def test_respaced_refuses(kept: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        respaced(usual("linear", 10), kept)


# Between the indices ------------------------------------------------------------------------------


def test_log_snr_at_the_indices_is_log_snr_and_between_them_a_line() -> None:
    for schedule in every_schedule():
        table = schedule.log_snr
        indices = torch.arange(1000)
        assert torch.equal(schedule.log_snr_at(indices), table)
        middles = schedule.log_snr_at(indices[:-1] + 0.5)
        torch.testing.assert_close(middles, (table[1:] + table[:-1]) / 2, rtol=1e-14, atol=1e-14)
        quarters = schedule.log_snr_at(indices[:-1] + 0.25)
        torch.testing.assert_close(quarters, 0.75 * table[:-1] + 0.25 * table[1:], rtol=1e-13, atol=1e-13)
        # Before index 0 the first line goes on.
        slope = table[1] - table[0]
        below = torch.tensor([-0.5, -1.0, -10.0], dtype=torch.float64)
        torch.testing.assert_close(schedule.log_snr_at(below), table[0] + below * slope, rtol=1e-14, atol=0)


def test_index_at_and_log_snr_at_are_each_others_inverse() -> None:
    for schedule in [*every_schedule(), *(with_zero_terminal_snr(one) for one in every_schedule()), usual("linear", 2)]:
        last = schedule.num_timesteps - (2 if schedule.reaches_zero_snr else 1)
        index = torch.linspace(-5, last, 4001, dtype=torch.float64).view(1, -1)
        log_snr = schedule.log_snr_at(index)
        assert log_snr.dtype == torch.float64
        assert log_snr.shape == index.shape
        assert (log_snr.diff() < 0).all()
        torch.testing.assert_close(schedule.index_at(log_snr), index, rtol=0, atol=1e-9)
        levels = torch.linspace(log_snr[0, 0].item(), schedule.log_snr[last].item(), 4001, dtype=torch.float64)
        levels = levels.clamp(min=schedule.log_snr[last])  # linspace may end an ulp below its end
        index = schedule.index_at(levels)
        assert index.dtype == torch.float64
        assert (index.diff() > 0).all()
        torch.testing.assert_close(schedule.log_snr_at(index.clamp(max=last)), levels, rtol=0, atol=1e-10)
        whole = torch.arange(last + 1)
        torch.testing.assert_close(schedule.index_at(schedule.log_snr[whole]), whole.double(), rtol=0, atol=1e-12)


def test_a_level_of_another_dtype_is_taken_and_answered_in_float64() -> None:
    schedule = usual("linear", 10)
    assert schedule.log_snr_at(torch.tensor(3.0)).item() == schedule.log_snr[3].item()
    assert schedule.log_snr_at(torch.tensor([2.5], dtype=torch.float16)).dtype == torch.float64
    assert schedule.index_at(schedule.log_snr[3].float()).item() == pytest.approx(3, abs=1e-5)
    assert schedule.log_snr_at(torch.empty(0, 2)).shape == (0, 2)


def test_a_time_beyond_the_last_finite_level_is_refused() -> None:
    schedule, stretched = usual("linear", 10), with_zero_terminal_snr(usual("linear", 10))
    for one, last in ((schedule, 9), (stretched, 8)):
        for index in (last + 1e-6, 50.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"index must be at most {last}, got"):
                one.log_snr_at(torch.tensor([0.0, index], dtype=torch.float64))
        lowest = one.log_snr[last].item()
        for level in (lowest - 1e-6, -math.inf, math.nan):
            with pytest.raises(ValueError, match=f"log_snr must be at least {lowest}, got"):
                one.index_at(torch.tensor([0.0, level], dtype=torch.float64))


def test_times_between_indices_want_two_finite_levels() -> None:
    for schedule in (usual("linear", 1), with_zero_terminal_snr(usual("linear", 2))):
        calls: list[Callable[[torch.Tensor], torch.Tensor]] = [schedule.log_snr_at, schedule.index_at]
        for call in calls:
            with pytest.raises(ValueError, match="wants two of them with a finite log SNR, this schedule has 1"):
                call(torch.zeros(1, dtype=torch.float64))


# In diffusers' words, and back --------------------------------------------------------------------


def kinds_of_schedule() -> list[tuple[ScheduleName, float, bool]]:
    return [(name, shift, zero) for name in NAMES for shift in (1.0, 0.5, 4.0) for zero in (False, True)]


def ddpm_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What DDPMScheduler takes of a config: its last step always lands on the clean latent."""
    return {name: value for name, value in config.items() if name != "set_alpha_to_one"}


kinds = pytest.mark.parametrize(("name", "shift", "zero"), kinds_of_schedule())


@kinds
def test_a_scheduler_config_leads_back_to_its_schedule(name: ScheduleName, shift: float, zero: bool) -> None:
    schedule = make_schedule(name, 1000, *RANGES[name], resolution_shift=shift, zero_terminal_snr=zero)
    for prediction_type in PREDICTION_TYPES:
        if zero and prediction_type == "epsilon":
            continue
        config = scheduler_config(
            name, 1000, *RANGES[name], prediction_type, resolution_shift=shift, zero_terminal_snr=zero
        )
        for came in (
            config,
            json.loads(json.dumps(config)),
            DDIMScheduler(**config).config,
            json.loads(DDPMScheduler(**ddpm_arguments(config)).to_json_string()),
        ):
            back, back_type = from_scheduler_config(came)
            assert back_type == prediction_type
            torch.testing.assert_close(back.betas, schedule.betas, rtol=1e-12, atol=0)
            torch.testing.assert_close(back.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-12, atol=0)
            assert back.reaches_zero_snr == zero


@kinds
@scheduler_classes
def test_diffusers_builds_our_alphas_cumprod_from_the_config(
    name: ScheduleName, shift: float, zero: bool, scheduler_class: SchedulerClass
) -> None:
    schedule = make_schedule(name, 1000, *RANGES[name], resolution_shift=shift, zero_terminal_snr=zero)
    config = scheduler_config(name, 1000, *RANGES[name], "sample", resolution_shift=shift, zero_terminal_snr=zero)
    arguments = config if scheduler_class is DDIMScheduler else ddpm_arguments(config)
    theirs = scheduler_class(**arguments).alphas_cumprod.double()
    if not zero:
        assert ((theirs / schedule.alphas_cumprod - 1).abs() <= float32_bound(schedule)).all()
        return
    # They multiply twice, once before and once after the stretch, which carries the last √ᾱ's rounding to every other.
    start = make_schedule(name, 1000, *RANGES[name], resolution_shift=shift)
    before, after = start.alphas_cumprod.sqrt(), schedule.alphas_cumprod.sqrt()
    stretch = before[0] / (before[0] - before[-1])
    bound = float32_bound(start)
    moved = stretch * (bound / 2 * before + bound[-1] / 2 * before[-1] + 2**-23 * before)
    # The last β is 1, and its α of 0 has no rounding.
    again = torch.cat([float32_bound(schedule)[:-1], torch.zeros(1, dtype=torch.float64)])
    assert theirs[-1].item() == 0
    assert ((theirs.sqrt() - after).abs() <= moved + again / 2 * after).all()
    assert (moved + again / 2 * after).max() < 1e-3  # so that the bound says something


def test_a_config_without_a_name_has_diffusers_default() -> None:
    schedule, prediction_type = from_scheduler_config({})
    assert prediction_type == "epsilon"
    scheduler = DDIMScheduler()
    assert schedule.num_timesteps == scheduler.config["num_train_timesteps"]
    assert torch.equal(schedule.betas, usual("linear").betas)
    assert ((scheduler.alphas_cumprod.double() / schedule.alphas_cumprod - 1).abs() <= float32_bound(schedule)).all()
    for scheduler_class in (DDIMScheduler, DDPMScheduler):
        found, prediction_type = from_scheduler_config(scheduler_class().config)
        assert torch.equal(found.betas, schedule.betas)
        assert prediction_type == "epsilon"


def test_trained_betas_are_taken_as_they_are() -> None:
    betas = [0.1, 0.25, 0.5]
    schedule, prediction_type = from_scheduler_config(
        {"trained_betas": betas, "beta_schedule": "of no matter", "prediction_type": "sample"}
    )
    assert schedule.betas.tolist() == betas
    assert prediction_type == "sample"
    stretched, _ = from_scheduler_config({"trained_betas": betas, "rescale_betas_zero_snr": True})
    assert torch.equal(stretched.betas, with_zero_terminal_snr(schedule).betas)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "unknown schedule 'sigmoid'"),
        ({"prediction_type": "flow"}, "unknown prediction_type 'flow': want one of epsilon, v_prediction, sample"),
        ({"prediction_type": "flow", "trained_betas": [0.1]}, "unknown prediction_type 'flow'"),
        ({"trained_betas": [0.1, 1.5]}, "beta_1 is 1.5"),
        ({"trained_betas": []}, "betas must be a non-empty float64 vector"),
        ({"trained_betas": [0.1], "rescale_betas_zero_snr": True}, "zero_terminal_snr wants two timesteps at least"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start must not exceed beta_end"),
    ],
)
def test_a_config_that_means_no_schedule_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_scheduler_config(config)


def test_eps_at_a_zero_terminal_snr_is_not_written_into_a_config() -> None:
    with pytest.raises(ValueError, match="epsilon says nothing about z_0 at a zero terminal SNR"):
        scheduler_config("linear", 10, 1e-4, 0.02, "epsilon", zero_terminal_snr=True)


@names
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_perfect_network_is_sampled_to_the_clean_latent_from_a_zero_terminal_snr(
    name: ScheduleName, prediction_type: PredictionType
) -> None:
    scheduler = DDIMScheduler(
        **scheduler_config(name, 1000, *RANGES[name], prediction_type, resolution_shift=2.0, zero_terminal_snr=True)
    )
    schedule = make_schedule(name, 1000, *RANGES[name], resolution_shift=2.0, zero_terminal_snr=True)
    scheduler.set_timesteps(10)
    z_0 = torch.full((1, 1, 2, 2), 3.0)
    z_t = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        abar = schedule.alphas_cumprod[t].float()
        v = abar.sqrt() * (z_t - abar.sqrt() * z_0) / (1 - abar).sqrt() - (1 - abar).sqrt() * z_0
        z_t = scheduler.step(z_0 if prediction_type == "sample" else v, int(t), z_t, return_dict=False)[0]
    torch.testing.assert_close(z_t, z_0, rtol=0, atol=1e-3)
