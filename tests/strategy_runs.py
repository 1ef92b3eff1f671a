"""Short trainings of a tiny U-Net under any strategy, saved whole and gone on with under any other.

The functions here run in processes of their own, one for each rank.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from world import FORKSERVER, free_port

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Leg:
    """Some steps of a run under one strategy, from a saved file or from the start."""

    strategy: str
    ranks: int
    steps: int
    start: int = 0
    network: Literal["unet", "autoencoder", "joint"] = "unet"
    global_batch: int = 8
    precision: str = "fp32"
    micro_batches: int = 1
    checkpointing: bool = False
    frozen: bool = False  # some parameters don't learn
    offload: bool = False
    scale: float | None = None  # fp16: the loss scale to begin with
    poison: tuple[int, str] | None = None  # a step, and what is made not finite in it: "loss" or "gradient"
    load: Path | None = None
    detour: int = 0  # steps elsewhere before that is loaded
    device: Literal["cpu", "cuda"] = "cpu"
    compiled: str | None = None  # by which backend; in steps after the second nothing may be compiled
    channels_last: bool = False
    no_waiting: bool = False  # CUDA: waiting for the device in the steps after the second is an error


def batch_at(leg: Leg, step: int, rank: int) -> list[dict[str, Any]]:
    """This rank's micro-batches of a step; each sample is a function of its global position."""
    import torch

    share = leg.global_batch // leg.ranks
    found: list[dict[str, Any]] = []
    for i in range(share):
        position = step * leg.global_batch + rank * share + i
        draw = torch.Generator().manual_seed(position)
        found.append(
            {
                "z_t": torch.randn(2, 8, 8, generator=draw),
                "eps": torch.randn(2, 8, 8, generator=draw),
                "t": torch.randint(0, 1000, (), generator=draw),
                "label": torch.tensor(position % 3),
            }
        )
    size = share // leg.micro_batches
    parts = [found[i : i + size] for i in range(0, share, size)]
    return [{key: torch.stack([sample[key] for sample in part]) for key in part[0]} for part in parts]


def tiny_unet() -> Any:
    """A diffusers U-Net with attention and odd sizes: few parameters divide evenly over ranks."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(6, 10),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=5,
        norm_num_groups=2,
        num_class_embeds=3,
    )


def tiny_joint() -> Any:
    """A U-Net that reads what a CLIP text encoder makes of token ids, and both of them learn."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    class Joint(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            settings = CLIPTextConfig(
                vocab_size=11,
                hidden_size=5,
                intermediate_size=7,
                num_hidden_layers=2,
                num_attention_heads=1,
                max_position_embeddings=4,
                bos_token_id=9,
                eos_token_id=10,
                attention_dropout=0.0,
            )
            self.text_encoder = CLIPTextModel(settings)
            self.unet = tiny_unet()

        def forward(self, z_t: Any, t: Any, input_ids: Any, class_labels: Any) -> Any:
            tokens = self.text_encoder(input_ids).last_hidden_state
            return self.unet(z_t, t, class_labels=class_labels, encoder_hidden_states=tokens).sample

    return Joint()


def build(leg: Leg) -> tuple[Any, Any, Any]:
    """What is wrapped, its core, and the error of a prediction: (module, core, (model, batch) → (prediction, loss))."""
    import torch

    from vae.config import VaeModelConfig
    from vae.model import build as build_autoencoder
    from vae.steps import AutoencoderStep

    torch.manual_seed(0)
    if leg.network == "autoencoder":
        core = build_autoencoder(VaeModelConfig(in_channels=2, block_out_channels=(6, 10), norm_num_groups=2))
        noise = torch.zeros(leg.global_batch, 4, 4, 4)

        def reconstruct(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
            found = model(batch["z_t"], noise[: len(batch["z_t"])].to(batch["z_t"].device))
            return found.x_hat, (found.x_hat - batch["z_t"]).square().mean() + 0.01 * found.moments.square().mean()

        return AutoencoderStep(core), core, reconstruct
    if leg.network == "joint":
        joint = tiny_joint()

        def denoise_by_text(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
            ids = (batch["label"][:, None] + torch.arange(4, device=batch["t"].device)) % 9
            ids[:, -1] = 10
            found = model(batch["z_t"], batch["t"], ids, batch["label"])
            return found, (found - batch["eps"]).square().mean()

        return joint, joint, denoise_by_text
    unet = tiny_unet()

    def denoise(model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
        tokens = torch.zeros(len(batch["t"]), 1, 5, device=batch["t"].device)
        found = model(batch["z_t"], batch["t"], class_labels=batch["label"], encoder_hidden_states=tokens).sample
        return found, (found - batch["eps"]).square().mean()

    return unet, unet, denoise


def run_rank(rank: int, leg: Leg, port: int, out: str) -> None:
    """One rank of a leg; rank 0 writes what came out."""
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    if leg.ranks > 1:
        said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": leg.ranks, "LOCAL_WORLD_SIZE": leg.ranks}
        os.environ.update({name: str(value) for name, value in said.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch
    from accelerate import PartialState

    torch.set_num_threads(1)
    state = PartialState(cpu=leg.device == "cpu")
    result = train(leg, rank, state.device)
    if rank == 0:
        torch.save(result, out)
    from pipeline.engine import leave

    leave(0)


def train(leg: Leg, rank: int, device: Any) -> dict[str, Any]:
    """Take the steps; what they found, and everything whole."""
    import torch
    import torch._dynamo.utils

    from pipeline.strategies import UpdateRule, wrap
    from pipeline.strategies.regions import compile_regions

    module, core, error = build(leg)
    if leg.checkpointing:
        for part in (core.unet, core.text_encoder) if leg.network == "joint" else (core,):
            enable = getattr(part, "gradient_checkpointing_enable", None) or part.enable_gradient_checkpointing
            enable()
    if leg.frozen:
        core.conv_in.requires_grad_(False)
        core.mid_block.requires_grad_(False)
    if leg.compiled is not None:
        compile_regions(module, leg.compiled)
    rule = UpdateRule(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01, clip_norm=1.0)
    wrapped = wrap(
        module,
        leg.strategy,  # pyright: ignore[reportArgumentType]
        core=core,
        precision=leg.precision,  # pyright: ignore[reportArgumentType]
        device=device,
        rule=rule,
        offload_optimizer=leg.offload,
        channels_last=leg.channels_last,
    )
    shadow = [weight.clone() for weight in wrapped.weights()]
    if leg.load is not None:
        for step in range(leg.detour):
            one_step(leg, wrapped, error, 1000 + step, rank)
        saved = torch.load(leg.load)
        wrapped.load(
            saved["weights"].__getitem__,
            {name: tensors.__getitem__ for name, tensors in saved["moments"].items()},
            saved["num_updates"],
        )
        wrapped.load_scaler(saved["scaler"])
        wrapped.fill(shadow, saved["ema"].__getitem__)
    if leg.scale is not None:
        wrapped.load_scaler({"scale": leg.scale, "good_steps": 0.0})

    losses: list[float] = []
    reports: list[tuple[float, bool, bool]] = []
    for step in range(leg.start, leg.start + leg.steps):
        loss, report = one_step(leg, wrapped, error, step, rank)
        losses.append(loss)
        reports.append((float(report.grad_norm), bool(report.finite), bool(report.skipped)))
        if report.finite:
            torch._foreach_lerp_(shadow, wrapped.weights(), 0.1)
    counters = torch._dynamo.utils.counters
    return {
        "losses": losses,
        "reports": reports,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "num_updates": wrapped.num_updates(),
        "scaler": wrapped.scaler(),
        "weights": {name: tensor.cpu().clone() for name, tensor in wrapped.full(wrapped.weights())},
        "ema": {name: tensor.cpu().clone() for name, tensor in wrapped.full(shadow)},
        "moments": {
            moment: {name: tensor.cpu().clone() for name, tensor in wrapped.full(local)}
            for moment, local in wrapped.moments().items()
        },
    }


def one_step(leg: Leg, wrapped: Any, error: Any, step: int, rank: int) -> tuple[float, Any]:
    """The mean loss over micro-batches and ranks, and the step's report."""
    import torch
    import torch.distributed as dist

    device = torch.device(leg.device)
    mean = torch.zeros((), device=device)
    parts = [{key: value.to(device) for key, value in part.items()} for part in batch_at(leg, step, rank)]
    if leg.no_waiting and step >= leg.start + 2:
        torch.cuda.set_sync_debug_mode("error")
    if leg.compiled is not None:
        torch._dynamo.config.error_on_recompile = step >= leg.start + 2
    for i, batch in enumerate(parts):
        with wrapped.micro_batch(last=i == len(parts) - 1):
            prediction, loss = error(wrapped.model, batch)
            assert prediction.dtype == torch.float32
            if leg.poison == (step, "gradient") and rank == leg.ranks - 1:
                prediction.register_hook(lambda gradient: gradient * torch.inf)
            if leg.poison == (step, "loss") and rank == leg.ranks - 1:
                loss = loss + torch.inf
            wrapped.backward(loss / len(parts))
        mean += loss.detach() / len(parts)
    if leg.ranks > 1:
        dist.all_reduce(mean)
    report = wrapped.step(1e-3)
    if leg.no_waiting:
        torch.cuda.set_sync_debug_mode("default")
    return float(mean) / leg.ranks, report


def run(leg: Leg, out: Path) -> dict[str, Any]:
    """Run a leg's ranks to their end; what they found."""
    import torch

    port = free_port()
    started = [FORKSERVER.Process(target=run_rank, args=(rank, leg, port, str(out))) for rank in range(leg.ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    codes = [process.exitcode for process in started]
    assert codes == [0] * leg.ranks, f"{codes}\n{Path(f'{out}.log').read_text()[-4000:]}"
    return torch.load(out)


@dataclass(frozen=True)
class Case:
    """A run that changes its clothes half-way: some steps as `first`, saved, and gone on with as `second`."""

    first: Leg
    second: Leg

    def __str__(self) -> str:
        return f"{name_of(self.first)}-to-{name_of(self.second)}"


def name_of(leg: Leg) -> str:
    """A leg's name, of what is not usual in it."""
    words = [leg.strategy, str(leg.ranks)]
    words += [leg.device] if leg.device != "cpu" else []
    words += [leg.network] if leg.network != "unet" else []
    words += [leg.precision] if leg.precision != "fp32" else []
    words += [f"micro{leg.micro_batches}"] if leg.micro_batches > 1 else []
    switches = {"checkpointing": leg.checkpointing, "offload": leg.offload, "frozen": leg.frozen, "detour": leg.detour}
    words += [word for word, on in switches.items() if on]
    words += [f"compiled_{leg.compiled}"] if leg.compiled else []
    words += ["channels_last"] if leg.channels_last else []
    words += [f"scale{leg.scale:g}"] if leg.scale else []
    return "_".join(words)


HALF = 5  # steps before the change, and after it


class Runs:
    """What legs found, each run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[Leg, dict[str, Any]] = {}

    def of(self, leg: Leg) -> dict[str, Any]:
        """Run a leg, or know it already."""
        if leg not in self.done:
            self.done[leg] = run(leg, self.path(leg))
        return self.done[leg]

    def path(self, leg: Leg) -> Path:
        """Where a leg is saved."""
        came_from = f"-after-{leg.load.stem}" if leg.load else ""
        poison = "_".join(map(str, leg.poison)) if leg.poison else ""
        return self.folder / f"{name_of(leg)}{poison}-{leg.start}+{leg.steps}{came_from}.pt"

    def differences(self, case: Case) -> dict[str, float]:
        """How the second half differs from that of a run in which nothing changed, and from DDP's on one rank."""
        first = replace(case.first, steps=HALF)
        self.of(first)
        second = replace(case.second, start=HALF, steps=HALF, load=self.path(first))
        found = self.of(second)
        unchanged = self.of(replace(case.first, steps=2 * HALF))
        alone = self.of(replace(case.first, strategy="ddp", ranks=1, steps=2 * HALF, offload=False))
        relative = [abs(a - b) / b for a, b in zip(found["losses"], unchanged["losses"][HALF:], strict=True)]
        assert found["num_updates"] == unchanged["num_updates"]
        assert found["scaler"] == unchanged["scaler"]
        return {
            "first": relative[0],
            "rest": max(relative[1:]),
            "ema": largest(found["ema"], unchanged["ema"]),
            "ddp": max(abs(a - b) / b for a, b in zip(found["losses"], alone["losses"][HALF:], strict=True)),
            "ddp_ema": largest(found["ema"], alone["ema"]),
        }


def largest(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Largest absolute difference of tensors under the same names."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
