"""ZeRO-1, 2 and 3 (Rajbhandari et al. 2020) by DeepSpeed: optimizer, gradients, weights split over the ranks.

DeepSpeed splits flat: the parameters of a group one after another, cut into one part for each rank (stages 1 and 2), or
each parameter cut by itself and the parts one after another (stage 3).  Either way what a rank holds is one flat fp32
tensor per group, padded at the end.  Those are the lists of this strategy, and `_Place` says where a parameter lies.
Moments are put where torch's AdamW looks for them, under these flat tensors.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from pipeline.errors import UsageError
from pipeline.optim import MOMENTS, UpdateRule, adamw, set_learning_rate
from pipeline.strategies.precision import InPrecision, LossScale, Precision, scaled
from pipeline.strategies.wrapped import StepReport, Whole, Wrapped

BUCKET_ELEMENTS = 50_000_000  # gradients reduced together at most


@dataclass(frozen=True)
class _Place:
    """A stretch of a parameter, and where this rank has it: `local[group][start : start + count]`."""

    group: int
    start: int
    count: int
    offset: int  # of its first element in the whole, flattened parameter


class Zero(Wrapped):
    """A DeepSpeed engine, its flat masters, and the way from them to names and back."""

    def __init__(
        self,
        model: InPrecision,
        trained: Mapping[str, Parameter],
        *,
        stage: int,
        device: torch.device,
        rule: UpdateRule,
        offload_optimizer: bool,
    ) -> None:
        """`trained`: the parameters of the model that learn, under the names they go by."""
        deepspeed = _deepspeed(device)
        self.names = tuple(trained)
        self.parameters = list(trained.values())
        self.shapes = [parameter.shape for parameter in self.parameters]
        self.stage, self.device = stage, device
        self.loss_scale = LossScale(device) if model.precision == "fp16" else None
        exact = {n: p.detach().clone() for n, p in trained.items()} if model.precision == "bf16_weights" else None
        model.to(device)
        decayed = [p for p in trained.values() if p.ndim > 1]
        spared = [p for p in trained.values() if p.ndim <= 1]
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adamw(decayed, spared, rule),
            config=_config(stage, model.precision, device, rule, offload_optimizer),
            dist_init_required=False,
        )
        self.model = self.engine
        self.zero = self.engine.optimizer
        if exact is not None:  # DeepSpeed made its masters of the rounded weights
            self._load_weights(exact.__getitem__)

    @contextmanager
    def micro_batch(self, last: bool) -> Generator[None]:
        """See Wrapped.  Stages 2 and 3 reduce every micro-batch, since nobody has room for the gradients."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """See Wrapped."""
        if self.loss_scale is not None:  # DeepSpeed multiplies with it here and divides by it in its step
            self.zero.override_loss_scale(float(self.loss_scale.scale))
        self.engine.backward(scaled(loss, None), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepReport:
        """See Wrapped.  DeepSpeed itself looks at the norm, waits for it, and drops a step that is not finite."""
        set_learning_rate(self.zero, learning_rate)
        self.engine.step()
        bad = torch.full((), bool(self.zero.overflow), device=self.device)
        skipped = torch.zeros_like(bad) if self.loss_scale is None else self.loss_scale.update(bad)
        found = self.engine.get_global_grad_norm()
        norm = (
            found.to(self.device).float()
            if isinstance(found, Tensor)
            else torch.full((), float(found), device=self.device)
        )
        return StepReport(norm, finite=~bad | skipped, skipped=skipped)

    def _flat(self) -> list[Tensor]:
        """DeepSpeed's fp32 masters, a flat tensor for each group."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _states(self) -> list[dict[str, Tensor]]:
        """AdamW's state of each flat tensor; empty ones before the first step."""
        return [self.zero.optimizer.state[tensor] for tensor in self._flat()]

    def weights(self) -> list[Tensor]:
        """See Wrapped."""
        return [tensor.detach() for tensor in self._flat()]

    def moments(self) -> dict[str, list[Tensor]]:
        """See Wrapped."""
        states = self._states()
        return {name: [state[name] for state in states] for name in MOMENTS} if states[0] else {}

    def num_updates(self) -> int:
        """See Wrapped."""
        first = self._states()[0]
        return int(first["step"]) if first else 0

    def _place(self, parameter: Parameter) -> _Place | None:
        """Where this rank has its stretch of a parameter; None where it has none."""
        held: Any = parameter  # DeepSpeed hangs its notes on the parameters
        if self.stage == 3:
            group, start, count = self.zero.grad_position[self.zero.get_param_id(held)]
            offset = dist.get_rank() * held.partition_numel()
            count = min(int(count), held.ds_numel - offset)  # the rest is padding
            return _Place(int(group), int(start), count, offset) if count > 0 else None
        if (link := held._hp_mapping) is None:
            return None
        mine, whole = link.hp_fragment_address, link.lp_fragment_address
        return _Place(link.param_group_index, mine.start, mine.numel, whole.start)

    @torch.no_grad()
    def full(self, local: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """See Wrapped.  Each rank lays its stretch into zeros; their sum is the whole."""
        for name, parameter, shape in zip(self.names, self.parameters, self.shapes, strict=True):
            whole = torch.zeros(shape, dtype=torch.float32, device=self.device)
            if place := self._place(parameter):
                stretch = local[place.group].narrow(0, place.start, place.count)
                whole.view(-1).narrow(0, place.offset, place.count).copy_(stretch)
            dist.all_reduce(whole)
            yield name, whole

    @torch.no_grad()
    def fill(self, local: list[Tensor], whole: Whole) -> None:
        """See Wrapped."""
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if place := self._place(parameter):
                stretch = whole(name).reshape(-1).narrow(0, place.offset, place.count)
                local[place.group].narrow(0, place.start, place.count).copy_(stretch)

    @torch.no_grad()
    def _load_weights(self, weights: Whole) -> None:
        """Masters, and by DeepSpeed's own ways after a step what the forward pass reads."""
        self.fill(self.weights(), weights)
        if self.stage == 3:
            self.zero._partition_all_parameters()  # what is whole now is old
            for group in range(len(self.weights())):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            if persistent := self.zero.persistent_parameters:
                persistent[0].all_gather(persistent)
        else:
            self.zero.update_lp_params()

    @torch.no_grad()
    def load(self, weights: Whole, moments: Mapping[str, Whole], num_updates: int) -> None:
        """See Wrapped."""
        self._load_weights(weights)
        self.zero.optimizer.state.clear()
        if num_updates:
            for weight, state in zip(self.weights(), self._states(), strict=True):
                state["step"] = torch.tensor(float(num_updates), device=weight.device)
                state.update({name: torch.zeros_like(weight) for name in MOMENTS})
            for name, local in self.moments().items():
                self.fill(local, moments[name])


def _deepspeed(device: torch.device) -> Any:
    """The module, imported where ranks have been joined; quiet, and on the device that was chosen."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")  # what a launcher says; a single process has none
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    accelerator: Any = get_accelerator()
    if (found := accelerator.device_name()) != device.type:
        raise UsageError(f"DeepSpeed chose {found}, the run is on {device.type}; set DS_ACCELERATOR={device.type}")
    if device.type == "cpu":  # an all-reduce for inference, which it would compile here and now
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _config(
    stage: int, precision: Precision, device: torch.device, rule: UpdateRule, offload_optimizer: bool
) -> dict[str, Any]:
    """DeepSpeed's own config.  Autocast is ours, inside the engine: to DeepSpeed such weights are plain fp32."""
    split: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "overlap_comm": device.type == "cuda" and stage > 1,
        "contiguous_gradients": True,
        "memory_efficient_linear": False,  # it patches torch, and computes otherwise under autocast
    }
    if offload_optimizer:
        split["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    # Stage 1 would choose another optimizer for fp32 sums over bf16 weights; so it sums micro-batches as DDP does.
    sums = "bf16" if stage == 1 and precision == "bf16_weights" else "fp32"
    return {
        "train_micro_batch_size_per_gpu": 1,  # it only multiplies this, for its log
        "gradient_accumulation_steps": 1,  # we say which micro-batch is the last
        "gradient_clipping": rule.clip_norm,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW
        "zero_force_ds_cpu_optimizer": False,  # the same when offloaded: nothing is compiled at the start
        "bf16": {"enabled": precision == "bf16_weights", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": sums},
        "communication_data_type": "fp32",
        "zero_optimization": split,
    }
