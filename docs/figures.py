"""The figures of docs/theory.md, computed from the formulas themselves: python docs/figures.py [FOLDER]."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.diffusion.schedule import Schedule, make_schedule, respaced, shifted, with_zero_terminal_snr
from pipeline.diffusion.sde import VpSde, euler_maruyama, even_times, heun
from pipeline.diffusion.weightings import Weighting, weights

LINEAR = make_schedule("linear", 1000, 1e-4, 0.02)
SCALED = make_schedule("scaled_linear", 1000, 0.00085, 0.012)
COSINE = make_schedule("cosine", 1000, 1e-4, 0.02)


def blank(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def schedules() -> Figure:
    """ᾱ_t and λ_t of the schedules and what changes them."""
    figure = blank(10, 3.8)
    left, right = figure.subplots(1, 2)
    drawn: dict[str, Schedule] = {
        "linear": LINEAR,
        "scaled linear": SCALED,
        "cosine": COSINE,
        "scaled linear, shifted by 2": shifted(SCALED, 2.0),
        "scaled linear, zero terminal SNR": with_zero_terminal_snr(SCALED),
    }
    for name, schedule in drawn.items():
        left.plot(schedule.alphas_cumprod, label=name)
        right.plot(schedule.log_snr)
    left.set(xlabel="t", ylabel="ᾱ, the share of the latent's variance")
    right.set(xlabel="t", ylabel="λ = ln SNR", ylim=(-15, 11))
    left.legend(fontsize=8)
    return figure


def weightings() -> Figure:
    """Each weighting as w(λ) in ½ ∫ w(λ) ‖ε - ε_θ‖² dλ and as what multiplies ‖ε - ε_θ‖² at t, 1 at λ = 0."""
    figure = blank(10, 3.8)
    left, right = figure.subplots(1, 2)
    lam = COSINE.log_snr
    here = int(lam.abs().argmin())
    step = weights("elbo", COSINE, "epsilon")  # ½ T |dλ/dt|, where w is 1
    names: tuple[Weighting, ...] = ("elbo", "simple", "min_snr", "snr_plus_one", "truncated_snr", "sigmoid", "edm")
    for name in names:
        table = weights(name, COSINE, "epsilon")
        of_lam = table / step
        style = "--" if name in {"truncated_snr", "min_snr"} else "-"
        left.plot(lam, of_lam / of_lam[here], style, label=name)
        right.plot(table / table[here], style)
    left.set(xlabel="λ = ln SNR", ylabel="w(λ) / w(0)", yscale="log", ylim=(1e-3, 1e3), xlim=(-9, 9))
    right.set(xlabel="t, cosine schedule", ylabel="weight at t / weight at λ = 0", yscale="log", ylim=(1e-3, 1e3))
    left.legend(fontsize=8)
    return figure


def bound() -> Figure:
    """L_{t-1} for data N(0, ½²) under the best denoiser, in closed form: fixed β, fixed β̃ and the best variance."""
    figure = blank(10, 3.8)
    std = 0.5
    kept = torch.arange(1, 21) * 50 - 1
    chains = {"1,000 steps": LINEAR, "20 of them": respaced(LINEAR, kept)}
    for axes, (title, schedule) in zip(figure.subplots(1, 2), chains.items(), strict=True):
        abar, before, beta = schedule.alphas_cumprod[1:], schedule.alphas_cumprod_prev[1:], schedule.betas[1:]
        posterior = (1 - before) / (1 - abar) * beta  # β̃
        unknown = std**2 * (1 - abar) / (abar * std**2 + 1 - abar)  # Var(z_0 | z_t)
        error = before * beta**2 / (1 - abar) ** 2 * unknown  # E‖μ̃ - μ_θ‖²
        styles = {"σ² = β": (beta, "-"), "σ² = β̃": (posterior, "-"), "the best σ²": (posterior + error, "--")}
        for name, (variance, style) in styles.items():
            ratio = posterior / variance
            kl = 0.5 * (ratio - 1 - ratio.log() + error / variance) / math.log(2)
            axes.plot(range(1, len(kl) + 1), kl, style, label=f"{name}: {float(kl.sum()):.3f} bits/dim in all")
        axes.set(xlabel="t", ylabel="L(t-1), bits/dim", yscale="log", title=f"linear schedule, {title}")
        axes.legend(fontsize=8)
    return figure


def trajectories() -> Figure:
    """The reverse SDE and the probability-flow ODE carry one noise to the same data law by other paths."""
    figure = blank(10, 3.8)
    sde, means, std = VpSde.linear(), torch.tensor([-1.2, 0.9]), 0.2
    share = torch.tensor([0.4, 0.6])

    def parts(z: Tensor, t: float) -> tuple[Tensor, Tensor, float]:
        centres = sde.alpha(t) * means
        variance = sde.alpha(t) ** 2 * std**2 + sde.sigma(t) ** 2
        density = share * torch.exp(-0.5 * (z[..., None] - centres) ** 2 / variance) / math.sqrt(2 * math.pi * variance)
        return density, centres, variance

    def score(z: Tensor, t: float) -> Tensor:
        density, centres, variance = parts(z, t)
        return (density * (centres - z[..., None])).sum(-1) / variance / density.sum(-1)

    times = even_times(1.0, 1e-3, 400)
    grid = torch.linspace(-3, 3, 300)
    heat = torch.stack([parts(grid, t)[0].sum(-1) for t in times[::4]])
    start = torch.linspace(-2, 2, 9)
    noise = torch.randn(400, 9, generator=torch.Generator().manual_seed(3))
    ode, reverse = [start], [start]
    for k, pair in enumerate(pairwise(times)):
        ode.append(heun(score, sde, ode[-1], pair))
        reverse.append(euler_maruyama(score, sde, reverse[-1], pair, lambda _, k=k: noise[k]))
    for axes, paths, title in zip(
        figure.subplots(1, 2), (ode, reverse), ("probability-flow ODE", "reverse SDE"), strict=True
    ):
        axes.imshow(
            heat.T.sqrt(), aspect="auto", origin="lower", extent=(1, 0, -3, 3), cmap="Blues", interpolation="bilinear"
        )
        axes.plot(times, torch.stack(paths), color="tab:red", linewidth=0.8)
        axes.set(xlabel="time: from noise (1) to data (0)", ylabel="z", title=title, xlim=(1, 0), ylim=(-3, 3))
    return figure


def main() -> None:
    """Write them all."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for make in (schedules, weightings, bound, trajectories):
        make().savefig(folder / f"{make.__name__}.png", format="png")


if __name__ == "__main__":
    main()
