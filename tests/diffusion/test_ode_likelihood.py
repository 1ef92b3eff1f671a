"""The ODE's likelihood against the density that a linear ODE has, its traces, its tolerance, and what it refuses."""

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.ode_likelihood import OdeLikelihood, eps_and_divergence, ode_nll

MEAN = torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64)
ROOT = torch.tensor([[0.9, 0.0, 0.0], [-0.5, 0.3, 0.0], [0.4, -0.2, 0.6]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T
LAMBDA_MAX, LAMBDA_MIN = 9.0, -8.0


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def marginal(log_snr: float) -> tuple[Tensor, Tensor]:
    """q(z_λ) for data N(MEAN, COVARIANCE): mean [3] and covariance [3,3]."""
    abar = 1 / (1 + math.exp(-log_snr))
    return math.sqrt(abar) * MEAN, abar * COVARIANCE + (1 - abar) * torch.eye(3, dtype=torch.float64)


def gaussian_eps(z: Tensor, log_snr: float) -> Tensor:
    """E[ε | z] for these data: σ (covariance of z)⁻¹ (z - mean of z)."""
    mean, covariance = (part.to(z.dtype) for part in marginal(log_snr))
    sigma = 1 / math.sqrt(1 + math.exp(log_snr))
    return sigma * torch.linalg.solve(covariance, (z.flatten(1) - mean).T).T.reshape(z.shape)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.sqrt().diag() @ vectors.T


def gaussian_nll_of_ode(z_0: Tensor) -> Tensor:
    """-ln p(z_0) per element of what the ODE makes of N(0, I), in closed form.

    The exact ε of Gaussian data moves z to mean_end + √Σ_end √Σ_start⁻¹ (z - mean_start): their Σ share eigenvectors.
    """
    (mean_start, start), (mean_end, end) = marginal(LAMBDA_MAX), marginal(LAMBDA_MIN)
    alpha = math.sqrt(1 / (1 + math.exp(-LAMBDA_MAX)))
    map_ = root(end) @ torch.linalg.inv(root(start))
    z_end = mean_end + (alpha * z_0.flatten(1) - mean_start) @ map_.T
    log_p = -0.5 * (z_end.square() + math.log(2 * math.pi)).sum(dim=1) + torch.logdet(map_) + 3 * math.log(alpha)
    return -log_p / 3


Z_0 = (MEAN + draws(6, 3, seed=0) @ ROOT.T).view(-1, 3, 1, 1)
WANTED = gaussian_nll_of_ode(Z_0)
SIGNS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)  # all of them, [8,3]


def with_gaussian(**options: object) -> OdeLikelihood:
    return ode_nll(Z_0, gaussian_eps, LAMBDA_MAX, LAMBDA_MIN, **options)  # pyright: ignore[reportArgumentType]


# Closed forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7, 1e-9, 1e-11])
def test_a_correlated_gaussian_within_the_tolerance(tolerance: float) -> None:
    found = with_gaussian(tolerance=tolerance)
    # Twelve evaluations make a step, and each step may be wrong by the tolerance.
    assert (found.nll - WANTED).abs().max().item() < tolerance * found.num_evaluations / 12
    assert found.per_probe.shape == (6, 1)
    assert found.nll.dtype == torch.float64
    assert found.probe_error.isnan().all()
    torch.testing.assert_close(found.nll_bits * math.log(2), found.nll)


def test_a_smaller_tolerance_asks_more() -> None:
    calls = [with_gaussian(tolerance=tolerance).num_evaluations for tolerance in (1e-3, 1e-5, 1e-7, 1e-9, 1e-11)]
    assert calls == sorted(set(calls))


def test_the_end_of_the_path_is_standard_for_the_right_model() -> None:
    found = with_gaussian(tolerance=1e-9)
    (mean_start, start), (mean_end, end) = marginal(LAMBDA_MAX), marginal(LAMBDA_MIN)
    alpha = math.sqrt(1 / (1 + math.exp(-LAMBDA_MAX)))
    white = torch.linalg.solve(root(start), (alpha * Z_0.flatten(1) - mean_start).T)
    wanted = (mean_end[:, None] + root(end) @ white).T.reshape(Z_0.shape)
    torch.testing.assert_close(found.z_end, wanted, rtol=0, atol=1e-7)


def test_any_network_has_a_density_that_sums_to_one() -> None:
    # One that is no score of anything: p is a density all the same, for it's that of the samples.
    def eps_of(z: Tensor, log_snr: float) -> Tensor:
        return 0.8 * z + 0.3 * torch.sin(2 * z + log_snr / 3) - 0.1

    grid = torch.arange(-14, 14, 0.05, dtype=torch.float64)
    found = ode_nll(grid.view(-1, 1, 1, 1), eps_of, 5.0, -5.0, tolerance=1e-8)
    assert 0.05 * (-found.nll).exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert (-found.nll).exp()[[0, -1]].max() < 1e-9


def test_a_change_of_scale_and_shift_is_the_log_of_the_scale() -> None:
    # p of y = a z + b at y is p(z)/a. A network for y is the network for z seen through the same map, which is exact
    # where no noise is left and the prior is far: λ from 30 to -30.
    scale, shift, wide = 2.5, -0.6, (30.0, -30.0)

    def eps_of_y(y: Tensor, log_snr: float) -> Tensor:
        alpha, sigma = (1 / math.sqrt(1 + math.exp(-sign * log_snr)) for sign in (1, -1))
        mean, covariance = alpha * (scale * MEAN + shift), alpha**2 * scale**2 * COVARIANCE
        covariance = covariance + sigma**2 * torch.eye(3, dtype=torch.float64)
        return sigma * torch.linalg.solve(covariance, (y.flatten(1) - mean).T).T.reshape(y.shape)

    of_z = ode_nll(Z_0, gaussian_eps, *wide, tolerance=1e-9).nll
    of_y = ode_nll(scale * Z_0 + shift, eps_of_y, *wide, tolerance=1e-9).nll
    torch.testing.assert_close(of_y, of_z + math.log(scale), rtol=0, atol=1e-6)


# The divergence -----------------------------------------------------------------------------------


def curved(z: Tensor, log_snr: float) -> Tensor:
    """A field whose Jacobian is neither symmetric nor constant."""
    turned = z.flatten(1).roll(1, dims=1).view_as(z)
    return z + torch.sin(turned) * z.square() * math.exp(-abs(log_snr))


def test_the_trace_is_that_of_the_jacobian() -> None:
    z = draws(4, 3, 2, 1, seed=1)
    jacobian = torch.autograd.functional.jacobian(lambda flat: curved(flat.view_as(z), 0.4).flatten(1), z.flatten(1))
    own = torch.stack([jacobian[b, :, b, :] for b in range(4)])  # pyright: ignore[reportArgumentType]
    eps, divergence = eps_and_divergence(curved, z, 0.4)
    torch.testing.assert_close(divergence[:, 0], own.diagonal(dim1=1, dim2=2).sum(dim=1) / 6)
    torch.testing.assert_close(eps, curved(z, 0.4), rtol=0, atol=0)
    probes = draws(5, 4, 3, 2, 1, seed=2)
    wanted = torch.einsum("kbi,bij,kbj->bk", probes.flatten(2), own, probes.flatten(2)) / 6
    torch.testing.assert_close(eps_and_divergence(curved, z, 0.4, probes)[1], wanted)


def test_all_signs_together_are_the_exact_trace() -> None:
    probes = SIGNS.view(8, 1, 3, 1, 1).expand(-1, 6, -1, -1, -1)
    found = with_gaussian(probes=probes, tolerance=1e-9)
    assert found.per_probe.shape == (6, 8)
    torch.testing.assert_close(found.nll, WANTED, rtol=0, atol=1e-7)
    assert (found.per_probe.std(dim=1) > 0.1).all()  # none of them alone is right


def test_normal_probes_at_their_nodes_are_the_exact_trace() -> None:
    # vᵀJv is a square, of which ±√3 with 1/6 each and 0 with 2/3 give the exact mean: one vector for each pair of
    # dimensions would do; here it's the 27 of the product, in their shares.
    points = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)], dtype=torch.float64)
    shares = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    probes = torch.cartesian_prod(points, points, points).view(27, 1, 3, 1, 1).expand(-1, 6, -1, -1, -1)
    share = torch.cartesian_prod(shares, shares, shares).prod(dim=1)
    found = with_gaussian(probes=probes, tolerance=1e-9)
    torch.testing.assert_close(found.per_probe @ share, WANTED, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["signs", "normal"])
def test_few_probes_are_right_within_their_standard_error(kind: str) -> None:
    probes = draws(64, 6, 3, 1, 1, seed=3)
    found = with_gaussian(probes=probes.sign() if kind == "signs" else probes)
    spread = found.per_probe.std(dim=1) / math.sqrt(64)
    torch.testing.assert_close(found.probe_error, spread)
    assert ((found.nll - WANTED).abs() < 4 * spread).all()
    assert (spread > 0).all()


# The solver's tolerance ---------------------------------------------------------------------------


def rough(z: Tensor, log_snr: float) -> Tensor:
    """Small in itself, large in its slope: what is hard about it is the density."""
    del log_snr
    return z + 1e-3 * torch.sin(60 * z)


def test_the_density_is_as_exact_among_many_elements_as_among_few() -> None:
    # Copies of one number cost each element what the number alone costs. In the norm of all of the state their one
    # density would count for 1/400 of it.
    numbers = draws(3, 1, 1, 1, seed=4)
    tolerance = 1e-4
    exact = ode_nll(numbers, rough, 6.0, -6.0, tolerance=1e-11).nll
    probes = torch.ones(1, 3, 4, 10, 10, dtype=torch.float64)  # exact for a diagonal Jacobian
    many = ode_nll(numbers.expand(-1, 4, 10, 10), rough, 6.0, -6.0, probes=probes, tolerance=tolerance)
    assert (many.nll - exact).abs().max().item() < tolerance * many.num_evaluations / 12


def test_samples_do_not_know_of_one_another() -> None:
    tolerance = 1e-6
    alone = [ode_nll(z[None], gaussian_eps, LAMBDA_MAX, LAMBDA_MIN, tolerance=tolerance) for z in Z_0]
    together = with_gaussian(tolerance=tolerance)
    steps = max(each.num_evaluations for each in (together, *alone)) / 12
    torch.testing.assert_close(together.nll, torch.cat([each.nll for each in alone]), rtol=0, atol=tolerance * steps)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])  # as programs that only measure work
def test_a_network_of_float32_is_enough(mode: Callable[[], AbstractContextManager[None]]) -> None:
    seen: set[torch.dtype] = set()

    def eps_of(z: Tensor, log_snr: float) -> Tensor:
        seen.add(z.dtype)
        return gaussian_eps(z, log_snr)

    with mode():
        found = ode_nll(Z_0.float(), eps_of, LAMBDA_MAX, LAMBDA_MIN)
    assert seen == {torch.float32}
    assert found.nll.dtype == found.z_end.dtype == torch.float64
    assert not found.nll.requires_grad
    torch.testing.assert_close(found.nll, WANTED, rtol=0, atol=1e-4)


# What is refused ----------------------------------------------------------------------------------

Z = torch.zeros(2, 3, 1, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("z_0", "ends", "probes", "tolerance", "message"),
    [
        (Z[0], (9, -8), None, 1e-5, r"z_0 must be floating-point \[B,C,h,w\], got torch.float64 of shape \[3, 1, 1\]"),
        (Z.long(), (9, -8), None, 1e-5, "z_0 must be floating-point .* got torch.int64"),
        (Z, (-8, 9), None, 1e-5, "log_snr must fall from a finite number to another, got -8 to 9"),
        (Z, (9, -math.inf), None, 1e-5, "log_snr must fall .* got 9 to -inf"),
        (Z, (math.nan, 0), None, 1e-5, "log_snr must fall .* got nan to 0"),
        (Z, (9, -8), Z, 1e-5, r"probes must be \[K,B,C,h,w\], .* z_0's \[2, 3, 1, 1\], got shape \[2, 3, 1, 1\]"),
        (Z, (9, -8), Z[None, :1], 1e-5, r"probes must be .* got shape \[1, 1, 3, 1, 1\]"),
        (Z, (9, -8), Z[None, :][:0], 1e-5, r"probes must be .* got shape \[0, 2, 3, 1, 1\]"),
        (Z, (9, -8), None, 0.0, "tolerance must be a finite number above 0, got 0.0"),
        (Z, (9, -8), None, math.nan, "tolerance must be a finite number above 0, got nan"),
    ],
)
def test_bad_arguments_are_refused(
    z_0: Tensor, ends: tuple[float, float], probes: Tensor | None, tolerance: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ode_nll(z_0, lambda z, log_snr: z, *ends, probes=probes, tolerance=tolerance)


def test_an_eps_that_cannot_be_differentiated_is_refused() -> None:
    @torch.no_grad()
    def forgotten(z: Tensor, log_snr: float) -> Tensor:
        del log_snr
        return 0.5 * z

    with pytest.raises(ValueError, match="differentiable in z, got an eps without a gradient"):
        ode_nll(Z, forgotten, 9, -8)
    with pytest.raises(ValueError, match=r"the shape of z, \[2, 3, 1, 1\], got \[2, 1, 1, 1\]"):
        ode_nll(Z, lambda z, log_snr: z.sum(dim=1, keepdim=True), 9, -8)
