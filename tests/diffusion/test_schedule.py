"""The schedule against exact arithmetic, against its papers, and against diffusers."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.diffusion.schedule import (
    PredictionType,
    Schedule,
    ScheduleName,
    make_schedule,
    scheduler_config,
)

NAMES: tuple[ScheduleName, ...] = ("linear", "scaled_linear", "cosine")
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
RANGES = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}


def usual(name: ScheduleName, num_timesteps: int = 1000) -> Schedule:
    return make_schedule(name, num_timesteps, *RANGES[name])


def float32_bound(schedule: Schedule) -> torch.Tensor:
    """How far, relatively, a float32 cumulative product may be from ours: first-order error analysis, [T].

    Each 1 - β in float32 carries the rounding of β (4 ulp for a linspace and a square) and of the
    subtraction: at most 5·2^-24 absolute, 5·2^-24/α relative. Each product adds 2^-24.
    """
    return (2**-24 * (5 / (1 - schedule.betas) + 1)).cumsum(0)


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("num_timesteps", [1, 2, 100, 1000])
def test_alphas_cumprod_is_that_of_diffusers(
    name: ScheduleName, scheduler_class: type[DDIMScheduler] | type[DDPMScheduler], num_timesteps: int
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


@pytest.mark.parametrize("name", NAMES)
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
    schedule = make_schedule(name, num_timesteps, min(ends), max(ends))
    abar = schedule.alphas_cumprod
    assert abar[0] < 1
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    assert (abar >= 0).all()
    # Strictly falling, until float64 itself ends.
    assert ((abar < schedule.alphas_cumprod_prev) | (abar < 1e-300)).all()
    assert schedule.alphas_cumprod_prev[0] == 1
    assert schedule.reaches_zero_snr == bool((abar == 0).any())


def test_a_last_beta_of_one_reaches_zero_snr() -> None:
    schedule = Schedule(torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
    assert schedule.reaches_zero_snr
    assert schedule.snr[-1] == 0
    assert schedule.log_snr[-1] == -math.inf
    assert not usual("linear").reaches_zero_snr
    assert not usual("cosine").reaches_zero_snr


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


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
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
