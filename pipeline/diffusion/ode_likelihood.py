"""The exact likelihood of what the probability-flow ODE makes: Song et al. 2021 (score SDE) section 4.3, appendix D.2.

A solver's samples are N(0, I) carried by an ODE from λ_min to λ_max; this is the density that they have.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.diffusion.sde import integrate

# What the network says ε is: z [B,C,h,w], λ = ln SNR → ε [B,C,h,w], differentiable in z, each sample by itself.
EpsOf = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True, eq=False)
class OdeLikelihood:
    """-ln p(z_0) of each sample in nats per element, float64."""

    per_probe: Tensor  # [B,K], from each probe vector alone, on one path; K = 1 with the exact divergence
    z_end: Tensor  # [B,C,h,w], where the path of z_0 ends: ~ N(0, I) where the model is right
    num_evaluations: int  # of the network, with one gradient for each probe

    @property
    def nll(self) -> Tensor:
        """The mean over the probes: unbiased, as each of them is.  [B]."""
        return self.per_probe.mean(dim=1)

    @property
    def nll_bits(self) -> Tensor:
        """In bits/dim: of a density, so it may lie below 0.  [B]."""
        return self.nll / math.log(2)

    @property
    def probe_error(self) -> Tensor:
        """The standard error s/√K that the choice of probes leaves; NaN for one probe, which has no spread.  [B]."""
        num_probes = self.per_probe.shape[1]
        if num_probes == 1:
            return torch.full_like(self.per_probe[:, 0], math.nan)
        return self.per_probe.std(dim=1) / math.sqrt(num_probes)


def ode_nll(
    z_0: Tensor,
    eps_of: EpsOf,
    log_snr_max: float,
    log_snr_min: float,
    *,
    probes: Tensor | None = None,
    tolerance: float = 1e-5,
) -> OdeLikelihood:
    """-ln p(z_0), p the density of the ODE's own samples: Song et al. 2021 (score SDE) eq. 13, 39 and 40.

    In ρ = -λ/2 = ln(σ/α), for z = α z_0 + σ ε with α² + σ² = 1, the ODE and the density along it are

        dz/dρ = σ ε_θ - σ² z        d ln p(z)/dρ = σ² D - σ ∇·ε_θ

    (with u = z/α: du/dρ = (σ/α) ε_θ).  A path starts at z = α z_0 at log_snr_max, where p is the density asked for
    divided by α^D, and ends at log_snr_min, where it's N(0, I).  The samples at log_snr_max are taken for data as they
    are, so p is a proper density of z_0, with the noise that is left there in it: its mean nll is at least the data's
    entropy, whatever the network says.

    z_0 [B,C,h,w]; the network sees its dtype, all else is float64.  probes [K,B,C,h,w] with E[v vᵀ] = I (signs or
    normal numbers): the divergence is the mean of vᵀ ∂ε/∂z v, Hutchinson 1990, with the same v all along the path,
    Grathwohl et al. 2019 (FFJORD) section 3.1.  None: the exact trace, at one gradient for each of C·h·w elements.

    tolerance: of each step's error, as a root mean square: over all elements of z, and over all samples' nats per
    element.  The samples of a batch share the steps.

    Raises ValueError: shapes that don't fit, log_snr's not finite or not falling, tolerance not above 0, an ε that
    torch cannot differentiate.  RuntimeError: the solver gave up.
    """
    _refuse_bad_arguments(z_0, log_snr_max, log_snr_min, probes, tolerance)
    batch, size = len(z_0), z_0[0].numel()
    num_columns = 1 if probes is None else len(probes)

    def drift(rho: float, y: Tensor) -> Tensor:
        z = y[:, :size]  # [B,D]
        eps, divergence = eps_and_divergence(eps_of, z.reshape(z_0.shape).to(z_0.dtype), -2 * rho, probes)
        variance = 1 / (1 + math.exp(-2 * rho))  # σ²
        velocity = math.sqrt(variance) * eps.double().flatten(1) - variance * z
        return torch.cat([velocity, variance - math.sqrt(variance) * divergence], dim=1)  # ln p: per element of z

    log_alpha = 0.5 * logsigmoid(torch.tensor(log_snr_max, dtype=torch.float64))
    start = torch.cat([log_alpha.exp().item() * z_0.double().flatten(1), z_0.new_zeros(batch, num_columns)], dim=1)
    # The solver holds the root mean square over all elements of the state below 1, and among the D of z a few of ln p
    # could be wrong unseen: their tolerance is so much smaller that their own root mean square stays below it.
    atol = np.full((batch, size + num_columns), tolerance)
    atol[:, size:] *= math.sqrt(num_columns / (size + num_columns))
    smallest = 100 * np.finfo(np.float64).eps  # SciPy takes no less: z is of order 1, and ln p is measured in nats
    rho_start, rho_end = -log_snr_max / 2, -log_snr_min / 2
    end, num_calls = integrate(drift, start, rho_start, rho_end, rtol=smallest, atol=atol.reshape(-1))
    z_end, gained = end[:, :size], end[:, size:]  # [B,D] and [B,K], (ln p_end - ln p_start)/D
    nll_end = 0.5 * (math.log(2 * math.pi) + z_end.square().mean(dim=1, keepdim=True))  # [B,1]
    return OdeLikelihood(nll_end + gained - log_alpha.item(), z_end.reshape(z_0.shape), num_calls)


def eps_and_divergence(eps_of: EpsOf, z: Tensor, log_snr: float, probes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ε [B,C,h,w] and ∇·ε/D at z [B,C,h,w], float64 [B,K] of probes [K,B,C,h,w], or [B,1] with the exact trace.

    The gradient of Σ v·ε, summed over the batch, is each sample's own vᵀ ∂ε/∂z: one network, K gradients.

    Raises ValueError: ε of another shape than z, or one that torch cannot differentiate.
    """
    # Also where the caller works without gradients: a copy made here may have some.
    with torch.inference_mode(False), torch.enable_grad():
        z = z.detach().clone().requires_grad_()
        eps = eps_of(z, log_snr)
        if eps.shape != z.shape:
            raise ValueError(f"eps_of must give the shape of z, {list(z.shape)}, got {list(eps.shape)}")
        if not eps.requires_grad:  # a divergence of 0 would be a wrong likelihood, without a word
            raise ValueError("eps_of must be differentiable in z, got an eps without a gradient: made in no_grad?")
        divergence = _exact(eps, z) if probes is None else _estimated(eps, z, probes)
    return eps.detach(), divergence


def _exact(eps: Tensor, z: Tensor) -> Tensor:
    """Σ_i ∂ε_i/∂z_i / D, row by row.  float64 [B,1]."""
    rows = eps.flatten(1)  # [B,D]
    size = rows.shape[1]
    trace = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for i in range(size):
        (gradient,) = torch.autograd.grad(rows[:, i].sum(), z, retain_graph=i + 1 < size)
        trace += gradient.flatten(1)[:, i].double()
    return (trace / size)[:, None]


def _estimated(eps: Tensor, z: Tensor, probes: Tensor) -> Tensor:
    """vᵀ ∂ε/∂z v / D for each v.  float64 [B,K]."""
    columns: list[Tensor] = []
    for k, probe in enumerate(probes):
        (gradient,) = torch.autograd.grad(eps, z, probe.to(eps.dtype), retain_graph=k + 1 < len(probes))
        columns.append((gradient.double() * probe.double()).flatten(1).mean(dim=1))
    return torch.stack(columns, dim=1)


def _refuse_bad_arguments(
    z_0: Tensor, log_snr_max: float, log_snr_min: float, probes: Tensor | None, tolerance: float
) -> None:
    if z_0.ndim != 4 or not z_0.is_floating_point():
        raise ValueError(f"z_0 must be floating-point [B,C,h,w], got {z_0.dtype} of shape {list(z_0.shape)}")
    if not (math.isfinite(log_snr_max) and math.isfinite(log_snr_min) and log_snr_max > log_snr_min):
        raise ValueError(f"log_snr must fall from a finite number to another, got {log_snr_max} to {log_snr_min}")
    if probes is not None and (probes.ndim != 5 or len(probes) == 0 or probes.shape[1:] != z_0.shape):
        wanted = f"[K,B,C,h,w], K at least 1 and then z_0's {list(z_0.shape)}"
        raise ValueError(f"probes must be {wanted}, got shape {list(probes.shape)}")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance must be a finite number above 0, got {tolerance}")
