"""Exponential moving averages of the weights: fp32, one update per optimizer step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Module


def profile_name(decay: float) -> str:
    """The folder name of an average in a checkpoint."""
    return f"decay-{decay:g}"


class Ema:
    """Shadow weights for each decay, under the model's parameter names.

    θ̄ ← θ̄ + (1 - d) (θ - θ̄) with d = min(decay, (1 + n) / (10 + n)) after n updates: early averages forget the
    random start quickly (Tarvainen & Valpola 2017; the ramp is TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: Module, decays: Iterable[float]) -> None:
        """Every average starts as a copy of the weights."""
        self.decays = tuple(decays)
        self.names = [name for name, _ in model.named_parameters()]
        start = [parameter.detach().float() for parameter in model.parameters()]
        self.shadows = {decay: [p.clone() for p in start] for decay in self.decays}

    @torch.no_grad()
    def update(self, model: Module, num_updates: int) -> None:
        """Take one optimizer step's weights in.  `num_updates`: steps before this one."""
        weights = [parameter.detach() for parameter in model.parameters()]
        for decay, shadow in self.shadows.items():
            d = min(decay, (1 + num_updates) / (10 + num_updates))
            torch._foreach_lerp_(shadow, weights, 1 - d)  # pyright: ignore[reportPrivateUsage]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Profile name → parameter name → fp32 weights."""
        return {
            profile_name(decay): dict(zip(self.names, shadow, strict=True)) for decay, shadow in self.shadows.items()
        }

    @torch.no_grad()
    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take over what `state` gave.  Raises KeyError where a profile or parameter is missing."""
        for decay, shadow in self.shadows.items():
            saved = state[profile_name(decay)]
            for name, tensor in zip(self.names, shadow, strict=True):
                tensor.copy_(saved[name])
