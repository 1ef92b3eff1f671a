"""AdamW with decay where it belongs, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import AdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_adamw(
    model: Module, *, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused.  Vectors (norms, biases) are not decayed."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def learning_rate_at(step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of the optimizer step `step` (0 is the first): linear warm-up, then constant or half a cosine."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    match schedule:
        case "constant":
            return peak
        case "cosine":
            done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
            return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        case _:
            raise ValueError(f"schedule {schedule!r} came, constant or cosine was wanted")


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def moments(optimizer: Any, model: Module) -> dict[str, dict[str, Tensor]]:
    """Moment → parameter name → fp32 tensor: the optimizer's state in no engine's format.  Empty before a step."""
    named = {parameter: name for name, parameter in model.named_parameters()}
    state = {named[parameter]: values for parameter, values in optimizer.state.items() if values}
    return {moment: {name: values[moment] for name, values in state.items()} for moment in MOMENTS}


def load_moments(optimizer: Any, model: Module, saved: dict[str, dict[str, Tensor]], num_steps: int) -> None:
    """Put moments that `moments` gave into a fresh optimizer that has made `num_steps` steps."""
    if num_steps == 0:
        return
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state: dict[str, Tensor] = {moment: saved[moment][name].to(parameter.device) for moment in MOMENTS}
        state["step"] = torch.tensor(float(num_steps), device=parameter.device if parameter.is_cuda else "cpu")
        optimizer.state[parameter] = state
