"""FSDP2 (torch's fully_shard): every parameter is cut along its first dimension, and whole only while it is used."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Module, Parameter

from pipeline.optim import UpdateRule
from pipeline.strategies.masters import Masters
from pipeline.strategies.precision import InPrecision, LossScale
from pipeline.strategies.regions import regions
from pipeline.strategies.wrapped import StepReport, Whole, Wrapped


class Fsdp2(Wrapped):
    """The masters are this rank's cuts, fp32 in every precision; the optimizer sees them as plain tensors."""

    def __init__(
        self,
        model: InPrecision,
        trained: Mapping[str, Parameter],
        *,
        device: torch.device,
        rule: UpdateRule,
    ) -> None:
        """`trained`: the parameters of the model that learn, under the names they go by."""
        module = model.module
        self.names = tuple(trained)
        self.loss_scale = LossScale(device) if model.precision == "fp16" else None
        self.shapes = [parameter.shape for parameter in trained.values()]
        homes = _homes(module)
        owned = [homes[parameter] for parameter in trained.values()]
        module.to(device)
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # InPrecision has cast the inputs; FSDP casts weights, and sums gradients in fp32.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if model.precision == "bf16_weights" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for part in regions(module):  # gathered one after another; the root has the rest
            fully_shard(part, mesh=self.mesh, mp_policy=policy)
        self.root: FSDPModule = fully_shard(module, mesh=self.mesh, mp_policy=policy)
        for part in module.modules():
            if isinstance(part, FSDPModule):  # diffusers writes a class's name into config.json
                type(part).__name__ = type(part).__name__.removeprefix("FSDP")
        self.parameters = [cast(DTensor, getattr(home, name)) for home, name in owned]
        weights = [parameter.to_local() for parameter in self.parameters]
        self.masters = Masters(weights, [len(shape) for shape in self.shapes], rule)
        self.model = model

    @contextmanager
    def micro_batch(self, last: bool) -> Generator[None]:
        """See Wrapped."""
        self.root.set_requires_gradient_sync(last)
        yield

    def step(self, learning_rate: float) -> StepReport:
        """See Wrapped."""
        gradients = [cast(DTensor | None, parameter.grad) for parameter in self.parameters]
        cuts = [None if gradient is None else gradient.to_local() for gradient in gradients]
        report = self.masters.step(cuts, learning_rate, self.loss_scale, _sum_over_ranks)
        for parameter in self.parameters:
            parameter.grad = None
        return report

    def weights(self) -> list[Tensor]:
        """See Wrapped."""
        return self.masters.weights

    def moments(self) -> dict[str, list[Tensor]]:
        """See Wrapped."""
        return self.masters.moments()

    def num_updates(self) -> int:
        """See Wrapped."""
        return self.masters.num_updates()

    @torch.no_grad()
    def full(self, local: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """See Wrapped."""
        for name, shape, cut in zip(self.names, self.shapes, local, strict=True):
            stride = torch.empty(shape, device="meta").stride()
            whole = DTensor.from_local(cut, self.mesh, [Shard(0)], shape=shape, stride=stride)
            yield name, whole.full_tensor()

    @torch.no_grad()
    def fill(self, local: list[Tensor], whole: Whole) -> None:
        """See Wrapped."""
        for name, cut in zip(self.names, local, strict=True):
            if len(cuts := whole(name).chunk(self.mesh.size())) > self.mesh.get_rank():
                cut.copy_(cuts[self.mesh.get_rank()])

    def load(self, weights: Whole, moments: Mapping[str, Whole], num_updates: int) -> None:
        """See Wrapped."""
        self.fill(self.masters.weights, weights)
        self.masters.load_moments(moments, num_updates, self.fill)


def _homes(module: Module) -> dict[Parameter, tuple[Module, str]]:
    """The module that has each parameter as an attribute, and the attribute's name: FSDP puts another in its place."""
    return {p: (home, name) for home in module.modules() for name, p in home.named_parameters(recurse=False)}


def _sum_over_ranks(value: Tensor) -> Tensor:
    dist.all_reduce(value)
    return value
