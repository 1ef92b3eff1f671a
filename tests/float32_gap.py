"""How far diffusers' schedulers as they come, in float32, are from our reverse steps in float64: a table.

    PYTHONPATH=.:tests python tests/float32_gap.py

Stable Diffusion's schedule (scaled_linear, 0.00085 to 0.012, T = 1000), 50 steps, the largest |difference| over
[4,4,16,16]. One step: of any, from the same z_t. Chain: at the end, from the same noise, with the noise predicted as it
is for latents that are N(0, ½²). Ancestral is fixed_small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from pipeline.diffusion.process import q_sample
from pipeline.diffusion.sampling import Spacing, ancestral_step, chain, ddim_step, previous, timesteps_of
from pipeline.diffusion.schedule import make_schedule

T, NUM_STEPS, STD = 1000, 50, 0.5
WORDS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = make_schedule("scaled_linear", T, 0.00085, 0.012)
SPACINGS: tuple[Spacing, ...] = ("leading", "linspace", "trailing")
Step = Callable[[Tensor, Tensor, int, int], Tensor]  # prediction, z_t, t, t_prev → z_prev


def float32_gap(spacing: Spacing, eta: float | None) -> tuple[float, float]:
    """(one step, chain); eta None is ancestral, else DDIM's."""
    offset = 1 if spacing == "leading" else 0  # as Stable Diffusion has it
    indices = timesteps_of(spacing, T, NUM_STEPS, steps_offset=offset)
    steps = chain(indices) if eta is None else [(t, previous(t, T, NUM_STEPS)) for t in indices]
    kind = DDPMScheduler if eta is None else DDIMScheduler
    scheduler = kind(T, **WORDS, clip_sample=False, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(NUM_STEPS)
    ours, theirs = (_our_ancestral, _their_ancestral(scheduler)) if eta is None else _ddim(scheduler, eta)
    one_step = 0.0
    z_ours = z_theirs = _draws(0)
    for t, t_prev in steps:
        eps = _draws(3 * t + 1)
        z_t = q_sample(STD * _draws(3 * t + 2), torch.full((4,), t), eps, SCHEDULE)
        difference = ours(eps, z_t, t, t_prev) - theirs(eps, z_t, t, t_prev)
        one_step = max(one_step, difference.abs().max().item())
        z_ours = ours(_predicted(z_ours, t), z_ours, t, t_prev)
        z_theirs = theirs(_predicted(z_theirs, t), z_theirs, t, t_prev)
    return one_step, (z_ours - z_theirs).abs().max().item()


def table() -> str:
    """Markdown: a row for each spacing."""
    kinds: tuple[tuple[str, float | None], ...] = (("ancestral", None), ("DDIM", 0.0), ("DDIM, eta 1", 1.0))
    head = "".join(f" {name}: one step | chain |" for name, _ in kinds)
    lines = [f"| spacing |{head}", "|---" * 7 + "|"]
    for spacing in SPACINGS:
        pairs = [float32_gap(spacing, eta) for _, eta in kinds]
        lines.append(f"| {spacing} |" + "".join(f" {one:.1e} | {whole:.1e} |" for one, whole in pairs))
    return "\n".join(lines)


def _our_ancestral(prediction: Tensor, z_t: Tensor, t: int, t_prev: int) -> Tensor:
    words: dict[str, Any] = {"prediction_type": "epsilon", "variance_type": "fixed_small", "noise": _draws(t)}
    return ancestral_step(prediction.double(), z_t.double(), t, t_prev, SCHEDULE, **words)


def _their_ancestral(scheduler: Any) -> Step:
    def step(prediction: Tensor, z_t: Tensor, t: int, t_prev: int) -> Tensor:
        del t_prev
        return scheduler.step(prediction, t, z_t, generator=torch.Generator().manual_seed(t), return_dict=False)[0]

    return step


def _ddim(scheduler: Any, eta: float) -> tuple[Step, Step]:
    def ours(prediction: Tensor, z_t: Tensor, t: int, t_prev: int) -> Tensor:
        words: dict[str, Any] = {"prediction_type": "epsilon", "eta": eta, "noise": _draws(t)}
        return ddim_step(prediction.double(), z_t.double(), t, t_prev, SCHEDULE, **words)

    def theirs(prediction: Tensor, z_t: Tensor, t: int, t_prev: int) -> Tensor:
        del t_prev
        return scheduler.step(prediction, t, z_t, eta=eta, variance_noise=_draws(t), return_dict=False)[0]

    return ours, theirs


def _predicted(z: Tensor, t: int) -> Tensor:
    """E[ε | z_t] for z_0 ~ N(0, STD²): √(1-ᾱ) z_t / (ᾱ STD² + 1 - ᾱ)."""
    abar = SCHEDULE.alphas_cumprod[t].item()
    return z * (math.sqrt(1 - abar) / (abar * STD**2 + 1 - abar))


def _draws(seed: int) -> Tensor:
    return torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    print(table())
