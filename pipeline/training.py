"""What every training does alike: resume, take steps, average, write down, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from tqdm import tqdm

from pipeline import checkpoint, program
from pipeline.config import CheckpointConfig, DataConfig, TrackingConfig
from pipeline.data.dataset import Samples, load_batches
from pipeline.data.order import DataState, check_ranks, rank_batches
from pipeline.data.quarantine import BadSample, Count, Quarantine
from pipeline.ema import Ema
from pipeline.engine import Engine, StepResult
from pipeline.errors import RunError, UsageError
from pipeline.optim import load_moments, moments, set_learning_rate
from pipeline.run_folder import write_status
from pipeline.tracking import Tracker

LossOf = Callable[[Module, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Course:
    """How long, in what portions, how fast."""

    steps: int  # optimizer steps of the whole run
    global_batch_images: int
    micro_batch_images: int | None  # per rank; None: the rank's whole share
    learning_rate: Callable[[int], float]  # of each step, 0 the first
    clip_norm: float

    def rank_share(self, num_ranks: int) -> tuple[int, int]:
        """(images per micro-batch, micro-batches per step) of one rank.  Raises UsageError."""
        share = self.global_batch_images // num_ranks
        micro = self.micro_batch_images or share
        if share % micro:
            raise UsageError(
                f"micro_batch_images: {micro} came, but it must divide a rank's share of the batch, "
                f"{self.global_batch_images} images / {num_ranks} ranks = {share}"
            )
        return micro, share // micro


class Training:
    """One model on its way: wrapped for the ranks, its averages, its place in the data, its run folder."""

    def __init__(
        self,
        engine: Engine,
        run: Path,
        *,
        name: str,
        core: ModelMixin,
        module: Module,
        optimizer: Optimizer,
        ema_decays: tuple[float, ...],
        samples: Samples,
        course: Course,
        record: dict[str, Any],
    ) -> None:
        """Take up the newest whole checkpoint in RUN/checkpoints, or begin.

        `core` is the diffusers model whose weights are saved under `name`; `module` is what the ranks wrap: the core
        itself or what holds it.  `record`: JSON that each checkpoint's state carries.  Raises UsageError where a
        checkpoint belongs to other data.
        """
        check_ranks(engine.num_ranks, lanes=samples.lanes, global_batch=course.global_batch_images)
        self.engine, self.run, self.name, self.core = engine, run, name, core
        self.samples, self.course, self.record = samples, course, record
        self.data = DataState(
            position=0,
            seed=samples.seed,
            global_batch=course.global_batch_images,
            lanes=samples.lanes,
            block=samples.block,
            data_fingerprint=samples.fingerprint,
        )
        resumed = self._newest()
        self.start = resumed.step if resumed else 0
        self.replaced = Count(**resumed.state["quarantine"]) if resumed else Count()
        if self.start > course.steps:
            raise UsageError(f"{run}: has made {self.start} steps already, {course.steps} were asked for")
        if resumed:  # weights before the ranks wrap the model, moments after
            self.data.check_continues(resumed.state["data"])
            self.data = DataState(**resumed.state["data"])
            core.load_state_dict(resumed.weights(name))
        core.to(engine.device)  # pyright: ignore[reportArgumentType]
        self.ema = Ema(core, ema_decays)
        self.model, self.optimizer = engine.prepare(module, optimizer)
        if resumed:
            self.ema.load(resumed.ema())
            load_moments(self.optimizer, core, resumed.moments(name), self.start)

    def _newest(self) -> checkpoint.Checkpoint | None:
        """The newest checkpoint that verifies, the same on every rank: rank 0 looks."""

        def look() -> str | None:
            found, wrong = checkpoint.newest(self.run / "checkpoints")
            for reason in wrong:
                program.say(f"warning: passing over a broken checkpoint: {reason}")
            if wrong and found is None:
                raise UsageError(f"{self.run}/checkpoints: no checkpoint is whole; move them away to begin anew")
            return found.path.name if found else None

        name = self.engine.main_does(look)
        return checkpoint.open_verified(self.run / "checkpoints" / name) if name else None

    def steps(
        self, loss_of: LossOf, *, data: DataConfig, saving: CheckpointConfig, tracking: TrackingConfig
    ) -> Iterator[int]:
        """Take the steps that are left; give the number of steps made after each, before it is saved."""
        course, engine = self.course, self.engine
        micro, num_micro = course.rank_share(engine.num_ranks)
        batches = load_batches(
            self.samples,
            rank_batches(
                self.data.position,
                self.data.position + (course.steps - self.start) * course.global_batch_images,
                global_batch=course.global_batch_images,
                micro_batch=micro,
                rank=engine.rank,
                num_ranks=engine.num_ranks,
            ),
            workers=data.workers,
            pin_memory=engine.device.type == "cuda",
        )
        images = course.global_batch_images
        quarantine = Quarantine(
            self.run, data.quarantine, position=self.data.position, count=self.replaced, is_main=engine.is_main
        )
        with (
            closing(
                Tracker(self.run, after_step=self.start, tensorboard=tracking.tensorboard, is_main=engine.is_main)
            ) as tracker,
            tqdm(
                total=course.steps * images,
                initial=self.start * images,
                desc=f"train {self.name}",
                unit=" images",
                dynamic_ncols=True,
                disable=not engine.is_main,
            ) as bar,
        ):
            since, step_since = time.monotonic(), self.start
            for step in range(self.start, course.steps):
                set_learning_rate(self.optimizer, learning_rate := course.learning_rate(step))
                micro_batches, replaced = zip(*(next(batches) for _ in range(num_micro)), strict=True)
                result, num_replaced = self._step(micro_batches, loss_of, sum(map(len, replaced)))
                if num_replaced:
                    self._set_apart(quarantine, [bad for of_batch in replaced for bad in of_batch])
                self.ema.update(self.core, step)
                self.data = replace(self.data, position=self.data.position + images)
                done = step + 1
                bar.update(images)
                shown = {"step": done, "loss": f"{result.loss:.4f}"}
                bar.set_postfix(
                    shown | ({"replaced": self.replaced.total} if self.replaced.total else {}), refresh=False
                )
                if done % tracking.every_steps == 0 or done == course.steps:
                    now = time.monotonic()
                    row = {"step": done, "position": self.data.position, "loss": result.loss, **result.parts}
                    row |= {
                        "learning_rate": learning_rate,
                        "grad_norm": result.grad_norm,
                        "replaced": self.replaced.total,
                    }
                    tracker.write(row | {"images_per_s": (done - step_since) * images / (now - since)})
                    since, step_since = now, done
                yield done
                if done % saving.every_steps == 0 or done == course.steps:
                    self._save(done, saving)

    def _step(
        self, micro_batches: Sequence[dict[str, Tensor]], loss_of: LossOf, num_replaced: int
    ) -> tuple[StepResult, int]:
        """One optimizer step, and the number of samples replaced in it over all ranks; an error tells its place."""
        # Among the loss's parts, which are averaged over micro-batches and ranks: no collective of its own.
        counted = torch.tensor(float(num_replaced), device=self.engine.device)

        def loss_and_count(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            loss, parts = loss_of(self.model, batch)
            return loss, {**parts, "replaced": counted}

        try:
            result = self.engine.step(
                self.model, self.optimizer, micro_batches, loss_and_count, clip_norm=self.course.clip_norm
            )
        except RunError as error:
            first, last = self.data.position, self.data.position + self.course.global_batch_images - 1
            raise RunError(
                f"step {first // self.course.global_batch_images + 1}, positions {first} to {last}: {error}"
            ) from error
        return result, round(result.parts.pop("replaced") * self.engine.num_ranks)

    def _set_apart(self, quarantine: Quarantine, replaced: list[BadSample]) -> None:
        """Write down and count what all ranks replaced in this step.  Raises UsageError beyond a budget."""
        found = [BadSample(**row) for rows in self.engine.gather([b.to_json() for b in replaced]) for row in rows]
        if self.engine.is_main and self.replaced.total == 0:
            bad = min(found, key=lambda bad: bad.position)
            program.say(
                f"warning: {bad.shard}: sample {bad.key!r}: {bad.reason}; it is replaced, as all like it will be "
                f"(see {quarantine.path})"
            )
        quarantine.add(found)
        self.replaced = quarantine.count

    def _save(self, step: int, saving: CheckpointConfig) -> None:
        def write() -> None:
            checkpoint.save(
                self.run / "checkpoints",
                step,
                name=self.name,
                model=self.core,
                moments=moments(self.optimizer, self.core),
                ema=self.ema.state(),
                state={"data": self.data.to_json(), "quarantine": asdict(self.replaced), **self.record},
            )
            checkpoint.prune(
                self.run / "checkpoints", keep_last=saving.keep_last, keep_every_steps=saving.keep_every_steps
            )
            write_status(self.run, "running", step=step)

        self.engine.main_does(write)
