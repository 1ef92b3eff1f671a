"""Drawn images that are kept in portions, so that whoever was stopped while drawing goes on where it was.

    RUN/evaluation/step-000001000-guidance-2-3f9c1b2a4d5e/{said.json, 0000000-0000100.npy, ...}

The folder's last word is of all that the images depend on: what is there is right.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline import files, sampler
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.engine import Engine
from pipeline.errors import RunError, UsageError
from pipeline.portions import GoOn, in_portions
from pipeline.sampler import Asked

SAID = "said.json"


@dataclass(frozen=True)
class KeptImages:
    """Images of one model at one guidance scale: image i shows asked[i], from the noise of (seed, i)."""

    folder: Path
    model: str  # SHA-256 of all that draws
    asked: tuple[Asked, ...]
    seed: int
    guidance_scale: float
    num_inference_steps: int
    batch_images: int  # of a portion, which is one call of the sampler
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # shares of the steps
    guide: str | None = None  # SHA-256 of the network that it is guided away from; None: its own null condition

    @classmethod
    def of(cls, run: Path, checkpoint: str, **what: Any) -> KeptImages:
        """Those of a run's checkpoint, by its name.  `what`: all but the folder."""
        named = cls(run, **what)
        key = files.fingerprint(named.said())[:12]
        folder = run / "evaluation" / f"{checkpoint}-guidance-{named.guidance_scale:g}-{key}"
        return cls(folder, **what)

    @classmethod
    def open(cls, folder: Path) -> KeptImages:
        """Those of a folder, all drawn.  Raises UsageError where they are not."""
        try:
            said = files.read_json(folder / SAID)
            asked = tuple(Asked(*each) for each in said.pop("asked"))
            said.pop("in_training", None)
            said["guidance_interval"] = tuple(said.get("guidance_interval", (0.0, 1.0)))
            kept = cls(folder, asked=asked, **said)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{folder}: no kept images of an evaluation ({type(error).__name__}: {error})") from None
        if missing := kept.missing():
            raise UsageError(f"{folder}: {len(missing)} of its portions are not drawn yet; end its evaluation first")
        return kept

    def said(self) -> dict[str, Any]:
        """All that the images depend on."""
        return {
            "model": self.model,
            "seed": self.seed,
            "guidance_scale": self.guidance_scale,
            "num_inference_steps": self.num_inference_steps,
            "batch_images": self.batch_images,
            "asked": [list(each) for each in self.asked],
            **({"guidance_interval": list(self.guidance_interval)} if self.guidance_interval != (0.0, 1.0) else {}),
            **({"guide": self.guide} if self.guide is not None else {}),
        }

    @property
    def portions(self) -> list[range]:
        """Indices of the images of each file."""
        ends = range(0, len(self.asked), self.batch_images)
        return [range(start, min(start + self.batch_images, len(self.asked))) for start in ends]

    def path(self, portion: range) -> Path:
        """The file of a portion: uint8 [n,H,W,3]."""
        return self.folder / f"{portion.start:07d}-{portion.stop:07d}.npy"

    def missing(self) -> list[range]:
        """Portions that are still to be drawn."""
        return [portion for portion in self.portions if not self.path(portion).exists()]

    def read(self, portion: range) -> NDArray[np.uint8]:
        """The images of a portion.  Raises RunError for a file that is torn."""
        path = self.path(portion)
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise RunError(
                f"{path}: drawn images were wanted ({error}); remove it, and they are drawn again"
            ) from error

    def _may_go(self) -> bool:
        """Whether a training alone has asked for them so far."""
        try:
            return bool(files.read_json(self.folder / SAID).get("in_training", False))
        except (OSError, ValueError):  # nobody has
            return True

    def draw(
        self,
        engine: Engine,
        pipe: ClassConditionalPipeline,
        go_on: GoOn,
        *,
        in_training: bool,
        guide: UNet2DConditionModel | None = None,
    ) -> bool:
        """Draw what is missing, each rank its share; whether all is there: not where it was told to stop.

        in_training: they may be removed when a later evaluation is through (`forget_older`), unless somebody else has
        asked for them, before or after.  `guide`: the network itself, of that hash.
        Raises RunError on all ranks for an image that is not finite.
        """

        def begin() -> list[list[int]]:
            may_go = in_training and self._may_go()
            files.write_json(self.folder / SAID, self.said() | {"in_training": may_go})
            return [[portion.start, portion.stop] for portion in self.missing()]

        missing = [range(*ends) for ends in engine.main_does(begin)]

        def one(portion: range) -> None:
            try:
                pixels = sampler.draw(
                    pipe,
                    self.asked[portion.start : portion.stop],
                    portion,
                    seed=self.seed,
                    guidance_scale=self.guidance_scale,
                    num_inference_steps=self.num_inference_steps,
                    batch_images=self.batch_images,
                    guidance_interval=self.guidance_interval,
                    guide=guide,
                )
            except RunError as error:
                raise RunError(f"{self.folder.name}: images {portion.start} to {portion.stop - 1}: {error}") from error
            with files.whole(self.path(portion)) as aside, aside.open("wb") as file:
                np.save(file, pixels, allow_pickle=False)

        bar = tqdm(
            total=len(self.portions),
            initial=len(self.portions) - len(missing),
            desc=f"sample at guidance {self.guidance_scale:g}",
            unit=f" × {self.batch_images} images",
            dynamic_ncols=True,
            leave=not in_training,
            disable=not engine.is_main,
        )
        with bar:
            return in_portions(engine, missing, one, go_on, bar) is not None


def forget_older(run: Path, step: int) -> None:
    """Remove the images of evaluations in the training before `step`: their scores are written down."""
    for folder in (run / "evaluation").glob("step-*-guidance-*"):
        number = folder.name.split("-")[1]
        if number.isdigit() and int(number) < step:
            try:
                in_training = files.read_json(folder / SAID).get("in_training", False)
            except (OSError, ValueError):
                continue
            if in_training:
                shutil.rmtree(folder, ignore_errors=True)


def common_asked(first: KeptImages, second: KeptImages) -> Sequence[Asked]:
    """What both were asked to show.  Raises UsageError where image i of one is no twin of image i of the other."""
    where = f"{first.folder} and {second.folder}"
    again = "evaluate both with the same seed, evaluation.num_images and data"
    if first.seed != second.seed:
        raise UsageError(f"{where}: images of other noise came (seeds {first.seed} and {second.seed}); {again}")
    if first.asked != second.asked:
        counts = len(first.asked), len(second.asked)
        told = "others at the same place" if counts[0] == counts[1] else f"{counts[0]} and {counts[1]} images"
        raise UsageError(f"{where}: images of other wishes came ({told}); {again}")
    return first.asked
