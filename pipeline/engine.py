"""The ranks: Accelerate's Accelerator, what they do together, and how they leave."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from torch import Tensor
from torch.nn import Module

from pipeline.config import EngineConfig
from pipeline.errors import RunError, UsageError

PRECISION = {"fp32": "no", "bf16": "bf16"}  # our word → Accelerate's
ERRORS = {kind.__name__: kind for kind in (UsageError, RunError)}


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: the mean loss over the global batch, its named parts, and the gradient's L2 norm."""

    loss: float
    parts: dict[str, float]
    grad_norm: float


class Engine:
    """All ranks of a run.  Plain DDP where there are several; this is the only place that knows."""

    def __init__(self, config: EngineConfig) -> None:
        """Join the ranks.  Raises UsageError where another number of them is there than was asked for."""
        on_cpu = config.device == "cpu" or not torch.cuda.is_available()
        PartialState(cpu=on_cpu)  # before the Accelerator, or it doesn't choose gloo on a machine without a GPU
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision=PRECISION[config.precision])
        self.rank: int = self.accelerator.process_index
        self.num_ranks: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        asked = config.num_processes or int(os.environ.get("WORLD_SIZE", "1"))
        if self.num_ranks != asked:
            raise UsageError(
                f"engine.num_processes: {asked} ranks were asked for, {self.num_ranks} came; start with "
                f"accelerate launch --num_processes {asked} (and without --cpu: it makes separate runs of one rank)"
            )

    def prepare(self, model: Module, optimizer: Any) -> tuple[Module, Any]:
        """Wrap the one module that trains, and its optimizer."""
        prepared: tuple[Module, Any] = self.accelerator.prepare(model, optimizer)
        return prepared

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move a batch.  float64 draws stay on the CPU: they become timesteps there."""
        return {k: v if v.dtype == torch.float64 else v.to(self.device, non_blocking=True) for k, v in batch.items()}

    def step(
        self,
        model: Module,
        optimizer: Any,
        micro_batches: Sequence[dict[str, Tensor]],
        loss_of: Callable[[dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]],
        *,
        clip_norm: float,
    ) -> StepResult:
        """One optimizer step over all ranks.  `loss_of` gives a micro-batch's mean loss and its parts.

        Gradients are averaged over micro-batches and ranks, and reduced once.  A gradient that is not finite
        reaches no weight: RunError.
        """
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                loss, parts = loss_of(self.to_device(batch))
                self.accelerator.backward(loss / len(micro_batches))
            for name, value in {"loss": loss, **parts}.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / len(micro_batches)
        norm = self.accelerator.clip_grad_norm_(model.parameters(), clip_norm)
        grad_norm = float(norm) if norm is not None else float("nan")
        means = self.mean(torch.stack(list(sums.values())))
        named = dict(zip(sums, means.tolist(), strict=True))
        if not (torch.isfinite(means).all() and math.isfinite(grad_norm)):
            raise RunError(f"loss {named['loss']}, gradient norm {grad_norm}: not finite; no weight was changed")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return StepResult(named.pop("loss"), named, grad_norm)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks."""
        if self.num_ranks == 1:
            return value
        reduced = value.clone()
        dist.all_reduce(reduced)
        return reduced / self.num_ranks

    def main_does(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and give its JSON-able result to every rank; an error there is raised on all."""
        answer: dict[str, Any] = {}
        error: Exception | None = None
        if self.is_main:
            try:
                answer = {"value": work()}
            except Exception as caught:
                error = caught
                answer = {"error": type(caught).__name__, "message": str(caught)}
        answer = self._from_main(answer)
        if error is not None:
            raise error
        if "error" in answer:
            raised = ERRORS.get(answer["error"], RunError)(answer["message"])
            raised.add_note("echo")  # rank 0 says it
            raise raised
        return answer["value"]

    def _from_main(self, value: dict[str, Any]) -> dict[str, Any]:
        """Rank 0's JSON object on every rank (torch's own object collectives would pickle it)."""
        if self.num_ranks == 1:
            return value
        data = self._packed(value)
        length = torch.tensor([len(data)], device=self.device)
        dist.broadcast(length, 0)
        if not self.is_main:
            data = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(data, 0)
        return json.loads(bytes(data.cpu().numpy()))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, on every rank."""
        if self.num_ranks == 1:
            return [value]
        data = self._packed(value)
        lengths = torch.zeros(self.num_ranks, dtype=torch.int64, device=self.device)
        lengths[self.rank] = len(data)
        dist.all_reduce(lengths)
        padded = torch.nn.functional.pad(data, (0, int(lengths.max()) - len(data)))
        found = [torch.empty_like(padded) for _ in range(self.num_ranks)]
        dist.all_gather(found, padded)
        whole = zip(found, lengths.tolist(), strict=True)
        return [json.loads(bytes(one[:length].cpu().numpy())) for one, length in whole]

    def _packed(self, value: Any) -> Tensor:
        return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)

    def wait(self) -> None:
        """Until every rank is here."""
        self.accelerator.wait_for_everyone()


def leave(code: int) -> NoReturn:
    """End this process with this code.

    torch 2.13 on CPU can abort after success while its threads are torn down; with a barrier, the group destroyed,
    the streams flushed and no interpreter shutdown it does not.
    """
    if dist.is_available() and dist.is_initialized():
        if code == 0:
            dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
