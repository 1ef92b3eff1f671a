"""What a training writes down of its steps, and what ends it there."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median

from torch import Tensor
from tqdm import tqdm

from pipeline import program
from pipeline.config import Config
from pipeline.data.quarantine import BadSample, Count, Quarantine
from pipeline.engine import Engine, Summed
from pipeline.errors import RunError
from pipeline.pace import Pace, Work
from pipeline.stopping import REASONS
from pipeline.tracking import Tracker, read_rows

NO_PARTS = ("loss", "not_finite", "replaced", "save_failed", *REASONS)  # of the loss


@dataclass(frozen=True)
class Taken:
    """A step that was taken, and what is still to be read of it."""

    step: int  # optimizer steps made with it
    position: int  # where its samples begin
    learning_rate: float
    replaced: list[BadSample]  # by this rank
    loss: Tensor  # this rank's part of the mean
    summed: Summed


@dataclass(frozen=True)
class Spike:
    """A loss far above those before it."""

    step: int
    told: str


class Journal:
    """Rows by step, the progress bar, the quarantine, and the verdicts that are the same on every rank."""

    def __init__(
        self,
        engine: Engine,
        run: Path,
        config: Config,
        *,
        name: str,
        images_per_step: int,
        total_steps: int,
        shown: Sequence[str] = (),
        work: Work | None = None,
    ) -> None:
        """`name`: of what trains, for the bar; `shown`: parts of the loss that it tells; `work`: see Pace."""
        self.engine, self.run, self.config = engine, run, config
        self.images, self.total_steps = images_per_step, total_steps
        self.losses: deque[float] = deque(maxlen=config.train.spike_window_steps)
        self.spike: Spike | None = None
        self.shown = tuple(shown)
        self.pace = Pace(engine.device, images_per_step=images_per_step, num_ranks=engine.num_ranks, work=work)
        self.newest: dict[str, float] = {}  # figures of the newest step that was read
        self.save_failed = False
        self.stop_code = 0  # place in REASONS, from 1, of why any rank was asked to stop
        self.bar = tqdm(
            total=total_steps * images_per_step,
            desc=f"train {name}",
            unit=" images",
            dynamic_ncols=True,
            mininterval=0.5,  # seconds: drawing it takes as long as an average's update of a small network
            disable=not engine.is_main,
        )
        self.tracker: Tracker | None = None

    def begin(self, step: int, position: int, replaced: Count) -> None:
        """Go on after `step` and at `position`: rows of later ones belong to work that was lost."""
        self._close_rows()
        self._begun = step
        is_main = self.engine.is_main

        def open_rows() -> None:
            self.tracker = Tracker(self.run, self.config.tracking, after_step=step, is_main=is_main)

        self.engine.main_does(open_rows)  # so that what it refuses is refused on all ranks
        if not is_main:
            open_rows()
        self.quarantine = Quarantine(
            self.run, self.config.data.quarantine, position=position, count=replaced, is_main=is_main
        )
        self.bar.n = self.bar.initial = step * self.images
        self.spike = None
        self.losses.clear()
        self.pace.begin()

    def close(self) -> None:
        """Flush what was written."""
        self._close_rows()
        self.bar.close()

    def _close_rows(self) -> None:
        if self.tracker is not None:
            with suppress(OSError):  # on a disk that is full, which has been told
                self.tracker.close()
            self.tracker = None

    def read(self, taken: Taken) -> None:
        """Wait for what a step found, and write it down.

        Raises, on every rank, RunError for what is not finite and UsageError beyond a budget of bad samples.
        """
        found = self.newest = taken.summed.read()
        self.save_failed = self.save_failed or found["save_failed"] > 0
        self.stop_code = self.stop_code or next((c for c, r in enumerate(REASONS, start=1) if found[r]), 0)
        if found["not_finite"] or not isfinite(found["loss"]):  # fp16 tries a smaller scale, which mends no loss
            ranks = [rank for rank, fine in enumerate(self.engine.gather(bool(taken.loss.isfinite()))) if not fine]
            where = f" (rank {ranks[0]})" if ranks else ""
            norms = ", ".join(
                f"{name.removesuffix('grad_norm').replace('/', ' ')}gradient norm {value}"
                for name, value in found.items()
                if _is_norm(name)
            )
            raise self.engine.common(
                RunError(
                    f"step {taken.step}, positions {taken.position} to {taken.position + self.images - 1}: loss "
                    f"{found['loss']}{where}, {norms}: not finite; it changed no weight"
                )
            )
        if found["replaced"]:
            self._set_apart(taken.replaced)
        # Where something is added that may be below 0, what it is added to: of an autoencoder its reconstruction.
        steady = next((found[name] for name in ("reconstruction", "denoising") if name in found), found["loss"])
        self._look_for_a_spike(taken.step, steady)
        self.bar.update(self.images)
        self.pace.step()
        shown = {"step": taken.step, "loss": f"{found['loss']:.4f}", "data wait": f"{self.pace.wait_share:.1%}"}
        shown |= {name.rpartition("/")[2]: f"{found[name]:.3g}" for name in self.shown if name in found}
        if self.quarantine.count.total:
            shown["replaced"] = self.quarantine.count.total
        self.bar.set_postfix(shown, refresh=False)
        if taken.step % self.config.tracking.every_steps == 0 or taken.step == self.total_steps:
            self._write(taken, found)

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        """Add figures of a step that were found beside it.

        Those that its rows hold already are passed over: of the step that was taken up, they were noted before a kill.
        """
        if step == self._begun and self.engine.is_main:
            there = {name for row in read_rows(self.run / "metrics.jsonl") if row["step"] == step for name in row}
            figures = {name: value for name, value in figures.items() if name not in there}
        if figures and self.tracker is not None:
            self.tracker.write({"step": step, **figures})

    def _write(self, taken: Taken, found: dict[str, float]) -> None:
        row = {"step": taken.step, "position": taken.position + self.images, "loss": found["loss"]}
        row |= {name: value for name, value in found.items() if name not in NO_PARTS and not _is_norm(name)}
        row |= {"learning_rate": taken.learning_rate}
        # Not where fp16 overflowed: JSON has no infinity.
        row |= {name: value for name, value in found.items() if _is_norm(name) and isfinite(value)}
        row |= {"replaced": self.quarantine.count.total}
        assert self.tracker is not None  # `begin` came before
        self.tracker.write(row | self.pace.figures())

    def _look_for_a_spike(self, step: int, loss: float) -> None:
        factor = self.config.train.spike_factor
        if factor is not None and self.spike is None and len(self.losses) == self.losses.maxlen:
            middle = median(self.losses)
            if loss > factor * middle:
                self.spike = Spike(step, f"step {step}: loss {loss:.4g} after a median of {middle:.4g}")
        self.losses.append(loss)

    def _set_apart(self, replaced: list[BadSample]) -> None:
        """Write down and count what all ranks replaced in a step."""
        rows = self.engine.gather([bad.to_json() for bad in replaced])
        found = [BadSample(**row) for of_rank in rows for row in of_rank]
        if self.engine.is_main and self.quarantine.count.total == 0:
            bad = min(found, key=lambda bad: bad.position)
            program.say(
                f"warning: {bad.shard}: sample {bad.key!r}: {bad.reason}; it is replaced, as all like it will be "
                f"(see {self.quarantine.path})"
            )
        self.quarantine.add(found)


def _is_norm(name: str) -> bool:
    return name.rpartition("/")[2] == "grad_norm"
