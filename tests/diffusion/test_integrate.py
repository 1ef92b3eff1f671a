"""The adaptive solver, and what the SDE's functions refuse."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gaussian_mixture import Mixture
from torch import Tensor

from pipeline.diffusion.schedule import make_schedule
from pipeline.diffusion.sde import (
    Score,
    VpSde,
    adaptive,
    euler,
    euler_maruyama,
    euler_maruyama_step,
    even_times,
    heun,
    integrate,
)

LINEAR = VpSde.linear()
SD = VpSde.of_schedule(make_schedule("scaled_linear", 1000, 0.00085, 0.012))
DATA = Mixture((0.35, 0.65), (-1.0, 0.8), (0.45, 0.35))
U = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
ONE = torch.ones(2, dtype=torch.float64)
every_sde = pytest.mark.parametrize("sde", [LINEAR, SD], ids=["linear", "of_schedule"])


def law(sde: VpSde, t: float) -> Mixture:
    return DATA.diffused(sde.alpha(t), sde.sigma(t))


def exact_score(sde: VpSde) -> Score:
    return lambda z, t: law(sde, t).score(z)


def decaying(t: float, y: Tensor) -> Tensor:
    del t
    return -y


# The probability-flow ODE ------------------------------------------------------------------------


@every_sde
@pytest.mark.parametrize("end", [0.25, 0.0])
def test_a_finer_tolerance_asks_more_and_errs_less(sde: VpSde, end: float) -> None:
    # On a line the ODE keeps every quantile.
    start, wanted = law(sde, 1.0).quantile(U), law(sde, end).quantile(U)
    errors: list[float] = []
    calls: list[int] = []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        z, num_calls = adaptive(exact_score(sde), sde, start, 1.0, end, rtol=tolerance, atol=tolerance)
        errors.append((z - wanted).abs().max().item())
        calls.append(num_calls)
        assert errors[-1] < 5 * tolerance
    assert np.all(np.diff(np.log10(errors)) < -1)
    assert np.all(np.diff(calls) > 0)
    assert calls[-1] < 600  # in t, not in ∫β, the jumps of of_schedule cost thousands at 1e-6


@every_sde
def test_heun_in_fine_steps_ends_where_the_adaptive_solver_does(sde: VpSde) -> None:
    start = law(sde, 1.0).quantile(U)
    exact, _ = adaptive(exact_score(sde), sde, start, 1.0, 0.25, rtol=1e-10, atol=1e-10)
    fine = heun(exact_score(sde), sde, start, even_times(1.0, 0.25, 750))  # of_schedule's own indices
    torch.testing.assert_close(fine, exact, rtol=0, atol=1e-5)


@every_sde
def test_the_ode_forth_and_back_is_where_it_began(sde: VpSde) -> None:
    data = DATA.quantile(U)
    noise, _ = adaptive(exact_score(sde), sde, data, 0.1, 1.0, rtol=1e-9, atol=1e-9)
    back, _ = adaptive(exact_score(sde), sde, noise, 1.0, 0.1, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back, data, rtol=0, atol=1e-6)


# integrate ---------------------------------------------------------------------------------------


def test_integrate_solves_and_counts() -> None:
    asked: list[float] = []

    def counted(t: float, y: Tensor) -> Tensor:
        asked.append(t)
        return decaying(t, y)

    y, num_calls = integrate(counted, 3 * ONE, 0, 1.5, rtol=1e-11, atol=1e-11)
    assert num_calls == len(asked) > 0
    torch.testing.assert_close(y, 3 * ONE * math.exp(-1.5), rtol=1e-10, atol=0)
    back, _ = integrate(decaying, y, 1.5, 0, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(back, 3 * ONE, rtol=1e-9, atol=0)


def test_integrate_keeps_shape_and_dtype() -> None:
    y = torch.ones(2, 3, 1)
    once, _ = integrate(decaying, y, 0, 1, rtol=1e-9)  # finer than float32, but atol is not
    assert (once.dtype, once.shape) == (torch.float32, y.shape)
    torch.testing.assert_close(once, y / math.e, rtol=1e-4, atol=0)
    same, num_calls = integrate(decaying, y, 0.5, 0.5)
    assert num_calls == 0
    assert torch.equal(same, y)


def test_integrate_does_not_mind_a_drift_that_writes_over_things() -> None:
    answer = torch.empty_like(ONE)

    def careful(t: float, y: Tensor) -> Tensor:
        # A sudden bump, so that steps are rejected and begin again from an answer given before.
        return y * (-1 - 100 * math.exp(-(((t - 0.5) / 0.01) ** 2)))

    def careless(t: float, y: Tensor) -> Tensor:
        answer.copy_(careful(t, y))  # one buffer for all answers
        y.zero_()
        return answer

    y = 2 * ONE
    wanted = integrate(careful, y, 0, 1, rtol=1e-10, atol=1e-10)
    found = integrate(careless, y, 0, 1, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(wanted[0], 2 * ONE * math.exp(-1 - math.sqrt(math.pi)), rtol=1e-8, atol=0)
    assert torch.equal(found[0], wanted[0])
    assert found[1] == wanted[1]
    assert torch.equal(y, 2 * ONE)


def test_integrate_takes_a_tolerance_for_each_element() -> None:
    loose, strict = np.array([1e-2, 1e-2]), np.array([1e-2, 1e-12])

    def swinging(t: float, y: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(y[0]), math.cos(20 * t) * y[1]])

    exact = math.exp(math.sin(20) / 20)
    errors = [
        abs(integrate(swinging, ONE, 0, 1, rtol=1e-12, atol=atol)[0][1].item() - exact) for atol in (loose, strict)
    ]
    assert errors[1] < 1e-10 < errors[0]


@pytest.mark.parametrize(
    ("drift", "message"),
    [
        (lambda t, y: y * y, "the ODE from 0 to 2 was not solved: "),  # infinite at 1
        (lambda t, y: y * math.nan, "drift is not finite at 0"),  # SciPy alone never ends here
        (lambda t, y: y * (math.nan if t > 0.5 else 1), "not solved: "),
    ],
)
def test_an_ode_without_a_solution_is_an_error(drift: Callable[[float, Tensor], Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        integrate(drift, ONE, 0, 2)


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "words", "message"),
    [
        (ONE.bfloat16(), {}, "y must be float32 or float64, got torch.bfloat16"),
        (ONE.long(), {}, "y must be float32 or float64, got torch.int64"),
        (ONE * math.inf, {}, "y must be finite"),
        (ONE, {"end": math.inf}, "start and end must be finite, got 0.0 and inf"),
        (ONE.float(), {"rtol": 1e-9, "atol": 1e-9}, "at least 1.19.*e-07 for torch.float32, got 1e-09"),
        (ONE, {"rtol": math.nan}, "rtol or atol must be at least"),
        (ONE, {"drift": lambda t, y: y.sum()}, r"drift must have y's shape \[2\], got \[\]"),
    ],
)
def test_integrate_refuses_what_it_cannot_solve(y: Tensor, words: dict[str, Any], message: str) -> None:
    start, end = 0.0, words.pop("end", 1.0)
    with pytest.raises(ValueError, match=message):
        integrate(words.pop("drift", decaying), y, start, end, **words)


def test_bad_times_and_steps_are_refused() -> None:
    score = exact_score(LINEAR)
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: LINEAR.alpha(1.1), r"t must lie in \[0, 1.0\], got 1.1"),
        (lambda: SD.sigma(-0.1), r"t must lie in \[0, 1.0\], got -0.1"),
        (lambda: LINEAR.drift(ONE, math.nan), "t must lie"),
        (lambda: LINEAR.prior_log_density(torch.tensor(1.0)), "z must be"),
        (lambda: VpSde.linear(0.0, 20.0), "want 0 < beta_min <= beta_max"),
        (lambda: VpSde.linear(2.0, 1.0), "want 0 < beta_min <= beta_max, both finite, got 2.0 and 1.0"),
        (lambda: VpSde.linear(0.1, math.inf), "both finite"),
        (lambda: VpSde.of_schedule(make_schedule("linear", 1, 0.1, 0.2)), "two of them with a finite log SNR"),
        (lambda: even_times(1, 0, 0), "got 0 steps from 1 to 0"),
        (lambda: even_times(1, 1, 5), "want one step at least and two ends"),
        (lambda: euler(score, LINEAR, ONE, [1.0]), "times must be two at least"),
        (lambda: heun(score, LINEAR, ONE, [1.0, 0.5, 0.7]), "all fall or all rise"),
        (lambda: euler_maruyama(score, LINEAR, ONE, [0.5, 1.0], lambda _: ONE), "from a later time to an earlier"),
        (
            lambda: euler_maruyama_step(score, LINEAR, ONE, start=1, end=0.5, noise=ONE[:1]),
            r"noise must have z's shape \[2\], got \[1\]",
        ),
        (lambda: adaptive(score, LINEAR, ONE, 1.0, -0.5), "t must lie"),
    ]
    for refused, message in refusals:
        with pytest.raises(ValueError, match=message):
            refused()
