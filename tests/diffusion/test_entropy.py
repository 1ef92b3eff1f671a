"""No likelihood beats the data: the exact score's nats lie above the entropy; Sohl-Dickstein's form may not."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.diffusion.bound import Bound, entropy_form, reverse_of, variational_bound
from pipeline.diffusion.ode_likelihood import ode_nll
from pipeline.diffusion.schedule import Schedule, ScheduleName, VarianceType, make_schedule

T = 1000
SCHEDULES = {
    "linear": make_schedule("linear", T, 1e-4, 0.02),
    "scaled_linear": make_schedule("scaled_linear", T, 0.00085, 0.012),
}
# 0.3 N(-1.2, 0.25²) + 0.7 N(0.6, 0.4²): two modes, not centred.
SHARE = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([-1.2, 0.6], dtype=torch.float64)
VARIANCES = torch.tensor([0.25, 0.4], dtype=torch.float64).square()


def log_density(z: Tensor, more_variance: float = 0.0) -> Tensor:
    """ln of the mixture's density, or of its sum with N(0, more_variance).  Any shape."""
    variance = VARIANCES + more_variance
    parts = SHARE.log() - 0.5 * (2 * math.pi * variance).log() - 0.5 * (z[..., None] - MEANS).square() / variance
    return parts.logsumexp(dim=-1)


def exact_eps(z: Tensor, abar: Tensor) -> Tensor:
    """-√(1-ᾱ) ∇ ln q(z), q = Σ share N(√ᾱ mean, ᾱ variance + 1 - ᾱ).  z [B,1,1,1], abar [B,1,1,1] or [1]."""
    abar = abar[..., None]
    variance = abar * VARIANCES + 1 - abar
    off = z[..., None] - abar.sqrt() * MEANS
    share = (SHARE.log() - 0.5 * variance.log() - 0.5 * off.square() / variance).softmax(dim=-1)
    return ((1 - abar).sqrt() * share * off / variance).sum(dim=-1)


def exact_eps_at(z: Tensor, log_snr: float) -> Tensor:
    return exact_eps(z, torch.tensor([log_snr], dtype=torch.float64).sigmoid())


# Sums over an even grid: for functions that are analytic and vanish at both ends their error is e^{-c/spacing}.
GRID = torch.arange(-3.6, 4.0, 0.02, dtype=torch.float64)
WEIGHT = 0.02 * log_density(GRID).exp()
ENTROPY = -float(WEIGHT @ log_density(GRID))


def test_the_sums_are_exact() -> None:
    finer = torch.arange(-9, 9, 0.003, dtype=torch.float64)
    assert pytest.approx(ENTROPY, abs=1e-9) == -float(0.003 * log_density(finer).exp() @ log_density(finer))
    assert WEIGHT.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "variance_type", "gap"),
    [
        ("linear", "fixed_large", 0.00273),
        ("linear", "fixed_small", 0.56761),
        ("scaled_linear", "fixed_large", 0.00211),
        ("scaled_linear", "fixed_small", 0.42945),
    ],
)
def test_the_bound_of_the_best_chain_lies_above_the_entropy(
    name: ScheduleName, variance_type: VarianceType, gap: float
) -> None:
    # The gap is what σ² costs that the data does not have: three digits, of what came of finer sums too.
    schedule = SCHEDULES[name]
    spacing_z, spacing_eps = 0.1, 0.5
    z, eps = (
        torch.arange(-end, end, spacing, dtype=torch.float64) for end, spacing in ((3.4, spacing_z), (6.5, spacing_eps))
    )
    z_0, eps = (grid.reshape(-1) for grid in torch.meshgrid(z, eps, indexing="ij"))
    weight = spacing_z * spacing_eps * (log_density(z_0) - 0.5 * eps.square()).exp() / math.sqrt(2 * math.pi)

    def network(z_t: Tensor, t: Tensor) -> Tensor:
        return exact_eps(z_t, schedule.alphas_cumprod[t].view(-1, 1, 1, 1))

    reverse = reverse_of(network, schedule, "epsilon", variance_type)
    bound = variational_bound(z_0.view(-1, 1, 1, 1), schedule, reverse, lambda t: eps.view(-1, 1, 1, 1))
    above = float(weight @ bound.total) - ENTROPY
    assert above >= -1e-6
    assert above == pytest.approx(gap, abs=1e-5)


@pytest.mark.parametrize(("name", "gap"), [("linear", 3.2e-7), ("scaled_linear", 2.8e-5)])
def test_the_ode_on_a_schedule_lies_above_the_entropy(name: ScheduleName, gap: float) -> None:
    # The gap is the KL from the data to the data with the first step's noise, carried from N(0, 1) and not from q(z_T).
    log_snr = SCHEDULES[name].log_snr
    found = ode_nll(GRID.view(-1, 1, 1, 1), exact_eps_at, log_snr[0].item(), log_snr[-1].item(), tolerance=1e-8)
    above = float(WEIGHT @ found.nll) - ENTROPY
    assert above >= -1e-6
    assert above == pytest.approx(gap, rel=0.02)


def test_the_ode_goes_to_the_entropy_as_the_noise_that_is_left_goes_to_nothing() -> None:
    gaps: list[float] = []
    for log_snr_max in (2.0, 4.0, 6.0, 8.0, 12.0):
        found = ode_nll(GRID.view(-1, 1, 1, 1), exact_eps_at, log_snr_max, -40.0, tolerance=1e-9)
        # From N(0, 1) the exact score carries the samples to the mixture plus N(0, e^{-λ}), to the last nat.
        wanted = -log_density(GRID, math.exp(-log_snr_max))
        torch.testing.assert_close(found.nll, wanted, rtol=0, atol=3e-8)
        gaps.append(float(WEIGHT @ found.nll) - ENTROPY)
    assert all(gap >= -1e-6 for gap in gaps)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-2] / gaps[-3] == pytest.approx(math.exp(-4), rel=0.1)  # ∝ (σ²)²: the KL of a little added noise
    assert gaps[-1] < 1e-8


# Sohl-Dickstein's form ----------------------------------------------------------------------------


def gaussian_chain(schedule: Schedule, variance: float) -> tuple[Tensor, Bound]:
    """The bound for data N(0, variance) with the best denoiser and σ² = β, whose last step is the forward kernel's."""
    # Three Gauss-Hermite nodes for each of z_0 and ε: exact, for all of it is quadratic.
    node, share = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    points = torch.cartesian_prod(math.sqrt(variance) * node, node)
    weights = torch.cartesian_prod(share, share).prod(dim=1) / share.sum().square()
    z_0, eps = (points[:, i].view(-1, 1, 1, 1) for i in range(2))

    def network(z_t: Tensor, t: Tensor) -> Tensor:
        abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - abar).sqrt() * z_t / (abar * variance + 1 - abar)

    inner = reverse_of(network, schedule, "epsilon", "fixed_large")

    def reverse(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = inner(z_t, t)
        turned = (1 - schedule.betas[0]).sqrt() * z_t
        return torch.where((t == 0).view(-1, 1, 1, 1), turned, mean), log_variance

    return weights, variational_bound(z_0, schedule, reverse, lambda t: eps)


@pytest.mark.parametrize("variance", [0.3, 1.0, 1e4])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_the_entropy_form_is_a_bound_less_what_it_assumes_to_vanish(name: ScheduleName, variance: float) -> None:
    schedule = SCHEDULES[name]
    weights, bound = gaussian_chain(schedule, variance)
    form, total = (float(weights @ values) for values in (entropy_form(bound, schedule), bound.total))
    left_out = 0.5 * (schedule.betas[0] + schedule.alphas_cumprod[-1]).item() * (variance - 1)
    assert form == pytest.approx(total - left_out, rel=1e-9)


def test_the_entropy_form_is_no_bound_for_data_wider_than_the_prior() -> None:
    # N(0, 1e4): E[z_0²] is not 1. ½ (β_0 + ᾱ_T) 9999 = 0.702 nats are left out, more than the slack of 0.557 nats of
    # that chain's own bound, and what is left lies below the entropy.
    weights, bound = gaussian_chain(SCHEDULES["linear"], 1e4)
    entropy = 0.5 * math.log(2 * math.pi * math.e * 1e4)
    assert entropy == pytest.approx(6.0241, abs=5e-5)
    assert float(weights @ entropy_form(bound, SCHEDULES["linear"])) == pytest.approx(5.8796, abs=5e-5)
    assert float(weights @ bound.total) > entropy
    # For unit-variance data both are the entropy itself.
    weights, bound = gaussian_chain(SCHEDULES["linear"], 1.0)
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    assert float(weights @ entropy_form(bound, SCHEDULES["linear"])) == pytest.approx(entropy, rel=1e-9)
