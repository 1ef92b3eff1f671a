"""What goes over links in a step, what it costs from one node to many, and what storage must give.

Rings: of a tensor of b bytes each of N ranks sends (N-1)/N b in a reduce-scatter or an all-gather, and both in an
all-reduce.  So it is for every ring algorithm; NCCL may choose trees, which send as much and wait less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.planning.memory import Strategy
from pipeline.planning.work import Precision

BACKWARD_SHARE = 2 / 3  # of a step's arithmetic


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in one optimizer step, and as many that it receives."""

    in_last_backward: float  # hidden behind the last micro-batch's backward pass, as far as that lasts
    in_every_pass: float  # hidden behind all passes of all micro-batches
    exposed: float  # after the update: nothing computes meanwhile

    @property
    def total(self) -> float:
        """All of them."""
        return self.in_last_backward + self.in_every_pass + self.exposed


@dataclass(frozen=True)
class Scaled:
    """A fixed global batch on a number of nodes."""

    num_nodes: int
    num_ranks: int
    sent_bytes: float  # by each rank in a step
    step_s: float
    efficiency: float  # share of the step in which GPUs compute, where traffic hides behind the computation
    efficiency_unhidden: float  # and where none does
    images_per_s: float


def traffic(
    num_trained: int, *, strategy: Strategy, precision: Precision, num_ranks: int, num_micro: int = 1
) -> Traffic:
    """Of a step of `num_micro` micro-batches.

    ddp: gradients are all-reduced once.  zero1: likewise, fp32, and the updated weights gathered.  zero2: the same, but
    gradients with every micro-batch.  zero3: weights gathered for both passes and gradients reduced to their owners,
    with every micro-batch.  fsdp2: the same, but gradients once.  Left out: norms, losses, single numbers.
    """
    once = (num_ranks - 1) / num_ranks
    weights = once * (2 if precision == "bf16_weights" else 4) * num_trained
    fp32 = once * 4 * num_trained
    match strategy:
        case "ddp":
            return Traffic(2 * weights, 0, 0)
        case "zero1":
            return Traffic(0, 0, 2 * fp32 + weights)  # its reductions are not overlapped: see pipeline.strategies.zero
        case "zero2":
            return Traffic(0, num_micro * 2 * fp32, weights)
        case "zero3":
            return Traffic(0, num_micro * (2 * weights + fp32), 0)
        case "fsdp2":
            return Traffic(fp32, num_micro * 2 * weights, 0)


def scale(
    num_trained: int,
    *,
    strategy: Strategy,
    precision: Precision,
    global_batch: int,
    micro_batch: int | None,
    flops_per_image: int,
    flops_per_s: float,
    gpus_per_node: int,
    nodes: Sequence[int],
    in_node_bytes_s: float,
    node_bytes_s: float,
) -> list[Scaled]:
    """The same global batch on ever more nodes; those that it doesn't divide over are left out.

    `flops_per_s`: what one GPU reaches; `node_bytes_s`: what a node sends to others through all its adapters together.
    NCCL lays as many rings as there are adapters, so a tensor's ring traffic leaves a node once, shared by them: bytes
    of a rank / min(link in the node, link of the node).  Not counted: latency, other jobs on the network, that
    smaller micro-batches use a GPU less well.
    """
    found: list[Scaled] = []
    for num_nodes in nodes:
        num_ranks = num_nodes * gpus_per_node
        if global_batch % num_ranks:
            continue
        share = global_batch // num_ranks
        num_micro = max(1, -(-share // (micro_batch or share)))
        sent = traffic(num_trained, strategy=strategy, precision=precision, num_ranks=num_ranks, num_micro=num_micro)
        link = in_node_bytes_s if num_nodes == 1 else min(in_node_bytes_s, node_bytes_s)
        compute_s = share * flops_per_image / flops_per_s
        last_backward_s = BACKWARD_SHARE * compute_s / num_micro
        late = max(0.0, sent.in_last_backward / link - last_backward_s)
        early = max(0.0, sent.in_every_pass / link - (compute_s - min(last_backward_s, sent.in_last_backward / link)))
        step_s = compute_s + late + early + sent.exposed / link
        unhidden = compute_s + sent.total / link
        rate = global_batch / step_s
        efficiencies = compute_s / step_s, compute_s / unhidden
        found.append(Scaled(num_nodes, num_ranks, sent.total, step_s, *efficiencies, rate))
    return found


def storage_bytes_s(shard_bytes: int, num_samples: int, images_per_s: float) -> float:
    """What loading reads: bytes of a sample, with its headers in the tar, times samples a second, over all nodes."""
    return shard_bytes / num_samples * images_per_s
