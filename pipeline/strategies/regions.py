"""A network's levels: what FSDP2 gathers, and torch.compile translates, one after another."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module

from pipeline.errors import UsageError

MAX_GRAPHS = 64  # of one method's code, which levels of one class share; torch's own limit is 8


def regions(module: Module) -> list[Module]:
    """The levels of diffusers' U-Net and autoencoder, by their names."""
    found: list[Module] = []
    for name, part in module.named_modules():
        *_, parent, own = ["", *name.split(".")]
        if own == "mid_block" or parent in ("down_blocks", "up_blocks"):
            found.append(part)
    return found


def compile_regions(module: Module, backend: str = "inductor") -> None:
    """Have each level's forward translated when it is first called, once for each shape.

    By level, not whole: so gradients are reduced over the ranks while others are yet to come, and FSDP2 gathers as
    before.  Modules and parameters keep their names.  What can't be translated whole raises an error: there are no
    graph breaks.
    """
    import torch._dynamo.config as limits

    limits.recompile_limit = max(limits.recompile_limit, MAX_GRAPHS)
    for part in regions(module):
        compiled: Any = torch.compile(part.forward, fullgraph=True, dynamic=False, backend=backend)
        part.forward = compiled


def check_compiler(device: torch.device) -> None:
    """Raise UsageError where torch.compile has nothing to compile with."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UsageError("engine.compile: true wants Triton, which came with torch for CUDA and does not load here")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UsageError("engine.compile: true wants a C++ compiler on a CPU, such as g++; there is none") from error
