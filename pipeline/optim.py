"""AdamW with decay where it belongs, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import AdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class UpdateRule:
    """Settings of AdamW and of the clipping before it; the learning rate is given with each step."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float  # largest global L2 norm of the gradient


def adamw(decayed: Sequence[Tensor], spared: Sequence[Tensor], rule: UpdateRule) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused.  Vectors (norms, biases) belong to the spared."""
    groups = [
        {"params": list(decayed), "weight_decay": rule.weight_decay},
        {"params": list(spared), "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], betas=rule.betas, eps=rule.eps, fused=True)


def learning_rate_at(
    step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int, decay_start_steps: int = 1
) -> float:
    """Learning rate of the optimizer step `step` (0 is the first): a linear warm-up, then as the schedule says.

    constant; cosine: half a cosine to 0 at `total_steps`; inverse_sqrt: peak · sqrt(s / step) once step > s, with
    s = `decay_start_steps` (Karras et al. 2024, "Analyzing and Improving the Training Dynamics", eq. 67).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    match schedule:
        case "constant":
            return peak
        case "cosine":
            done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
            return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        case "inverse_sqrt":
            return peak / math.sqrt(max(step / decay_start_steps, 1.0))
        case _:
            raise ValueError(f"schedule {schedule!r} came, constant, cosine or inverse_sqrt was wanted")


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
