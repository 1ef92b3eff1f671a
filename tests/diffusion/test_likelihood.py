"""8-bit levels: masses that sum to 1, in the tails too; means with the error that they have."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from pipeline.diffusion.likelihood import average, discretized_gaussian_nll, gaussian_nll

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# -ln of the mass of a level -----------------------------------------------------------------------


@given(mean=st.floats(-50, 50), log_variance=st.floats(-60, 40))
@settings(max_examples=300, deadline=None)
def test_the_masses_of_the_256_levels_sum_to_one(mean: float, log_variance: float) -> None:
    nll = discretized_gaussian_nll(LEVELS, number(mean), number(log_variance))
    assert nll.isfinite().all()
    assert (nll >= 0).all()
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-12)


def exact_nll(level: int, mean: float, log_variance: float) -> float:
    """The same with the digits of mp; where the whole lies in an upper tail, by the lower one."""
    std = mp.exp(mpf(log_variance) / 2)
    below, above = ((mpf(2 * k - 1) / 255 - 1 - mpf(mean)) / std for k in (level, level + 1))
    if below > 0:
        below, above, level = -above, -below, 255 - level
    mass = (mpf(1) if level == 255 else mp.ncdf(above)) - (mpf(0) if level == 0 else mp.ncdf(below))
    return float(-mp.log(mass))


@pytest.mark.parametrize(
    ("mean", "log_variance"),
    [
        (0.0, 0.0),
        (0.31, -5.0),  # a decoder's: σ of ten levels
        (-0.2, -9.7),  # of one level
        (0.5, -14.0),  # a tenth of a level: all but one level lie in the tails
        (-0.7, -20.0),
        (3.0, -3.0),  # outside the range, from which each level is far
        (-40.0, 0.0),
        (0.1, 20.0),  # wide: between the ends the levels have next to no mass
    ],
)
def test_masses_are_those_of_sixty_digits(mean: float, log_variance: float) -> None:
    found = discretized_gaussian_nll(LEVELS, number(mean), number(log_variance))
    std = math.exp(log_variance / 2)
    with mp.workdps(60):
        for level in (0, 1, 2, 63, 127, 128, 200, 254, 255):
            # A mass is a difference of two Φ whose ln is rounded at 1e-16 of itself, z²/2, where they differ by z·step.
            z, step = max(1.0, abs(LEVELS[level].item() - mean) / std), 1 / 127.5 / std
            error = 1e-15 * (1 + z / step)
            assert found[level].item() == pytest.approx(exact_nll(level, mean, log_variance), rel=1e-13, abs=error)


def test_a_wide_gaussian_is_its_density_times_the_step() -> None:
    x, mean = LEVELS[1:-1], number(0.2)
    for log_variance in (-4.0, 0.0):
        density = gaussian_nll(x, mean, number(log_variance)) + math.log(127.5)
        # A mass is density · step · (1 + (z² - 1) (step/σ)²/24 + …).
        z_squared = (x - mean).square() * math.exp(-log_variance)
        relative = math.exp(-log_variance) / 127.5**2
        correction = (z_squared - 1) * relative / 24
        found = discretized_gaussian_nll(x, mean, number(log_variance))
        torch.testing.assert_close(found, density - correction, rtol=0, atol=float((z_squared * relative).max()) ** 2)


def test_levels_are_mirrored_with_their_mean() -> None:
    mean, log_variance = torch.linspace(-2, 2, 256, dtype=torch.float64), number(-6.0)
    mirrored = discretized_gaussian_nll(-LEVELS, -mean, log_variance)
    torch.testing.assert_close(discretized_gaussian_nll(LEVELS, mean, log_variance), mirrored, rtol=1e-10, atol=1e-14)


def test_levels_of_float32_images_are_levels() -> None:
    images = LEVELS.float().view(1, 1, 16, 16)
    mean, log_variance = torch.full((1, 1, 16, 16), 0.3), torch.full((1, 1, 1, 1), -4.0)
    found = discretized_gaussian_nll(images, mean, log_variance)
    assert found.dtype == torch.float64
    wanted = discretized_gaussian_nll(LEVELS, mean.double().flatten(), log_variance.double().flatten())
    assert torch.equal(found.flatten(), wanted)


def test_the_gradient_is_finite_everywhere_and_right() -> None:
    mean = torch.linspace(-1.5, 1.5, 256, dtype=torch.float64, requires_grad=True)
    for log_variance in (-16.0, -8.0, 0.0):
        spread = torch.full((256,), log_variance, dtype=torch.float64, requires_grad=True)
        found = torch.autograd.grad(discretized_gaussian_nll(LEVELS, mean, spread).sum(), (mean, spread))
        assert all(gradient.isfinite().all() for gradient in found)
    spread = torch.full((256,), -3.0, dtype=torch.float64, requires_grad=True)
    some = slice(None, None, 17)
    assert torch.autograd.gradcheck(
        lambda m, s: discretized_gaussian_nll(LEVELS[some], m, s), (mean[some].detach().requires_grad_(), spread[some])
    )


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([3], dtype=torch.uint8), "x must be floating-point, with levels from -1 to 1, got torch.uint8"),
        (torch.tensor([0.0]), r"8-bit levels 2k/255 - 1, k = 0..255, got 0.0"),  # halfway between 127 and 128
        (LEVELS.bfloat16(), "8-bit levels"),
        (torch.tensor([1.0, 1 + 2 / 255]), "8-bit levels .* got 1.00784"),
        (torch.tensor([1.0, math.nan]), "8-bit levels .* got nan"),
    ],
)
def test_what_is_no_level_is_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        discretized_gaussian_nll(x, number(0.0), number(0.0))


# Means and their errors ---------------------------------------------------------------------------


def test_the_standard_error_is_the_spread_over_the_root_of_the_number() -> None:
    found = average(torch.tensor([1.0, 2.0, 4.0, 9.0]))
    assert found.mean == 4
    assert found.error == pytest.approx(math.sqrt((9 + 4 + 0 + 25) / 3 / 4))
    assert average(torch.full((5,), 0.1)).error == 0


def test_the_standard_error_is_that_of_means() -> None:
    values = torch.randn(2000, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    averages = [average(row) for row in values]
    spread = average(torch.tensor([each.mean for each in averages])).error * math.sqrt(2000)
    mean_square = sum(each.error**2 for each in averages) / 2000  # s² is unbiased, s is not
    assert math.sqrt(mean_square) == pytest.approx(1 / 5, rel=0.02)  # 4 standard errors: 4 √(2/24/2000)/2
    assert spread == pytest.approx(1 / 5, rel=0.07)  # 4/√(2·2000)


@pytest.mark.parametrize("values", [torch.ones(1), torch.ones(0), torch.ones(2, 2)])
def test_one_sample_has_no_error(values: Tensor) -> None:
    with pytest.raises(ValueError, match=r"a vector \[N\] with N at least 2, got shape"):
        average(values)
