"""What a rank holds on its device, by strategy: what `pipeline.strategies` and `pipeline.ema` allocate, in bytes.

P trained parameters, N ranks, k averages.  Not counted, and allowed for by two numbers here: CUDA's own context and the
libraries' workspaces, and what the allocator can't use between its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.planning.work import Precision

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
GIB = 2**30
BUCKET_ELEMENTS = 50_000_000  # of DeepSpeed's reductions: see pipeline.strategies.zero
MAX_LIVE_ELEMENTS = 10**9  # ZeRO-3 keeps so many gathered weights at most: DeepSpeed's default
CONTEXT_BYTES = GIB  # an assumption: CUDA's context and kernels, workspaces of cuDNN and cuBLAS
FRAGMENTATION = 0.1  # an assumption: share of activations that the allocator loses between its blocks


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank's device when they are most: at the end of the forward pass, or at the update."""

    weights: int  # as the forward pass reads them
    masters: int  # fp32 weights beside them, which the optimizer updates
    gradients: int
    moments: int  # two of AdamW
    averages: int
    frozen: int  # autoencoder, text encoders
    buffers: int  # of reductions, and whole weights while they are gathered
    activations: int
    update: int  # what only the update needs, when there are no activations
    host: int  # in the machine's memory instead, for each rank

    @property
    def state(self) -> int:
        """Of the training itself, between two passes with gradients there."""
        return self.weights + self.masters + self.gradients + self.moments + self.averages

    @property
    def allowance(self) -> int:
        """Not counted but assumed: see this module."""
        return CONTEXT_BYTES + round(FRAGMENTATION * self.activations)

    @property
    def peak(self) -> int:
        """All of it at once, activations or the update's own, whichever is more."""
        return self.state + self.frozen + self.buffers + max(self.activations, self.update) + self.allowance


def memory(
    num_trained: int,
    *,
    strategy: Strategy,
    precision: Precision,
    num_ranks: int,
    num_averages: int,
    num_frozen: int = 0,
    activations: int = 0,
    offload_optimizer: bool = False,
    largest_block: int | None = None,
    accumulates: bool = False,
) -> Memory:
    """What one rank holds.  `num_frozen`: parameters beside, fp32; `activations`: bytes of a micro-batch.

    `largest_block`: parameters that FSDP2 gathers at once (a level of the U-Net); None: all.  `accumulates`: there are
    several micro-batches in a step.
    DDP: everything, everywhere; in bf16_weights fp32 masters beside bf16 weights and gradients.  ZeRO (Rajbhandari et
    al. 2020): flat fp32 masters and moments in N parts, also in fp32, where weights are there once more; stage 1
    keeps whole gradients, 2 splits them in fp32, 3 the weights as well.  FSDP2: all in N parts, fp32, gathered by
    block.  Averages lie beside the masters, and are cut as they are.
    """
    low = precision == "bf16_weights"
    split = 1 if strategy == "ddp" else num_ranks
    part = -(-num_trained // split)  # rounded up
    weights, masters, gradients, buffers, update = 0, 4 * part, 4 * part, 0, 0
    whole = (2 if low else 4) * num_trained
    match strategy:
        case "ddp":
            weights, gradients = whole, whole
            masters = 4 * num_trained if low else 0
            update = 4 * num_trained if low else 0  # gradients once more, in fp32
        case "zero1":
            weights, gradients = whole, whole
            buffers = (2 if low else 4) * BUCKET_ELEMENTS
            update = 4 * part
        case "zero2":
            weights = whole
            buffers = 2 * (2 if low else 4) * BUCKET_ELEMENTS  # two: one is filled while the other is reduced
            update = 4 * part if low else 0
        case "zero3":
            weights = (2 if low else 4) * part
            buffers = 4 * BUCKET_ELEMENTS + (2 if low else 4) * min(num_trained, MAX_LIVE_ELEMENTS)
        case "fsdp2":
            weights, masters = 4 * part, 0  # the cuts are the masters
            block = num_trained if largest_block is None else largest_block
            # The block that computes and the next one, gathered; and its whole gradient in fp32.
            buffers = 2 * (2 if low else 4) * block + 4 * block if num_ranks > 1 else 0
            if accumulates and num_ranks > 1:
                buffers += 4 * num_trained  # gradients stay whole until the last micro-batch
    moments, host = 8 * part, 0
    if offload_optimizer:
        host = masters + moments + 4 * part  # and the gradients, when they arrive there
        masters, moments, update = 0, 0, 0
        gradients = gradients if strategy == "zero1" else 0
    averages = 4 * part * num_averages
    if offload_optimizer:  # they lie beside the masters
        host, averages = host + averages, 0
    return Memory(weights, masters, gradients, moments, averages, 4 * num_frozen, buffers, activations, update, host)
