"""The reverse steps: against diffusers step by step, against q's own marginals, and DDIM against its ODE."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from float32_gap import float32_gap
from torch import Tensor

from pipeline.diffusion.process import q_sample, v_from
from pipeline.diffusion.sampling import (
    Spacing,
    ancestral_moments,
    ancestral_step,
    chain,
    ddim_step,
    previous,
    timesteps_of,
)
from pipeline.diffusion.schedule import PredictionType, Schedule, VarianceType, make_schedule

T = 1000
SD = ("scaled_linear", 0.00085, 0.012)  # Stable Diffusion's
SCHEDULE = make_schedule(SD[0], T, *SD[1:])
COSINE = make_schedule("cosine", T, 1e-4, 0.02)
ZERO_SNR = Schedule(torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64))
SPACINGS: tuple[Spacing, ...] = ("leading", "linspace", "trailing")
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
VARIANCE_TYPES: tuple[VarianceType, ...] = ("fixed_small", "fixed_large", "learned_range")
# 7 and 300 do not divide T: previous() leaves the list. 61 with trailing has a 62nd timestep, -1.
STEP_COUNTS = (1, 7, 50, 61, 300)
every_prediction = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
every_spacing = pytest.mark.parametrize("spacing", SPACINGS)


def draws(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def theirs(kind: type[Any], spacing: Spacing, num_steps: int, **words: object) -> Any:
    """A scheduler of diffusers with SD's schedule as it makes it, in float32."""
    name, beta_start, beta_end = SD
    named = {"beta_schedule": name, "beta_start": beta_start, "beta_end": beta_end, "clip_sample": False}
    scheduler = kind(T, timestep_spacing=spacing, steps_offset=offset(spacing), **named, **words)
    scheduler.set_timesteps(num_steps)
    return scheduler


def theirs_in_float64(kind: type[Any], spacing: Spacing, num_steps: int, **words: object) -> Any:
    """The same with our ᾱ in it, so that only the formulas are compared."""
    scheduler = theirs(kind, spacing, num_steps, **words)
    scheduler.betas, scheduler.alphas = SCHEDULE.betas, 1 - SCHEDULE.betas
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def offset(spacing: Spacing) -> int:
    return 1 if spacing == "leading" else 0  # as Stable Diffusion has it


def indices_of(spacing: Spacing, num_steps: int) -> list[int]:
    return timesteps_of(spacing, T, num_steps, steps_offset=offset(spacing))


# Which indices -----------------------------------------------------------------------------------


@every_spacing
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("num_timesteps", [1, 10, 1000])
def test_timesteps_are_those_of_diffusers(spacing: Spacing, kind: type[Any], num_timesteps: int) -> None:
    for steps_offset in (0, 1):
        scheduler = kind(num_timesteps, timestep_spacing=spacing, steps_offset=steps_offset)
        for num_steps in range(1, num_timesteps + 1):
            scheduler.set_timesteps(num_steps)
            ours = timesteps_of(spacing, num_timesteps, num_steps, steps_offset=steps_offset)
            assert ours == scheduler.timesteps.tolist()


def test_trailing_ddim_ends_anywhere_but_on_the_clean_latent_for_434_step_counts() -> None:
    stays_in: list[int] = []
    one_more: list[int] = []
    for num_steps in range(1, T + 1):
        *_, last = timesteps_of("trailing", T, num_steps)
        if last < 0:
            one_more.append(num_steps)
        elif previous(last, T, num_steps) >= 0:
            stays_in.append(num_steps)
        else:
            continue
        assert T % num_steps  # where it divides T, all is well
    assert (len(stays_in), stays_in[:3]) == (372, [6, 7, 11])
    assert (len(one_more), one_more[:2]) == (62, [61, 103])


def test_previous_need_not_be_the_next_of_the_list() -> None:
    assert timesteps_of("trailing", T, 7)[:3] == [999, 856, 713]
    assert [previous(t, T, 7) for t in (999, 856, 713, 141)] == [857, 714, 571, -1]
    for num_steps in (1, 2, 50, 250, 1000):
        for spacing in ("leading", "trailing"):
            steps = chain(timesteps_of(spacing, T, num_steps))
            assert all(previous(t, T, num_steps) == t_prev for t, t_prev in steps)


# Step by step with diffusers ---------------------------------------------------------------------


@every_spacing
@every_prediction
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_ancestral_steps_are_those_of_diffusers(
    spacing: Spacing, prediction_type: PredictionType, variance_type: VarianceType
) -> None:
    words: dict[str, Any] = {"prediction_type": prediction_type, "variance_type": variance_type}
    for num_steps in STEP_COUNTS:
        scheduler = theirs_in_float64(DDPMScheduler, spacing, num_steps, **words)
        indices = [t for t in indices_of(spacing, num_steps) if t >= 0]
        for t, t_prev in chain(indices):
            output = draws(2, 6 if variance_type == "learned_range" else 3, 2, 2, seed=2 * t)
            z_t, noise = draws(2, 3, 2, 2, seed=2 * t + 1), draws(2, 3, 2, 2, seed=t)
            generator = torch.Generator().manual_seed(t)
            wanted = scheduler.step(output, t, z_t, generator=generator, return_dict=False)[0]
            ours = ancestral_step(output, z_t, t, t_prev, SCHEDULE, **words, noise=noise)
            if t_prev == -1 and t > 0:
                # There diffusers adds noise to the clean latent, and Algorithm 2 does not.
                _, log_variance = ancestral_moments(output, z_t, t, t_prev, SCHEDULE, **words)
                ours = ours + (0.5 * log_variance).exp() * noise
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)


@every_spacing
@every_prediction
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps_are_those_of_diffusers(spacing: Spacing, prediction_type: PredictionType, eta: float) -> None:
    for num_steps in STEP_COUNTS:
        scheduler = theirs_in_float64(DDIMScheduler, spacing, num_steps, prediction_type=prediction_type)
        for t in indices_of(spacing, num_steps):
            prediction, z_t, noise = (draws(2, 3, 2, 2, seed=3 * t + k + 9) for k in range(3))
            ours: dict[str, Any] = {"prediction_type": prediction_type, "eta": eta, "noise": noise}
            t_prev = previous(t, T, num_steps)
            if t < 0:  # diffusers goes on, with ᾱ_{T-1}
                with pytest.raises(ValueError, match=r"t must lie in \[0, 1000\), got -1"):
                    ddim_step(prediction, z_t, t, t_prev, SCHEDULE, **ours)
                continue
            wanted = scheduler.step(prediction, t, z_t, eta=eta, variance_noise=noise, return_dict=False)[0]
            step = ddim_step(prediction, z_t, t, t_prev, SCHEDULE, **ours)
            torch.testing.assert_close(step, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_forward_words_are_those_of_diffusers(kind: type[Any]) -> None:
    scheduler = theirs_in_float64(kind, "trailing", 50)
    t, z_0, eps = torch.arange(T), draws(T, 1, 2, 2, seed=1), draws(T, 1, 2, 2, seed=2)
    torch.testing.assert_close(q_sample(z_0, t, eps, SCHEDULE), scheduler.add_noise(z_0, eps, t), rtol=0, atol=1e-10)
    torch.testing.assert_close(v_from(z_0, eps, t, SCHEDULE), scheduler.get_velocity(z_0, eps, t), rtol=0, atol=1e-10)


@every_spacing
@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
def test_diffusers_in_float32_is_a_few_roundings_away(spacing: Spacing, eta: float | None) -> None:
    # Values up to 4 have roundings of 2^-23 = 1.2e-7, and 1 - ᾱ near index 0 loses ten bits more.
    for gap in float32_gap(spacing, eta):
        assert 1e-7 < gap < 1e-5


# Edges -------------------------------------------------------------------------------------------


def test_the_last_step_lands_on_the_predicted_latent_and_wants_no_noise() -> None:
    z_0, z_t = draws(2, 3, 2, 2, seed=1), draws(2, 3, 2, 2, seed=2)
    for t in (0, 19, T - 1):
        for variance_type in ("fixed_small", "fixed_large"):
            step = ancestral_step(
                z_0, z_t, t, -1, SCHEDULE, prediction_type="sample", variance_type=variance_type, noise=None
            )
            torch.testing.assert_close(step, z_0, rtol=1e-11, atol=0)
        step = ddim_step(z_0, z_t, t, -1, SCHEDULE, prediction_type="sample", eta=1.0)
        torch.testing.assert_close(step, z_0, rtol=1e-11, atol=0)


def test_narrow_latents_are_rounded_once_to_float32() -> None:
    output, z_t, noise = (draws(2, channels, 2, 2, seed=channels).bfloat16() for channels in (6, 3, 3))
    ancestral: dict[str, Any] = {"prediction_type": "epsilon", "variance_type": "learned_range"}
    ddim: dict[str, Any] = {"prediction_type": "epsilon", "eta": 0.5}
    for t, t_prev in ((999, 979), (1, 0), (5, -1)):
        at = (t, t_prev, SCHEDULE)
        single = [
            ancestral_step(output, z_t, *at, **ancestral, noise=noise),
            ddim_step(output[:, :3], z_t, *at, **ddim, noise=noise),
        ]
        output_64, z_64, noise_64 = output.double(), z_t.double(), noise.double()
        double = [
            ancestral_step(output_64, z_64, *at, **ancestral, noise=noise_64),
            ddim_step(output_64[:, :3], z_64, *at, **ddim, noise=noise_64),
        ]
        for narrow, wide in zip(single, double, strict=True):
            assert (narrow.dtype, wide.dtype) == (torch.float32, torch.float64)
            assert torch.equal(narrow, wide.float())


def test_zero_terminal_snr_is_left_by_v_and_refused_for_epsilon() -> None:
    v, z_t, noise = (draws(1, 3, 2, 2, seed=k) for k in range(3))
    for t_prev in (1, 0, -1):
        words: dict[str, Any] = {"variance_type": "fixed_small", "noise": noise}
        ancestral = ancestral_step(v, z_t, 2, t_prev, ZERO_SNR, prediction_type="v_prediction", **words)
        ddim = ddim_step(v, z_t, 2, t_prev, ZERO_SNR, prediction_type="v_prediction", eta=1.0, noise=noise)
        assert ancestral.isfinite().all()
        torch.testing.assert_close(ddim, ancestral, rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match="alphas_cumprod is 0"):
            ddim_step(v, z_t, 2, t_prev, ZERO_SNR, prediction_type="epsilon")


def test_nothing_reads_a_value_back_to_the_host() -> None:
    # Tensors on the meta device have shapes and no values: whatever would wait for a GPU raises there.
    schedule, z = SCHEDULE.to("meta"), torch.empty(2, 3, 8, 8, device="meta")
    for prediction_type in PREDICTION_TYPES:
        for variance_type in VARIANCE_TYPES:
            output = torch.empty(2, 6, 8, 8, device="meta") if variance_type == "learned_range" else z
            words: dict[str, Any] = {"prediction_type": prediction_type, "variance_type": variance_type}
            assert ancestral_step(output, z, 9, 3, schedule, **words, noise=z).shape == z.shape
        assert ddim_step(z, z, 9, 3, schedule, prediction_type=prediction_type, eta=0.5, noise=z).shape == z.shape


def test_bad_steps_are_refused() -> None:
    z = torch.zeros(2, 3, 2, 2)
    small: dict[str, Any] = {"prediction_type": "epsilon", "variance_type": "fixed_small", "noise": z}

    def ancestral(t: int = 9, t_prev: int = 3, z_t: Tensor = z, prediction: Tensor = z, **words: Any) -> None:
        ancestral_step(prediction, z_t, t, t_prev, SCHEDULE, **{**small, **words})

    def ddim(t: int = 9, t_prev: int = 3, **words: Any) -> None:
        ddim_step(z, z, t, t_prev, SCHEDULE, **{"prediction_type": "epsilon", "eta": 1.0, "noise": z, **words})

    refusals: list[tuple[Callable[[], None], str]] = [
        (lambda: ancestral(t=1000), r"t must lie in \[0, 1000\), got 1000"),
        (lambda: ddim(t=-1), r"t must lie in \[0, 1000\), got -1"),
        (lambda: ancestral(t_prev=9), r"t_prev must lie in \[-1, 9\), below t, got 9"),
        (lambda: ddim(t_prev=-2), r"t_prev must lie in \[-1, 9\), below t, got -2"),
        (lambda: ancestral(noise=None), "noise must come"),
        (lambda: ddim(noise=None), "noise must come"),
        (lambda: ddim(noise=z[:1]), r"noise must be floating-point and of z_t's shape \[2, 3, 2, 2\], got"),
        (lambda: ddim(eta=1.5), r"eta must lie in \[0, 1\], got 1.5"),
        (lambda: ddim(eta=math.nan), "eta must lie"),
        (lambda: ancestral(variance_type="learned"), "unknown variance_type 'learned'"),
        (lambda: ancestral(variance_type="learned_range"), r"wants a prediction of shape \[2, 6, 2, 2\]"),
        (lambda: ancestral(prediction_type="eps"), "unknown prediction_type 'eps'"),
        (lambda: ancestral(prediction=z.repeat(1, 2, 1, 1)), "prediction must have z_t's shape"),
        (lambda: ancestral(prediction=z.long()), "prediction must be floating-point"),
        (lambda: ancestral(z_t=z[0]), r"z_t must be \[B,C,h,w\]"),
    ]
    for refused, message in refusals:
        with pytest.raises(ValueError, match=message):
            refused()


def test_bad_counts_and_lists_are_refused() -> None:
    for num_steps in (0, 11):
        with pytest.raises(ValueError, match=rf"num_steps must lie in \[1, 10\], got {num_steps}"):
            timesteps_of("leading", 10, num_steps)
        with pytest.raises(ValueError, match="num_steps must lie"):
            previous(9, 10, num_steps)
    with pytest.raises(ValueError, match="steps_offset must be at least 0, got -1"):
        timesteps_of("leading", 10, 5, steps_offset=-1)
    with pytest.raises(ValueError, match="unknown spacing 'even': want leading, linspace or trailing"):
        timesteps_of("even", 10, 5)  # pyright: ignore[reportArgumentType]
    for timesteps in ([], [3, 3], [3, 5], [3, -1]):
        with pytest.raises(ValueError, match="timesteps must be one at least and fall"):
            chain(timesteps)
