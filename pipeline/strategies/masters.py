"""fp32 master weights that lie on this rank as plain tensors, their fused AdamW, and Muon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.optim import MOMENTS, UpdateRule, orthogonal
from pipeline.strategies.precision import LossScale
from pipeline.strategies.wrapped import StepReport, Whole

TOGETHER = 2**26  # numbers in the matrices that Muon makes orthogonal at once
MUON_SIZE = 0.2  # root mean square of AdamW's update over the learning rate
Fill = Callable[[list[Tensor], Whole], None]  # Wrapped.fill


@dataclass(frozen=True)
class _State:
    """The optimizer's own: moments like the weights, and one count for all of them.  Muon's second moment stays 0."""

    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    count: Tensor  # updates, float32 [], on the device


class Masters:
    """Weights, moments, and a step that never waits for the device.

    The kernel that torch's AdamW calls is called here at once, without the optimizer's walk over its parameters, which
    took longer than the update of a small network.  It divides each gradient by one number, which carries the clipping
    and the loss scale, and leaves everything as it was where it is told that something is not finite.
    """

    def __init__(
        self, weights: Sequence[Tensor], num_dims: Sequence[int], rule: UpdateRule, *, hidden: Sequence[int] = ()
    ) -> None:
        """`weights`: fp32, each an alias of what the model reads or its own; `num_dims` of the whole tensors.

        `hidden`: places of those, whole ones, that Muon updates.
        """
        self.weights = [weight.detach() for weight in weights]
        self.rule = rule
        self._matrices: dict[torch.Size, list[int]] = {}  # Muon's, by their shapes as matrices
        for i in hidden:
            self._matrices.setdefault(self.weights[i].flatten(1).shape, []).append(i)
        turned = set(hidden)
        decayed = [i for i, dims in enumerate(num_dims) if dims > 1 and i not in turned]
        spared = [i for i, dims in enumerate(num_dims) if dims <= 1]  # norms, biases
        self._groups = [(group, decay) for group, decay in ((decayed, rule.weight_decay), (spared, 0.0)) if group]
        self._state: _State | None = None

    @torch.no_grad()
    def step(
        self,
        gradients: Sequence[Tensor | None],
        learning_rate: float,
        loss_scale: LossScale | None,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> StepReport:
        """One update from gradients like the weights; None is zero, as it is where weights lie in one flat tensor.

        `sum_over_ranks`: where each rank has a part of the weights only.
        """
        given = [gradient for gradient in gradients if gradient is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(given)))  # pyright: ignore[reportPrivateUsage]
        if sum_over_ranks is not None:
            norm = sum_over_ranks(norm.square()).sqrt()
        if loss_scale is not None:
            norm = norm / loss_scale.scale
        bad = ~norm.isfinite()
        divisor = ((norm + 1e-6) / self.rule.clip_norm).clamp(min=1.0)
        if loss_scale is not None:
            divisor = divisor * loss_scale.scale
        self._update(gradients, learning_rate, divisor, bad.float())
        skipped = torch.zeros_like(bad) if loss_scale is None else loss_scale.update(bad)
        return StepReport(norm, finite=~bad | skipped, skipped=skipped)

    def _update(
        self, gradients: Sequence[Tensor | None], learning_rate: float, divisor: Tensor, found_inf: Tensor
    ) -> None:
        """AdamW (Loshchilov & Hutter 2019), fused, and Muon; with `found_inf` 1 instead of 0 nothing changes."""
        state = self._state = self._state or self._fresh(0)
        beta1, beta2 = self.rule.betas
        filled = [
            torch.zeros_like(weight) if gradient is None else gradient
            for weight, gradient in zip(self.weights, gradients, strict=True)
        ]
        count = state.count + 1
        for group, weight_decay in self._groups:
            torch._fused_adamw_(  # pyright: ignore[reportPrivateUsage]
                [self.weights[i] for i in group],
                [filled[i] for i in group],
                [state.exp_avg[i] for i in group],
                [state.exp_avg_sq[i] for i in group],
                [],
                [count] * len(group),
                amsgrad=False,
                lr=learning_rate,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                eps=self.rule.eps,
                maximize=False,
                grad_scale=divisor,
                found_inf=found_inf,
            )
        for (rows, columns), places in self._matrices.items():
            together = max(1, TOGETHER // (rows * columns))
            for first in range(0, len(places), together):
                self._turn(places[first : first + together], filled, learning_rate, divisor, found_inf > 0)
        state.count.add_(1 - found_inf)

    def _turn(
        self, places: Sequence[int], gradients: Sequence[Tensor], learning_rate: float, divisor: Tensor, bad: Tensor
    ) -> None:
        """Muon (Jordan et al. 2024) with Nesterov's momentum, for weights of one shape.

        As long as AdamW's updates: 0.2 sqrt(max(m, n)), Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4.
        """
        assert self._state is not None and self.rule.muon_momentum is not None
        beta, ahead = self.rule.muon_momentum, list[Tensor]()
        for i in places:
            gradient = torch.where(bad, 0.0, gradients[i] / divisor)
            momentum = self._state.exp_avg[i]
            momentum.copy_(torch.where(bad, momentum, momentum.lerp(gradient, 1 - beta)))
            ahead.append(gradient.lerp(momentum, beta).flatten(1))
        turned = orthogonal(torch.stack(ahead))  # [K,m,n]
        size = MUON_SIZE * max(turned.shape[1:]) ** 0.5
        for i, matrix in zip(places, turned, strict=True):
            weight = self.weights[i]
            new = weight * (1 - learning_rate * self.rule.weight_decay)
            new -= learning_rate * size * matrix.reshape(weight.shape)
            weight.copy_(torch.where(bad, weight, new))

    def _fresh(self, num_updates: int) -> _State:
        exp_avg, exp_avg_sq = ([torch.zeros_like(weight) for weight in self.weights] for _ in MOMENTS)
        return _State(exp_avg, exp_avg_sq, torch.full((), float(num_updates), device=self.weights[0].device))

    def moments(self) -> dict[str, list[Tensor]]:
        """exp_avg and exp_avg_sq like the weights; {} before the first step."""
        return {name: getattr(self._state, name) for name in MOMENTS} if self._state else {}

    def num_updates(self) -> int:
        """AdamW's count of steps.  Waits for the device."""
        return int(self._state.count) if self._state else 0

    def load_moments(self, moments: Mapping[str, Whole], num_updates: int, fill: Fill) -> None:
        """Have the moments of so many updates, which `fill` takes this rank's part of; none after no update."""
        self._state = self._fresh(num_updates) if num_updates else None
        for name, local in self.moments().items():
            fill(local, moments[name])
