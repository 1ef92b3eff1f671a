"""The whole variational bound of a chain, -ln p(z_0) ≤ L_T + Σ L_{t-1} + L_0: all of its terms, or some for all.

In nats per element (a mean over C, h and w), one number for each sample.  DDPM (Ho et al. 2020) eq. 5.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.diffusion.likelihood import Nll, gaussian_nll, prior_term, vlb_term
from pipeline.diffusion.process import check_timesteps, learned_log_variance, p_mean, q_sample, reverse_variance
from pipeline.diffusion.schedule import PredictionType, Schedule, VarianceType

# p(z_{t-1} | z_t) = N(mean, diag exp(log_variance)) of a chain: z_t [B,C,h,w], t int64 [B] → mean [B,C,h,w] and
# log_variance [B,C,h,w] or [B,1,1,1].
Reverse = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Terms(NamedTuple):
    """Which terms of the bound are computed for each sample, and how many terms each stands for."""

    t: Tensor  # int64 [B,K], the first column 0
    weight: Tensor  # float64 [B,K], the first column 1


@dataclass(frozen=True, eq=False)
class Bound:
    """The bound on -ln p(z_0) of each sample, and what it is made of.  Float64, nats per element.

    prior: L_T.  chosen: the t of each column of terms.  terms: L_0 at t = 0, L_{t-1} at t ≥ 1 (t counts from 0).
    """

    prior: Tensor  # [B]
    chosen: Terms  # [B,K]
    terms: Tensor  # [B,K]

    @classmethod
    def joined(cls, parts: "Sequence[Bound]") -> "Bound":
        """The bounds of several batches as of one; they have as many columns."""
        chosen = Terms(torch.cat([part.chosen.t for part in parts]), torch.cat([part.chosen.weight for part in parts]))
        return cls(torch.cat([part.prior for part in parts]), chosen, torch.cat([part.terms for part in parts]))

    @property
    def distortion(self) -> Tensor:
        """L_0 = -ln p(z_0 | z_1), the part of DDPM (Ho et al. 2020) table 4 that the last step pays.  [B]."""
        return self.terms[:, 0]

    @property
    def rate(self) -> Tensor:
        """L_T + Σ_{t≥1} L_{t-1}, what the rest of the chain pays, its Kullback-Leibler terms.  [B]."""
        return self.prior + (self.chosen.weight * self.terms)[:, 1:].sum(dim=1)

    @property
    def total(self) -> Tensor:
        """The bound: rate + distortion.  [B]."""
        return self.rate + self.distortion

    @property
    def prior_bits(self) -> Tensor:
        """L_T in bits/dim.  [B]."""
        return self.prior / math.log(2)

    @property
    def terms_bits(self) -> Tensor:
        """The terms in bits/dim.  [B,K]."""
        return self.terms / math.log(2)

    @property
    def total_bits(self) -> Tensor:
        """The bound in bits/dim: of a density, so it may lie below 0.  [B]."""
        return self.total / math.log(2)


def every_term(batch: int, schedule: Schedule) -> Terms:
    """All T terms for each of `batch` samples: the bound itself."""
    num_timesteps, device = schedule.num_timesteps, schedule.betas.device
    t = torch.arange(num_timesteps, device=device).expand(batch, -1)
    return Terms(t, torch.ones(batch, num_timesteps, dtype=torch.float64, device=device))


def stratified_terms(u: Tensor, schedule: Schedule) -> Terms:
    """t = 0 and one t from each of K parts of 1..T-1, for each sample: an unbiased estimate of the bound.

    u: float64 [B,K], uniform in [0, 1), on the CPU.  Part k holds n_k whole t's, each as likely as the others, and the
    one drawn stands for all of them, with weight n_k.  With K = T-1 nothing is left to chance.  The parts' ends are in
    geometric progression, as far as each can hold one t at least: the terms fall about as 1/t, so equal parts would
    leave nearly all of the bound, and of its variance, to the first of them.

    L_0 is never left out: it's of another kind than the others, and the largest.

    Raises ValueError: u not float64 [B,K] in [0, 1), K below 1 or above T-1.
    """
    rest = schedule.num_timesteps - 1
    if u.dtype != torch.float64 or u.ndim != 2:
        raise ValueError(f"u must be float64 [B,K], got {u.dtype} of shape {list(u.shape)}")
    if not 1 <= u.shape[1] <= rest:
        raise ValueError(f"u must have 1 to T - 1 = {rest} columns, got {u.shape[1]}")
    if not bool(((u >= 0) & (u < 1)).all()):
        raise ValueError(f"u must lie in [0, 1), got values from {u.min().item()} to {u.max().item()}")
    part = torch.arange(u.shape[1] + 1)
    geometric = (torch.log(torch.tensor(rest + 1.0, dtype=torch.float64)) * part / u.shape[1]).exp().round().long()
    edges = torch.maximum(geometric, part + 1)  # [K+1], from 1 to T
    sizes = edges.diff()
    t = edges[:-1] + (u * sizes).long()  # u·n rounds to below n for every u < 1
    first = torch.zeros(len(u), 1)
    weight = sizes.double().expand(len(u), -1)
    device = schedule.betas.device
    return Terms(torch.cat([first.long(), t], 1).to(device), torch.cat([first.double() + 1, weight], 1).to(device))


def reverse_of(
    network: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    prediction_type: PredictionType,
    variance_type: VarianceType,
    *,
    told: Tensor | None = None,
) -> Reverse:
    """p(z_{t-1} | z_t) of a chain, from what a network says: DDPM (Ho et al. 2020) eq. 11 and the variance's own rule.

    network: z_t [B,C,h,w] and what it is told, [B] → [B,C,h,w], or [B,2C,h,w] with learned_range.
    schedule: the chain's.  For `respaced(trained, kept)` give told=kept, int64 [T]: the network is told kept[t], and
    a learned variance lies between β̃_t and β_t of the respaced chain: Nichol & Dhariwal 2021 section 4.

    Raises ValueError: told not int64 [T]; as `reverse_variance`, `learned_log_variance` and `p_mean`.
    """
    if told is not None and (told.dtype != torch.int64 or told.shape != schedule.betas.shape):
        wanted = f"int64 of shape [{schedule.num_timesteps}], one number for each t of the chain"
        raise ValueError(f"told must be {wanted}, got {told.dtype} of shape {list(told.shape)}")
    fixed = None if variance_type == "learned_range" else reverse_variance(variance_type, schedule).log()  # [T]

    def reverse(z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        output = network(z_t, t if told is None else told[t]).double()  # so that the mean is not rounded
        if fixed is None:
            prediction, log_variance = learned_log_variance(output, t, schedule)
        else:
            prediction, log_variance = output, fixed[t].view(-1, 1, 1, 1)
        return p_mean(prediction, z_t, t, schedule, prediction_type), log_variance

    return reverse


def variational_bound(
    z_0: Tensor,
    schedule: Schedule,
    reverse: Reverse,
    noise: Callable[[Tensor], Tensor],
    *,
    chosen: Terms | None = None,
    nll: Nll = gaussian_nll,
) -> Bound:
    """-ln p(z_0) ≤ L_T + Σ_{t≥1} L_{t-1} + L_0, DDPM (Ho et al. 2020) eq. 5, with one draw of z_t for each term.

    z_0 [B,C,h,w], on the schedule's device.  noise: t int64 [B] → ε [B,C,h,w], asked once for each column of chosen.
    chosen: `every_term` (the default) or `stratified_terms`.  The expectation over q(z_t | z_0) is the caller's: the
    mean over draws of ε, or over samples z_0 with one draw each, for which every term is unbiased.

    nll: of L_0.  With a Gaussian density, as for latents, the bound is on a density of z_0 and may be negative; with
    `discretized_gaussian_nll`, for 8-bit pixels in the place of latents, it is on their probability.

    Raises ValueError: chosen not [B,K] with t in [0, T) and 0 in its first column; what `reverse` gives not of
    z_0's shape.
    """
    chosen = every_term(len(z_0), schedule) if chosen is None else chosen
    _refuse_bad_choice(chosen, len(z_0), schedule)
    terms: list[Tensor] = []
    for t in chosen.t.unbind(dim=1):
        z_t = q_sample(z_0, t, noise(t), schedule)
        mean, log_variance = reverse(z_t, t)
        if log_variance.shape not in (z_0.shape, (len(z_0), 1, 1, 1)):  # broadcasting would mix samples or pixels
            wanted = f"{list(z_0.shape)} or {[len(z_0), 1, 1, 1]}"
            raise ValueError(f"log_variance must have shape {wanted}, got {list(log_variance.shape)}")
        terms.append(vlb_term(z_0, z_t, t, schedule, mean=mean, log_variance=log_variance, nll=nll))
    return Bound(prior_term(z_0, schedule), chosen, torch.stack(terms, dim=1))


def entropy_form(bound: Bound, schedule: Schedule) -> Tensor:
    """-K = Σ_{t≥1} KL - H_q(z_T|z_0) + H_q(z_1|z_0) + H_p(z_T): Sohl-Dickstein et al. 2015 eq. 14.  [B], nats/element.

    Sohl-Dickstein's bound on -ln p(z_0), for comparison with `Bound.total`; it has no L_0 and no L_T.  It stands on two
    assumptions, their appendix B: the last step of the chain is the forward kernel turned round, p(z_0 | z_1) =
    N(√(1-β_0) z_1, β_0), whatever the network says; and -E ln N(z_t; 0, I) is the same at every t and is H_p, which is
    so where E[z_0²] = 1.  Otherwise it lies ½ (β_0 + ᾱ_T) (E[z_0²] - 1) below the bound of that chain, so for data with
    more variance than the prior it may lie below the entropy and is no bound.
    """
    kl = bound.rate - bound.prior  # [B]
    # H_q(z_T|z_0) = ½ ln(2πe (1-ᾱ_T)), H_q(z_1|z_0) = ½ ln(2πe β_0), H_p(z_T) = ½ ln(2πe); indices as DDPM counts
    entropies = torch.log(schedule.betas[0]) - torch.log1p(-schedule.alphas_cumprod[-1]) + math.log(2 * math.pi) + 1
    return kl + 0.5 * entropies


def _refuse_bad_choice(chosen: Terms, batch: int, schedule: Schedule) -> None:
    t, weight = chosen
    if t.ndim != 2 or t.shape[0] != batch or t.shape[1] == 0 or weight.shape != t.shape:
        came = f"t {list(t.shape)} and weight {list(weight.shape)}"
        raise ValueError(f"chosen must hold t and weight of one shape [B,K] with B = {batch}, got {came}")
    check_timesteps(t.flatten(), schedule)
    if bool((t[:, 0] != 0).any()):
        raise ValueError(f"the first column of chosen.t must be 0, the term L_0, got {t[:, 0].tolist()}")
