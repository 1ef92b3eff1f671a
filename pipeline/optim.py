"""AdamW with decay where it belongs, Muon's update, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Conv2d, Linear, Module
from torch.optim import AdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
EDGES = ("conv_in", "conv_out")  # a U-Net's first and last layer, which Muon leaves to AdamW
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a quintic that takes singular values of 0 to 1 near 1 in five turns
NUM_TURNS = 5


@dataclass(frozen=True)
class UpdateRule:
    """Settings of AdamW, of Muon and of the clipping before them; the learning rate is given with each step."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float  # largest global L2 norm of the gradient
    muon_momentum: float | None = None  # None: AdamW updates all weights; else Muon those of `hidden_weights`


def adamw(decayed: Sequence[Tensor], spared: Sequence[Tensor], rule: UpdateRule) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused.  Vectors (norms, biases) belong to the spared."""
    groups = [
        {"params": list(decayed), "weight_decay": rule.weight_decay},
        {"params": list(spared), "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], betas=rule.betas, eps=rule.eps, fused=True)


def hidden_weights(module: Module) -> set[Tensor]:
    """What Muon updates: matrices of linear layers and convolutions, but for a U-Net's first and last.

    Embeddings, whose rows are looked up one by one, are none; nor is a matrix of a single row.
    """
    found: set[Tensor] = set()
    for name, layer in module.named_modules():
        if isinstance(layer, Linear | Conv2d) and name.rpartition(".")[2] not in EDGES and layer.weight.shape[0] > 1:
            found.add(layer.weight)
    return found


def orthogonal(matrices: Tensor) -> Tensor:
    """[K,m,n] → each U S' Vᵀ for its U S Vᵀ, all of S' within about 0.7 to 1.2: Newton and Schulz's way, of Muon.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".  Products are in bf16 on a GPU, as
    there, in fp32 on a CPU; the result is fp32.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(NUM_TURNS):
        gram = x @ x.mT  # [K,m,m]
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).float()


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
