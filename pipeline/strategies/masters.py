"""fp32 master weights that lie on this rank as plain tensors, and their fused AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.optim import MOMENTS, UpdateRule, adamw, set_learning_rate
from pipeline.strategies.precision import LossScale
from pipeline.strategies.wrapped import StepReport, Whole

Fill = Callable[[list[Tensor], Whole], None]  # Wrapped.fill


class Masters:
    """Weights, moments, and a step that never waits for the device.

    The fused kernel divides each gradient by one number, which carries the clipping and the loss scale, and leaves
    everything as it was, its count of steps too, where it is told that something is not finite.
    """

    def __init__(self, weights: Sequence[Tensor], num_dims: Sequence[int], rule: UpdateRule) -> None:
        """`weights`: fp32, each an alias of what the model reads or its own; `num_dims` of the whole tensors."""
        self.weights = [weight.detach() for weight in weights]
        self.rule = rule
        decayed = [weight for weight, dims in zip(self.weights, num_dims, strict=True) if dims > 1]
        spared = [weight for weight, dims in zip(self.weights, num_dims, strict=True) if dims <= 1]
        self.optimizer = adamw(decayed, spared, rule)

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
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = torch.zeros_like(weight) if gradient is None else gradient
        given = [gradient for gradient in gradients if gradient is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(given)))  # pyright: ignore[reportPrivateUsage]
        if sum_over_ranks is not None:
            norm = sum_over_ranks(norm.square()).sqrt()
        divisor = torch.ones_like(norm) if loss_scale is None else loss_scale.scale.clone()
        norm = norm / divisor
        bad = ~norm.isfinite()
        divisor = divisor * ((norm + 1e-6) / self.rule.clip_norm).clamp(min=1.0)
        # Where torch's own GradScaler tells the fused kernel the same.
        self.optimizer.grad_scale = divisor  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.found_inf = bad.float()  # pyright: ignore[reportAttributeAccessIssue]
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        skipped = torch.zeros_like(bad) if loss_scale is None else loss_scale.update(bad)
        return StepReport(norm, finite=~bad | skipped, skipped=skipped)

    def moments(self) -> dict[str, list[Tensor]]:
        """exp_avg and exp_avg_sq like the weights; {} before the first step."""
        state = self.optimizer.state
        return {name: [state[weight][name] for weight in self.weights] for name in MOMENTS} if state else {}

    def num_updates(self) -> int:
        """AdamW's count of steps."""
        state = self.optimizer.state
        return int(state[self.weights[0]]["step"]) if state else 0

    def load_moments(self, moments: Mapping[str, Whole], num_updates: int, fill: Fill) -> None:
        """Have the moments of so many updates, which `fill` takes this rank's part of; none after no update."""
        self.optimizer.state.clear()
        if num_updates == 0:
            return
        for weight in self.weights:
            made = {name: torch.zeros_like(weight) for name in MOMENTS}
            count = torch.tensor(float(num_updates), device=weight.device)
            self.optimizer.state[weight] = {"step": count, **made}
        for name, local in self.moments().items():
            fill(local, moments[name])
