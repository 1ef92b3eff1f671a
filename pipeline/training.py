"""What every training does alike: resume, take steps, average, write down, save, stop.

The loop does not wait for the step that it has just begun.  What a step found (its loss, whether all was finite, what
was replaced, who wants to stop) is summed over the ranks on its way and read one step later, the same on every rank;
meanwhile the weights are guarded on the device.  Before a checkpoint all is read.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.nn import Module

from pipeline import checkpoint, files, program, snapshots
from pipeline.checkpoint import Checkpoint
from pipeline.config import Config, identity
from pipeline.data.dataset import Batch, Samples, load_batches
from pipeline.data.order import DataState, check_ranks, rank_batches
from pipeline.data.quarantine import BadSample, Count
from pipeline.ema import Profile
from pipeline.engine import Engine
from pipeline.errors import PreemptedError, RunError, UsageError
from pipeline.fitting import largest_that_fits
from pipeline.journal import Journal, Taken
from pipeline.learner import Learner, LossOf, Model
from pipeline.optim import UpdateRule
from pipeline.pace import Work
from pipeline.run_folder import write_status
from pipeline.saving import Saver
from pipeline.stopping import REASONS, Stopping
from pipeline.watchdog import Watchdog


@dataclass(frozen=True)
class Course:
    """How long, in what portions, how fast."""

    steps: int  # optimizer steps of the whole run
    global_batch_images: int
    micro_batch_images: int | Literal["auto"] | None  # per rank; None: the rank's whole share; auto: what fits
    learning_rate: Callable[[int], float]  # of each step, 0 the first
    rule: UpdateRule

    def rank_share(self, num_ranks: int) -> int:
        """Images of a step that fall to each rank.  Raises UsageError where micro-batches don't divide them."""
        share, micro = self.global_batch_images // num_ranks, self.micro_batch_images
        if isinstance(micro, int) and share % micro:
            raise UsageError(
                f"micro_batch_images: {micro} came, but it must divide a rank's share of the batch, "
                f"{self.global_batch_images} images / {num_ranks} ranks = {share}"
            )
        return share


@dataclass(frozen=True)
class Adversary:
    """What learns against the models that are trained: it steps after them, on what they have just made."""

    name: str  # of its folder in a checkpoint, and of its figures
    model: Model
    rule: UpdateRule
    learning_rate: float
    loss_of: LossOf  # of a batch that the other loss has seen, and may have left things in
    plays: Callable[[int], bool]  # whether it steps in a step, 0 the first


class Training:
    """A learner on its way: its place in the data, its steps, its run folder."""

    def __init__(
        self,
        engine: Engine,
        run: Path,
        *,
        models: Mapping[str, Model],
        module: Module,
        profiles: Sequence[Profile],
        samples: Samples,
        course: Course,
        config: Config,
        record: dict[str, Any],
        adversary: Adversary | None = None,
        carried: Mapping[str, Tensor] | None = None,
        shown: Sequence[str] = (),
        work: Work | None = None,
    ) -> None:
        """Take up the newest whole checkpoint in RUN/checkpoints, or begin.

        `models`, `module`: see Learner.  `record`: JSON that each checkpoint's state carries and a resumed run must
        find alike.  `carried`: scalars that one step hands to the next, saved and filled in again.  `shown`: parts of
        the loss that the progress bar tells.  `work`: what the rows count in TFLOP/s, see Pace.  Raises UsageError
        where a checkpoint belongs to other data.
        """
        check_ranks(engine.num_ranks, lanes=samples.lanes, global_batch=course.global_batch_images)
        self.engine, self.run, self.samples, self.course = engine, run, samples, course
        self.config, self.record, self.carried = config, record, dict(carried or {})
        self.step, self.num_spikes, self.micro, replaced = 0, 0, 0, Count()
        self.cut_short = False  # whether something beside the steps was told to stop, and is to be gone on with
        self.data = DataState(
            position=0,
            seed=samples.seed,
            global_batch=course.global_batch_images,
            lanes=samples.lanes,
            block=samples.block,
            data_fingerprint=samples.fingerprint,
        )
        found = self._newest()
        if found:
            self.data.check_continues(found.state["data"])
            self._check_record(found)
            self.data = DataState(**found.state["data"])
            self.step, self.num_spikes, self.micro = (
                found.step,
                found.state["num_spikes"],
                found.state["micro_batch_images"],
            )
            replaced = Count(**found.state["quarantine"])
        if self.step > course.steps:
            raise UsageError(f"{run}: has made {self.step} steps already, {course.steps} were asked for")
        if profiles:
            engine.main_does(lambda: self._set_snapshots_back(found))
        self.learner = Learner(engine, models, module, profiles, rule=course.rule, config=config.engine)
        self.learners, self.adversary = [self.learner], adversary
        if adversary is not None:
            its = {adversary.name: adversary.model}
            self.learners.append(
                Learner(
                    engine, its, adversary.model, (), rule=adversary.rule, config=config.engine, state_key="adversary"
                )
            )
        if found:
            self._take_up(found)
        self.saver = Saver(run / "checkpoints", rank=engine.rank, num_ranks=engine.num_ranks)
        self.journal = Journal(
            engine,
            run,
            config,
            name=", ".join(models),
            images_per_step=course.global_batch_images,
            total_steps=course.steps,
            shown=shown,
            work=work,
        )
        self.journal.begin(self.step, self.data.position, replaced)

    def _take_up(self, found: Checkpoint) -> None:
        """All that learns, and what its steps hand on, as a checkpoint has it."""
        for learner in self.learners:
            learner.take_up(found)
        for name, value in self.carried.items():
            value.fill_(found.state["carried"][name])

    def _check_record(self, found: Checkpoint) -> None:
        """Raise UsageError where a checkpoint was made of other latents, weights or words than the run has now."""
        for name, now in self.record.items():
            if found.state.get(name) != now:
                raise UsageError(
                    f"{found.path}: its {name} were {found.state.get(name)}, now they are {now}; restore what the run "
                    "was begun with, or choose another run_dir"
                )

    def steps(self, loss_of: LossOf, *, long_after: Callable[[int], bool] | None = None) -> Iterator[int]:
        """Take the steps that are left; give the number of steps made after each, before it is saved.

        long_after: whether a step is followed by work that is long and can be gone on with.  Where a checkpoint is due
        it is begun before that, so that a kill costs the work alone; and the step of the checkpoint that was taken up
        is given first, for what was cut short after it.
        Raises PreemptedError when it was told to stop, after saving.
        """
        share = self.course.rank_share(self.engine.num_ranks)
        self.micro = self._micro_batch(share, loss_of)
        num_micro, batches = share // self.micro, self._load(self.micro)
        with ExitStack() as entered:
            entered.callback(self.journal.close)
            stopping = entered.enter_context(Stopping(self.config.train.limit_s))
            watchdog = entered.enter_context(self._watchdog())
            self._stopping, self._watched = stopping, watchdog
            unread: Taken | None = None
            if long_after is not None and self.step:
                yield from self._given()
                if self.journal.stop_code:
                    raise PreemptedError(f"{REASONS[self.journal.stop_code - 1]} after step {self.step}")
            gc.collect()
            gc.freeze()  # what is there stays: no step is held up by a search among a million old objects
            entered.callback(gc.unfreeze)
            while self.step < self.course.steps:
                with self.journal.pace.waiting():
                    loaded = [next(batches) for _ in range(num_micro)]
                taken = self._take(loaded, loss_of, stopping.code())
                if unread is not None:
                    self._read(unread)
                unread = taken
                watchdog.fed()
                due = self.step % self.config.checkpoint.every_steps == 0 or self.step == self.course.steps
                saved_first = due and long_after is not None and long_after(self.step)
                if not saved_first:
                    yield from self._given()
                if due or self.journal.stop_code or self.journal.spike:
                    self._read(unread)
                    unread = None
                    if self.journal.spike:
                        self._set_back()
                        continue
                    self._save()
                    watchdog.fed()
                if saved_first:
                    yield from self._given()
                if self.journal.stop_code and (self.step < self.course.steps or self.cut_short):
                    self.finish_saving()
                    raise PreemptedError(f"{REASONS[self.journal.stop_code - 1]} after step {self.step}")
            self.finish_saving()

    def _given(self) -> Iterator[int]:
        """The number of steps made, to whoever has work after this one."""
        with self.journal.pace.stopped():
            yield self.step
        self._watched.fed()

    def unwatched(self) -> AbstractContextManager[None]:
        """For a part of long work that can't be divided, on every rank: see Watchdog.suspended."""
        return self._watched.suspended()

    def go_on(self) -> bool:
        """For long work between two steps, to ask now and then: False, and it has to end.  A collective."""
        self._watched.fed()
        asked = [code for code in self.engine.gather(self._stopping.code()) if code]
        self.journal.stop_code = self.journal.stop_code or next(iter(asked), 0)
        self.cut_short = bool(self.journal.stop_code)
        return not self.cut_short

    def _micro_batch(self, share: int, loss_of: LossOf) -> int:
        """Images of this rank in one forward pass."""
        asked = self.course.micro_batch_images
        if asked != "auto":
            return asked or share
        if self.micro and share % self.micro == 0:  # as it was found before: the sums round as they did
            return self.micro
        wrapped, scaler = self.learner.wrapped, self.learner.wrapped.scaler()

        def attempt(size: int) -> None:
            positions = rank_batches(
                self.data.position,
                None,
                global_batch=self.course.global_batch_images,
                micro_batch=size,
                rank=self.engine.rank,
                num_ranks=self.engine.num_ranks,
            )
            batch, _ = next(load_batches(self.samples, [next(positions)], workers=0, pin_memory=False))
            with wrapped.micro_batch(last=True):
                loss, _ = loss_of(wrapped.model, self.engine.transfer.to_device(batch))
                wrapped.backward(loss * float("inf"))  # so that the step changes nothing
            wrapped.step(0.0)

        found = largest_that_fits(share, attempt, lambda fits: all(self.engine.gather(fits)))
        wrapped.load_scaler(scaler)
        if self.engine.is_main:
            program.say(f"train.micro_batch_images: {found} of {share} images fit in one forward pass")
        return found

    def _load(self, micro: int) -> Iterator[tuple[Batch, list[BadSample]]]:
        """This rank's micro-batches of the steps that are left; without end where the run may be set back."""
        images, position = self.course.global_batch_images, self.data.position
        stop = None if self.config.train.spike_factor else position + (self.course.steps - self.step) * images
        return load_batches(
            self.samples,
            rank_batches(
                position,
                stop,
                global_batch=images,
                micro_batch=micro,
                rank=self.engine.rank,
                num_ranks=self.engine.num_ranks,
            ),
            workers=self.config.data.workers,
            pin_memory=self.engine.device.type == "cuda",
        )

    def _watchdog(self) -> Watchdog:
        def tell(reason: str) -> None:
            if self.engine.is_main:
                write_status(self.run, "failed", reason=reason)

        return Watchdog(self.run, self.engine.rank, self.config.train.hang_timeout_s, tell)

    def _take(self, loaded: Sequence[tuple[Batch, list[BadSample]]], loss_of: LossOf, stop_code: int) -> Taken:
        """One optimizer step; nothing of it is waited for."""
        num_micro, learning_rate = len(loaded), self.course.learning_rate(self.step)
        batches: Iterable[Batch] = (self.engine.transfer.to_device(batch) for batch, _ in loaded)
        if self.adversary is not None:
            batches = list(batches)  # for two
        found = self.learner.step(batches, num_micro, loss_of, learning_rate=learning_rate, steps_before=self.step)
        loss = found["loss"]
        if self.adversary is not None and self.adversary.plays(self.step):
            its = self.learners[1].step(
                batches,
                num_micro,
                self.adversary.loss_of,
                learning_rate=self.adversary.learning_rate,
                steps_before=self.step,
            )
            found["not_finite"] = found["not_finite"] | its.pop("not_finite")
            found |= {f"{self.adversary.name}/{name}": value for name, value in its.items()}
        replaced = [bad for _, of_batch in loaded for bad in of_batch]
        summed = self.engine.sum_later(
            {
                **found,
                "replaced": len(replaced),
                "save_failed": self.saver.failed(),
                **{reason: stop_code == code for code, reason in enumerate(REASONS, start=1)},
            }
        )
        position = self.data.position
        self.step += 1
        self.data = replace(self.data, position=position + self.course.global_batch_images)
        return Taken(self.step, position, learning_rate, replaced, loss, summed)

    def _read(self, taken: Taken) -> None:
        """What a step found.  Before an error ends the run, the checkpoint under way is finished."""
        try:
            self.journal.read(taken)
        except (RunError, UsageError):
            self.finish_saving()
            raise
        if self.journal.save_failed:
            self.finish_saving()

    def _set_back(self) -> None:
        """After a spike of the loss: models, averages and moments as the newest checkpoint has them; the data goes on.

        Raises RunError where there is no checkpoint, or this happened too often.
        """
        spike, most = self.journal.spike, self.config.train.max_spikes
        assert spike is not None
        self.finish_saving()
        self.num_spikes += 1
        found = self._newest()
        if found is None or self.num_spikes > most:
            why = "there is no checkpoint to go back to" if found is None else f"train.max_spikes is {most}"
            raise self.engine.common(RunError(f"{spike.told}: spike number {self.num_spikes}, and {why}"))
        self._take_up(found)
        self.step = found.step
        self.journal.begin(self.step, self.data.position, self.journal.quarantine.count)
        row = {"step": spike.step, "back_to_step": self.step, "position": self.data.position, "why": spike.told}

        def note() -> None:
            self._set_snapshots_back(found)
            with (self.run / "spikes.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            program.say(f"warning: {spike.told}; back to {found.path.name}, with the data that follows")

        self.engine.main_does(note)

    def _newest(self) -> Checkpoint | None:
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

    def _set_snapshots_back(self, found: Checkpoint | None) -> None:
        """Rank 0: keep the snapshots of averages up to what is taken up."""
        every = self.config.ema.snapshot_every_steps
        for path in snapshots.continue_from(found.path if found else None, self.run, every):
            program.say(f"warning: removed {path}: a snapshot later than the checkpoint that is taken up")

    def _save(self) -> None:
        """Begin to write a checkpoint of this step, when the one before it is written."""
        self.finish_saving()
        state = {
            "config_fingerprint": files.fingerprint(identity(self.config, tuple(Config.model_fields))),
            "data": self.data.to_json(),
            "quarantine": asdict(self.journal.quarantine.count),
            "num_spikes": self.num_spikes,
            "micro_batch_images": self.micro,
            "carried": {name: float(value) for name, value in self.carried.items()},
            **{learner.state_key: learner.optimizer_state() for learner in self.learners},
            **self.record,
        }
        documents = {"state.json": checkpoint.state_document(self.step, state)}
        self.saver.begin(
            self.step,
            {stem: shapes for learner in self.learners for stem, shapes in learner.shapes_by_stem().items()},
            chain.from_iterable(learner.tensors() for learner in self.learners),
            documents | {path: value for learner in self.learners for path, value in learner.configs().items()},
            on_main=self.engine.main_does,
            done=partial(self._saved, self.step),
        )

    def _saved(self, step: int, folder: Path) -> None:
        """Rank 0, beside the training: a checkpoint has its name."""
        if self.learner.ema.shadows and snapshots.is_due(step, self.config.ema.snapshot_every_steps):
            snapshots.keep_snapshot(folder, self.run)
        saving = self.config.checkpoint
        checkpoint.prune(folder.parent, keep_last=saving.keep_last, keep_every_steps=saving.keep_every_steps)
        write_status(self.run, "running", step=step)

    def finish_saving(self) -> None:
        """Wait for the save under way.  Raises RunError on every rank where it failed on one."""
        said: str | None = None
        try:
            self.saver.finish()
        except RunError as error:
            said = str(error)
        failures = [one for one in self.engine.gather(said) if one is not None]
        if failures:
            raise self.engine.common(RunError(failures[0]))
