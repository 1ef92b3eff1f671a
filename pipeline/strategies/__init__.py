"""How the ranks share the training: DDP, ZeRO-1, ZeRO-2, ZeRO-3 (DeepSpeed) and FSDP2 behind one interface.

Accelerate starts and joins the ranks; what they then do is said to torch and DeepSpeed directly.  Accelerate's
`prepare` shards nothing on a CPU (FSDP2), refuses fp16 there, and steps DeepSpeed's engine within backward, where
nobody can look at the gradients first; and so one path is tested everywhere.
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch.nn import Module

from pipeline.optim import UpdateRule
from pipeline.strategies.choice import Strategy, choose
from pipeline.strategies.ddp import Ddp
from pipeline.strategies.fsdp2 import Fsdp2
from pipeline.strategies.precision import InPrecision, Precision, autocast
from pipeline.strategies.regions import compile_regions
from pipeline.strategies.wrapped import StepReport, Whole, Wrapped
from pipeline.strategies.zero import Zero

__all__ = ["Precision", "StepReport", "Strategy", "UpdateRule", "Whole", "Wrapped", "autocast", "choose", "wrap"]


def wrap(
    module: Module,
    strategy: Strategy,
    *,
    precision: Precision,
    device: torch.device,
    rule: UpdateRule,
    core: Module | None = None,
    offload_optimizer: bool = False,
    compiled: bool = False,
    channels_last: bool = False,
) -> Wrapped:
    """Have a module's trained parameters (those that require a gradient) trained by all ranks.

    Every rank gives the same fp32 weights.  `core`: the part of the module that holds all of them, and after whose
    names they go; None: the module.  `compiled`, `channels_last`: see EngineConfig.  The process group is there already
    where there are several ranks.
    """
    trained = {name: p for name, p in (core or module).named_parameters() if p.requires_grad}
    if others := {p for p in module.parameters() if p.requires_grad} - set(trained.values()):
        raise ValueError(f"{len(others)} trained parameters of {type(module).__name__} lie outside core")
    if strategy != "ddp" and not dist.is_initialized():  # a single process, which no launcher started
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # torch tells DeepSpeed, and itself, of new names for its collectives.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    if compiled:
        compile_regions(module)
    inside = InPrecision(module, precision, device, channels_last=channels_last)
    match strategy:
        case "ddp":
            return Ddp(inside, trained, device=device, rule=rule)
        case "zero1" | "zero2" | "zero3":
            return Zero(
                inside,
                trained,
                stage=int(strategy[-1]),
                device=device,
                rule=rule,
                offload_optimizer=offload_optimizer,
            )
        case "fsdp2":
            return Fsdp2(inside, trained, device=device, rule=rule)
