"""Say what a run will take, and what would fail, before it is queued: no GPU and no network are needed.

Parameters, operations, memory for each strategy, traffic from 1 to 128 nodes, what storage must give, days and
GPU-hours.  Exit code 2 where something would fail, a line for each.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pipeline import program
from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.planning.gpus import GPUS, Gpu, duration
from pipeline.planning.memory import GIB, Memory, Strategy, memory
from pipeline.planning.traffic import scale, storage_bytes_s
from pipeline.planning.work import Activations, Operations, count_operations, measure_activations
from pipeline.preflight import Found, look
from pipeline.strategies.choice import misfit

STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
LINK_GBIT_S = 400.0  # one InfiniBand NDR adapter
NODES = (1, 2, 4, 8, 16, 32, 64, 128)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, give the exit code."""
    made = program.config_parser("check", __doc__ or "")
    made.add_argument("--gpus", type=_count, default=None, metavar="N", help="all of them; engine.num_processes, or 1")
    made.add_argument("--gpus-per-node", type=_count, default=8, metavar="G", help="8 unless told")
    made.add_argument("--gpu", choices=list(GPUS), default="h100-sxm", metavar="NAME", help=", ".join(GPUS))
    made.add_argument(
        "--link-gbit-s",
        type=_rate,
        default=LINK_GBIT_S,
        metavar="R",
        help=f"what a node sends to others, all its adapters together, Gbit/s; {LINK_GBIT_S:g} unless told",
    )
    made.add_argument("--utilisation", type=_share, default=None, metavar="U", help="share of the GPU's peak, 0 to 1")
    return program.run_config(made, argv, check, None)


@dataclass(frozen=True)
class Plan:
    """A config, what it names, and what is to run it."""

    config: Config
    found: Found
    operations: Operations
    activations: Activations
    gpu: Gpu
    utilisation: float  # share of the GPU's peak
    utilisation_source: str
    num_ranks: int
    gpus_per_node: int
    node_bytes_s: float

    @property
    def strategy(self) -> Strategy:
        """The config's; auto is ddp here, as it is where the launcher says nothing."""
        asked = self.config.engine.strategy
        return "ddp" if asked == "auto" else asked

    @property
    def operations_per_image(self) -> int:
        """Of a step: the U-Net's forward and backward pass, what runs beside it, and a share of the update."""
        return self.operations.training + self.found.operations_beside + self.found.operations_of_update // self.share

    @property
    def num_trained(self) -> int:
        """Parameters that learn: the U-Net's, those of heads, and of text encoders that do."""
        text = self.config.conditioning.text
        of_text = self.found.num_text or 0 if text is not None and text.train else 0
        return self.found.num_unet + self.found.num_heads + of_text

    @property
    def num_frozen(self) -> int:
        """Parameters beside them on the device: the autoencoder's, and those of text encoders that run in each step."""
        text = self.config.conditioning.text
        online = text is not None and not text.train and text.embeddings == "online"
        return (self.found.num_autoencoder or 0) + (self.found.num_text or 0 if online else 0)

    @property
    def share(self) -> int:
        """Images of a rank in a step."""
        return max(1, self.config.train.global_batch_images // self.num_ranks)

    @property
    def micro_batch(self) -> int | None:
        """Images of a rank in one forward pass; None: its whole share, as for `auto` here."""
        asked = self.config.train.micro_batch_images
        return asked if isinstance(asked, int) else None

    @property
    def images_at_once(self) -> int:
        """The same as a number."""
        return min(self.micro_batch or self.share, self.share)

    def memory(self, strategy: Strategy) -> Memory:
        """On each rank."""
        config = self.config
        return memory(
            self.num_trained,
            strategy=strategy,
            precision=config.engine.precision,
            num_ranks=self.num_ranks,
            num_averages=len(config.ema.decays) + len(config.ema.sigma_rels),
            num_frozen=self.num_frozen,
            activations=self.activations.of(self.images_at_once),
            offload_optimizer=config.engine.offload_optimizer and strategy.startswith("zero"),
            largest_block=self.found.num_largest_block,
            accumulates=self.images_at_once < config.train.global_batch_images // self.num_ranks,
        )


def check(config: Config, args: argparse.Namespace) -> None:
    """What the config names → operations, activations → memory, traffic, time → what would fail."""
    num_ranks = args.gpus or config.engine.num_processes or 1
    plan = plan_of(
        config,
        look(config, num_ranks),
        num_ranks=num_ranks,
        gpu=GPUS[args.gpu],
        gpus_per_node=args.gpus_per_node,
        link_gbit_s=args.link_gbit_s,
        utilisation=args.utilisation,
    )
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    show_work(console, plan)
    show_memory(console, plan)
    peak = plan.gpu.tflops(config.engine.precision)
    if peak is not None:
        show_time(console, plan, peak)
        show_scaling(console, plan, peak)
    for note in plan.found.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if failures := would_fail(plan):
        raise UsageError("\n".join(failures))
    console.print("nothing found that would fail")


def plan_of(
    config: Config,
    found: Found,
    *,
    num_ranks: int,
    gpu: Gpu,
    gpus_per_node: int,
    link_gbit_s: float = LINK_GBIT_S,
    utilisation: float | None = None,
) -> Plan:
    """The same for `num_ranks` GPUs; `utilisation`: share of their peak, None: the table's."""
    again = config.engine.gradient_checkpointing
    return Plan(
        config,
        found,
        operations=count_operations(found.shape, checkpointing=again),
        activations=measure_activations(found.shape, config.engine.precision, checkpointing=again),
        gpu=gpu,
        utilisation=utilisation or gpu.utilisation,
        utilisation_source="told" if utilisation else gpu.utilisation_source,
        num_ranks=num_ranks,
        gpus_per_node=gpus_per_node,
        node_bytes_s=link_gbit_s * 1e9 / 8,
    )


def would_fail(plan: Plan) -> list[str]:
    """What was found when its names were looked up, and what the GPU lacks: a line for each."""
    gpu, failures = plan.gpu, list(plan.found.failures)
    if wrong := misfit(plan.config.optimizer, plan.strategy):
        failures.append(wrong)
    if gpu.tflops(plan.config.engine.precision) is None:
        failures.append(f"engine.precision: {plan.config.engine.precision} came, {gpu.name} has fp16 and fp32")
    if (needed := plan.memory(plan.strategy).peak) > gpu.memory_bytes:
        failures.append(
            f"engine.strategy: {plan.strategy} takes {needed / GIB:.1f} GiB, {gpu.name} has "
            f"{gpu.memory_bytes / GIB:.1f}; a smaller train.micro_batch_images, engine.gradient_checkpointing=true or "
            "another strategy takes less"
        )
    return failures


# To the terminal ----------------------------------------------------------------------------------


def _table(title: str, *headings: str) -> Table:
    made = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="right" if number else "left")
    return made


def _known(count: int | None) -> str:
    return "not looked at" if count is None else f"{count:,}"


def show_work(console: Console, plan: Plan) -> None:
    """Parameters and operations."""
    found, operations, activations = plan.found, plan.operations, plan.activations
    channels, height, width = found.shape.latent
    made = _table(f"what is computed: latents {channels}×{height}×{width}, {found.shape.num_tokens} tokens", "", "")
    made.add_row("U-Net, parameters", f"{found.num_unet:,}")
    made.add_row("text encoders, parameters", _known(found.num_text))
    made.add_row("autoencoder, parameters", _known(found.num_autoencoder))
    if found.num_heads:
        made.add_row("heads, parameters", f"{found.num_heads:,}")
    made.add_row("trained parameters", f"{plan.num_trained:,}")
    made.add_row("forward, GFLOP per image", f"{operations.forward / 1e9:,.1f}")
    again = ", gradient checkpointing" if plan.config.engine.gradient_checkpointing else ""
    made.add_row(f"training, GFLOP per image{again}", f"{operations.training / 1e9:,.1f}")
    if found.operations_beside:
        made.add_row("autoencoder, text encoders, heads, GFLOP per image", f"{found.operations_beside / 1e9:,.1f}")
    if found.operations_of_update:
        made.add_row("Muon's update, GFLOP per step and rank", f"{found.operations_of_update / 1e9:,.1f}")
    made.add_row("activations, GiB per image", f"{(activations.of(1) - activations.fixed) / GIB:.3f}")
    console.print(made)


def show_memory(console: Console, plan: Plan) -> None:
    """What a rank holds by each strategy."""
    gpu, memories = plan.gpu, {strategy: plan.memory(strategy) for strategy in STRATEGIES}
    title = (
        f"memory per GPU, GiB: {plan.num_ranks} ranks, {plan.config.engine.precision}, {plan.images_at_once} images "
        f"at once; {gpu.name} has {gpu.memory_bytes / GIB:.1f}"
    )
    made = _table(title, "", *(f"{name} (chosen)" if name == plan.strategy else name for name in memories))
    rows = ("weights", "masters", "gradients", "moments", "averages", "frozen", "buffers", "activations", "update")
    for row in (*rows, "allowance", "peak", "host"):
        made.add_row(row, *(f"{getattr(each, row) / GIB:.2f}" for each in memories.values()))
    console.print(made)


def show_time(console: Console, plan: Plan, peak: float) -> None:
    """How long, and what storage must give meanwhile.  `peak`: TFLOP/s of a GPU."""
    config, found = plan.config, plan.found
    num_images = config.train.steps * config.train.global_batch_images
    taken = duration(
        num_images,
        plan.operations_per_image,
        tflops=peak,
        utilisation=plan.utilisation,
        num_gpus=plan.num_ranks,
    )
    made = _table(f"the run: {num_images:,} images on {plan.num_ranks} × {plan.gpu.name}", "", "", "by")
    made.add_row("peak, dense TFLOP/s", f"{peak:,.1f}", plan.gpu.source)
    made.add_row("utilisation", f"{plan.utilisation:.0%}", plan.utilisation_source)
    made.add_row("images/s", f"{taken.images_per_s:,.1f}", "")
    made.add_row("days", f"{taken.days:,.2f}", "")
    made.add_row("GPU-hours", f"{taken.gpu_hours:,.0f}", "")
    if found.num_samples and found.shard_bytes:
        rate = storage_bytes_s(found.shard_bytes, found.num_samples, taken.images_per_s)
        made.add_row("epochs", f"{num_images / found.num_samples:,.1f}", f"{found.num_samples:,} samples")
        made.add_row("storage, MB/s", f"{rate / 1e6:,.1f}", "the index")
    elif config.data.train_latents is not None:
        rate = found.sample_bytes * taken.images_per_s
        made.add_row("storage, MB/s", f"{rate / 1e6:,.1f}", "the latents' size: there is no index")
    console.print(made)


def show_scaling(console: Console, plan: Plan, peak: float) -> None:
    """Traffic, and what of the step is spent computing, on numbers of nodes that batch and lanes allow."""
    config = plan.config
    rows = scale(
        plan.num_trained,
        strategy=plan.strategy,
        precision=config.engine.precision,
        global_batch=config.train.global_batch_images,
        micro_batch=plan.micro_batch,
        flops_per_image=plan.operations_per_image,
        flops_per_s=peak * 1e12 * plan.utilisation,
        gpus_per_node=plan.gpus_per_node,
        nodes=[nodes for nodes in NODES if config.data.lanes % (nodes * plan.gpus_per_node) == 0],
        in_node_bytes_s=plan.gpu.link_gb_s * 1e9,
        node_bytes_s=plan.node_bytes_s,
    )
    title = f"{plan.strategy}, the same global batch on more nodes: {plan.node_bytes_s * 8 / 1e9:g} Gbit/s from each"
    made = _table(title, "nodes", "GPUs", "sent, GB/step/GPU", "efficiency", "nothing hidden", "images/s")
    for row in rows:
        numbers = (f"{row.sent_bytes / 1e9:.2f}", f"{row.efficiency:.1%}", f"{row.efficiency_unhidden:.1%}")
        made.add_row(f"{row.num_nodes}", f"{row.num_ranks}", *numbers, f"{row.images_per_s:,.0f}")
    console.print(made)


def _count(word: str) -> int:
    if not word.isdecimal() or (value := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} came, a whole number of 1 or more was wanted")
    return value


def _rate(word: str) -> float:
    value = _number(word)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r} came, a number above 0 was wanted")
    return value


def _share(word: str) -> float:
    value = _number(word)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{word!r} came, a number above 0 and at most 1 was wanted")
    return value


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan
