"""Which fused kernel attention runs on, where there is a choice."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.errors import UsageError

Attention = Literal["auto", "cudnn", "flash", "flash3", "efficient", "math", "xformers"]
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ON_CPU = ("auto", "flash", "math")


def preferred(kind: Attention, device: torch.device) -> AbstractContextManager[object]:
    """Where torch tries this kernel first, and then the others: each can do only some widths and dtypes.

    auto: torch's own order.  xformers: see `use_xformers`.  Raises UsageError where it can't be had.
    """
    if device.type != "cuda" and kind not in ON_CPU:
        raise UsageError(f"engine.attention: {kind} came, which runs on CUDA; {', '.join(ON_CPU)} run on this device")
    match kind:
        case "auto":
            return nullcontext()
        case "xformers":
            _probe_xformers(device)
            return nullcontext()
        case "flash3":
            _activate_flash3()
            first = KERNELS["flash"]
        case _:
            first = KERNELS[kind]
    return sdpa_kernel([first, *(kernel for kernel in KERNELS.values() if kernel != first)], set_priority=True)


def use_xformers(model: Any) -> None:
    """Have a diffusers model call xformers' memory-efficient attention."""
    model.enable_xformers_memory_efficient_attention()


def _activate_flash3() -> None:
    activate: Any = getattr(attention, "activate_flash_attention_impl", None)
    if activate is None:
        raise UsageError(f"engine.attention: flash3 wants a newer torch, {torch.__version__} came; flash was wanted")
    try:
        activate("FA3")
    except Exception as error:  # whatever its package stumbles over
        told = " ".join(str(error).split())[:200]
        raise UsageError(f"engine.attention: flash3 wants FlashAttention-3 (flash_attn_interface): {told}") from error


def _probe_xformers(device: torch.device) -> None:
    try:
        found = version("xformers")
    except PackageNotFoundError:
        raise UsageError("engine.attention: xformers is not installed; pip install '.[xformers]', or auto") from None
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore

        few = torch.zeros(1, 8, 2, 16, device=device, dtype=torch.float16)
        memory_efficient_attention(few, few, few)
    except Exception as error:  # it raises many kinds where its kernels were built for another torch
        raise UsageError(
            f"engine.attention: xformers {found} has no kernels that load beside torch {torch.__version__}; install "
            "the two that belong together, or set auto"
        ) from error
