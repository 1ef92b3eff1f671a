"""DDP: every rank holds everything; gradients are averaged while backward runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from pipeline.optim import UpdateRule, hidden_weights
from pipeline.strategies.masters import Masters
from pipeline.strategies.precision import InPrecision, LossScale
from pipeline.strategies.wrapped import StepReport, Whole, Wrapped


class Ddp(Wrapped):
    """The masters are the parameters themselves; in bf16_weights fp32 copies beside them.

    There micro-batches and ranks are summed in bf16; ZeRO-2, ZeRO-3 and FSDP2 sum them in fp32.
    """

    def __init__(
        self,
        model: InPrecision,
        trained: Mapping[str, Parameter],
        *,
        device: torch.device,
        rule: UpdateRule,
    ) -> None:
        """`trained`: the parameters of the model that learn, under the names they go by."""
        self.names = tuple(trained)
        self.parameters = list(trained.values())
        self.loss_scale = LossScale(device) if model.precision == "fp16" else None
        model.to(device)
        if model.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.apart = model.precision == "bf16_weights"
        weights = [p.detach().float().clone() if self.apart else p for p in self.parameters]
        hidden = hidden_weights(model) if rule.muon_momentum is not None else set[Tensor]()
        places = [i for i, p in enumerate(self.parameters) if p in hidden]
        self.masters = Masters(weights, [p.ndim for p in self.parameters], rule, hidden=places)
        if self.apart:
            model.bfloat16()
        self.model = model
        self.ddp: DistributedDataParallel | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            ids = [device] if device.type == "cuda" else None
            self.ddp = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
            self.model = self.ddp

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """See Wrapped."""
        return nullcontext() if last or self.ddp is None else self.ddp.no_sync()

    def step(self, learning_rate: float) -> StepReport:
        """See Wrapped."""
        gradients = [p.grad for p in self.parameters]
        if self.apart:
            gradients = [None if gradient is None else gradient.float() for gradient in gradients]
        report = self.masters.step(gradients, learning_rate, self.loss_scale)
        for parameter in self.parameters:
            parameter.grad = None
        self._round()
        return report

    @torch.no_grad()
    def _round(self) -> None:
        """Copy the masters into the bf16 weights that the forward pass reads."""
        if self.apart:
            rounded = [parameter.detach() for parameter in self.parameters]
            torch._foreach_copy_(rounded, self.masters.weights)  # pyright: ignore[reportPrivateUsage]

    def weights(self) -> list[Tensor]:
        """See Wrapped."""
        return self.masters.weights

    def moments(self) -> dict[str, list[Tensor]]:
        """See Wrapped."""
        return self.masters.moments()

    def num_updates(self) -> int:
        """See Wrapped."""
        return self.masters.num_updates()

    def full(self, local: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """See Wrapped.  Nothing to gather."""
        return zip(self.names, local, strict=True)

    @torch.no_grad()
    def fill(self, local: list[Tensor], whole: Whole) -> None:
        """See Wrapped."""
        for name, tensor in zip(self.names, local, strict=True):
            tensor.copy_(whole(name))

    def load(self, weights: Whole, moments: Mapping[str, Whole], num_updates: int) -> None:
        """See Wrapped."""
        self.fill(self.masters.weights, weights)
        self._round()
        self.masters.load_moments(moments, num_updates, self.fill)
