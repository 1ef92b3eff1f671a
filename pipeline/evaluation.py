"""An evaluation: a model → its images → their features → scores, beside those of real images; losses of held-out ones.

What evaluations share (networks, real features, held-out images) is made ready once; then one model after another is
scored: averages while they learn, a checkpoint, an export.  Which images are drawn and counted, their noise and their
times are functions of (seed, index), so that the numbers of two models differ by the models alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import files, program, sampler
from pipeline.bounds import Costs, Encoded, counted
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.config import Config
from pipeline.data.dataset import Shown, evenly, read_told, spaced
from pipeline.data.index import ShardSet
from pipeline.denoiser import objective_of
from pipeline.diffusion.likelihood import average
from pipeline.engine import Engine
from pipeline.errors import UsageError, blame
from pipeline.kept_images import KeptImages
from pipeline.metrics.scores import LEAST_IMAGES, Scores
from pipeline.portions import GoOn, in_portions
from pipeline.real_features import RealSet
from pipeline.sampler import Asked
from pipeline.score_rows import curves_of, record, told_apart
from pipeline.tracking import Row, read_evaluations
from pipeline.yardstick import Yardstick, open_yardstick
from vae.likelihood import autoencoder_nll
from vae.model import state_sha256, weights_sha256

Note = Callable[[int, dict[str, float]], None]  # step, figures
Unwatched = Callable[[], AbstractContextManager[None]]  # on every rank: the watchdog looks away meanwhile
Of = Callable[[Encoded, Sequence[Asked]], Tensor]  # held-out images, what they show → a number or more of each


@dataclass(frozen=True)
class Model:
    """Which weights are scored."""

    step: int  # optimizer steps
    checkpoint: str | None  # where they are saved; None: nowhere
    ema: str

    @classmethod
    def of_checkpoint(cls, checkpoint: str, ema: str) -> Model:
        """By the checkpoint's name, which ends with its step."""
        found = re.search(r"step-(\d+)$", checkpoint)
        return cls(int(found[1]) if found else 0, checkpoint, ema)


@dataclass(frozen=True)
class HeldOut:
    """Some of the held-out images, by their number in the set."""

    total: int  # of the set
    images: Mapping[int, NDArray[np.uint8]]  # [H,W,3]
    asked: Mapping[int, Asked]  # what they show


class Evaluation:
    """All that the evaluations of a run share."""

    def __init__(self, engine: Engine, config: Config) -> None:
        """Every rank calls it.

        Raises UsageError, on all ranks: no held-out images, too few images for a score, a network that is missing.
        """
        self.engine, self.config, self.settings = engine, config, config.evaluation
        data = config.data
        if data.validation_images is None:
            raise UsageError("data.validation_images: evaluations compare with held-out images; name their folder")
        self.train = RealSet("data.train_images", data.train_images, config)
        self.held_out = RealSet("data.validation_images", (data.validation_images,), config)
        self.asked = tuple(asked_of(config))
        self.yardsticks: dict[str, Yardstick] = {}  # on rank 0 alone, as their floors
        self.floors: Scores = {}
        self.titles: tuple[str, ...] = tuple(engine.main_does(self._open))  # of the networks, on every rank

    # What is made ready ---------------------------------------------------------------------------

    def _open(self) -> list[str]:
        """Rank 0: the networks, what they say of real images, and the scores of the held-out ones; their titles."""
        if self.settings.features and self.settings.num_images < LEAST_IMAGES:
            raise UsageError(
                f"evaluation.num_images: {self.settings.num_images} came; precision, recall, density and coverage want "
                f"{LEAST_IMAGES} images or more"
            )
        for settings in self.settings.features:
            with blame(f"evaluation.features: {settings.title}"):
                found = open_yardstick(settings, self.config, self.train, self.held_out, self.engine.device)
                if found is not None:
                    self.yardsticks[settings.title] = found
                    self.floors |= found.floor()
        return list(self.yardsticks)

    def require_network(self) -> None:
        """Raise UsageError, on all ranks, where nothing is there to score with."""
        if not self.titles:
            raise UsageError("evaluation.features: no network is there to score with; name one")

    @cached_property
    def own(self) -> HeldOut:
        """The held-out images whose losses and bits are counted.

        Raises UsageError where they don't say what they show.
        """
        settings, shown = self.settings, self.held_out.shown
        total = len(shown.pixels)
        asked = own_conditions(self.config, shown)
        chosen = {*spaced(total, settings.loss_images), *counted(total, settings.likelihood.num_images)}
        return HeldOut(total, {i: shown.pixels[i].copy() for i in chosen}, {i: asked[i] for i in chosen})

    def make_light(self) -> None:
        """For a training: read what is still wanted of the pixels, and free all others."""
        if self.settings.loss_images or self.settings.bits:
            _ = self.own
        self.train.forget()
        self.held_out.forget()

    # A model --------------------------------------------------------------------------------------

    def kept(self, pipe: ClassConditionalPipeline, name: str) -> list[KeptImages]:
        """Where the images of a pipeline lie, for each guidance scale.  `name`: of the checkpoint.  A collective."""
        model: str = self.engine.main_does(lambda: model_sha256(pipe))
        return [
            KeptImages.of(
                Path(self.config.run_dir),
                name,
                model=model,
                asked=self.asked,
                seed=self.config.seed,
                guidance_scale=scale,
                num_inference_steps=self.settings.num_inference_steps,
                batch_images=self.settings.batch_images,
            )
            for scale in self.settings.guidance_scales
        ]

    def score(
        self,
        pipe: ClassConditionalPipeline,
        model: Model,
        go_on: GoOn,
        unwatched: Unwatched = nullcontext,
        *,
        in_training: bool,
    ) -> list[Row] | None:
        """A row for each guidance scale, on every rank; None where it was told to stop.  Every rank calls it.

        It can be told so after each portion of images and each network's scores of a scale.
        Raises RunError, on all ranks, for an image that is not finite.
        """
        kept = self.kept(pipe, model.checkpoint or f"step-{model.step:09d}")
        for each in kept:
            if not (each.draw(self.engine, pipe, go_on, in_training=in_training) and go_on()):
                return None
        shared = self._held_out_scores(pipe, go_on)
        if shared is None:
            return None
        scores: list[Scores] = []
        for each in kept:
            of_images = self.image_scores(each, go_on, unwatched)
            if of_images is None:
                return None
            scores.append(of_images | self.floors | shared)
        every = list(zip(kept, scores, strict=True))
        return self.engine.main_does(lambda: [self._row(each, model, of_model) for each, of_model in every])

    def is_due(self, step: int) -> bool:
        """Whether a training is evaluated after a step: at the asked distances, and at its end."""
        every = self.settings.scores_every_steps
        return every is not None and (step % every == 0 or step == self.config.train.steps)

    def in_training(
        self,
        pipe: ClassConditionalPipeline,
        step: int,
        ema: str,
        go_on: GoOn,
        *,
        unwatched: Unwatched,
        note: Note,
    ) -> None:
        """Score the average as it is after a step, and write it down; `note`: see Journal.  Every rank calls it.

        Where it is told to stop, what was drawn is kept for the next try.
        """
        every, run = self.config.checkpoint.every_steps, Path(self.config.run_dir)
        is_saved = step % every == 0 or step == self.config.train.steps
        model = Model(step, f"step-{step:09d}" if is_saved else None, ema)
        rows = self.score(pipe, model, go_on, unwatched, in_training=True)
        if rows is not None:
            note(step, {name: value for row in rows for name, value in curves_of(row).items()})
            self.engine.main_does(lambda: record(run, rows))

    def is_recorded(self, step: int, ema: str) -> bool:
        """Whether RUN/evaluations.jsonl has the rows of a step already.  A collective."""

        def look() -> bool:
            wanted = [step, ema, self.settings.num_images, self.settings.num_inference_steps]
            wanted += [*self._fingerprints().values(), sorted(self.references().values())]
            keys = ("step", "ema", "num_images", "num_inference_steps", *self._fingerprints())
            there: set[float] = set()
            for row in read_evaluations(Path(self.config.run_dir)):
                of_row = [row.get(key) for key in keys]
                if [*of_row, sorted(row["references"].values())] == wanted:
                    there.add(row["guidance_scale"])
            return there >= set(self.settings.guidance_scales)

        return self.engine.main_does(look)

    def image_scores(self, kept: KeptImages, go_on: GoOn, unwatched: Unwatched = nullcontext) -> Scores | None:
        """The scores of drawn images, by NETWORK/NAME; `accuracy` and `clip_score` without the network's.

        A collective, as each network is; None where it was told to stop between two of them.
        """
        scores: Scores = {}
        for title in self.titles:
            if not go_on():
                return None
            with unwatched():
                scores |= self.engine.main_does(lambda title=title: self._network_scores(kept, title))
        return scores

    def _network_scores(self, kept: KeptImages, title: str) -> Scores:
        """Rank 0: those in the features of one network."""
        yardstick = self.yardsticks[title]
        with blame(f"evaluation.features: {title}: {kept.folder.name}"):
            seen = [yardstick.network.see(kept.read(portion)) for portion in kept.portions]
            features = np.concatenate([each.features for each in seen])
            named = [each.probabilities for each in seen if each.probabilities is not None]
            probabilities = np.concatenate(named) if named else None
            captions = yardstick.read([asked.prompt for asked in kept.asked])
            return yardstick.scores(features, probabilities, labels=labels_of(kept.asked), captions=captions)

    def _row(self, kept: KeptImages, model: Model, scores: Scores) -> Row:
        """Rank 0: one row of RUN/evaluations.jsonl."""
        row: Row = {
            "step": model.step,
            "checkpoint": model.checkpoint,
            "ema": model.ema,
            "guidance_scale": kept.guidance_scale,
            "num_inference_steps": kept.num_inference_steps,
            "num_images": len(kept.asked),
            "references": self.references(),
            **self._fingerprints(),
            "kept_images": kept.folder.name,
            "scores": scores,
        }
        return told_apart(read_evaluations(Path(self.config.run_dir)), row, self.settings)

    def references(self) -> dict[str, str]:
        """Fingerprint of what each network's scores compare with."""
        return {title: each.train.fingerprint for title, each in self.yardsticks.items()}

    def _fingerprints(self) -> dict[str, str]:
        """Of the wishes; of the held-out set; of all that its losses and bits depend on, beside the model."""
        settings, likelihood, held_out = self.settings, self.settings.likelihood, self.held_out.description
        counted_as = [settings.loss_images, settings.loss_bands, likelihood.num_images, likelihood.num_timesteps]
        of = {"asked": self.asked, "validation_images": held_out, "held_out": [held_out, counted_as]}
        return {name: files.fingerprint(value)[:16] for name, value in of.items()}

    def _held_out_scores(self, pipe: ClassConditionalPipeline, go_on: GoOn) -> Scores | None:
        """Losses in bands and, where they are asked for, bits; None where it was told to stop."""
        config, settings, size = self.config, self.settings, self.settings.batch_images
        costs = Costs(pipe, config.diffusion, config.seed, size)
        scores: Scores = {}

        def over_ranks(chosen: Sequence[int], of: Of) -> NDArray[np.float64] | None:
            portions = [list(chosen[i : i + size]) for i in range(0, len(chosen), size)]

            def one(portion: list[int]) -> Any:
                images = np.stack([self.own.images[i] for i in portion])
                return of(costs.encode(images, portion), [self.own.asked[i] for i in portion]).tolist()

            found = in_portions(self.engine, portions, one, go_on, None)
            return None if found is None else np.array([value for each in found for value in each])

        if not costs.says_variance and self.engine.is_main:
            program.say(
                "the validation loss, the bound and its bits are left out: they are of the learned variance "
                "(diffusion.variance_type), which this export's U-Net lacks; --checkpoint counts them"
            )
        if settings.loss_images and costs.says_variance:
            objective = objective_of(config.diffusion, self.engine.device)
            losses = over_ranks(
                spaced(self.own.total, settings.loss_images),
                lambda of, asked: costs.losses(of, asked, objective, settings.loss_bands),
            )
            if losses is None:
                return None
            scores |= {f"validation_loss/band-{band}": float(loss) for band, loss in enumerate(losses.mean(axis=0))}
            scores |= {"validation_loss/mean": float(losses.mean()), "validation_loss/num_images": len(losses)}
        if settings.bits and settings.likelihood.num_images and costs.has_bound:

            def bits(of: Encoded, asked: Sequence[Asked]) -> Tensor:
                bound = costs.bound(of, asked, None, settings.likelihood.num_timesteps)
                return autoencoder_nll(bound.total, costs.latent_scale) / math.log(2)

            found = over_ranks(counted(self.own.total, settings.likelihood.num_images), bits)
            if found is None:
                return None
            mean, error = average(torch.from_numpy(found))
            scores |= {"bits_per_dim": mean, "bits_per_dim_standard_error": error}
        return scores


# What is asked, and of what ------------------------------------------------------------------------


def asked_of(config: Config) -> list[Asked]:
    """What each image is asked to show: the classes in turn, or what held-out samples say, evenly spaced over the set.

    So every beginning of the classes is balanced.
    """
    condition, data, count = config.conditioning, config.data, config.evaluation.num_images
    if condition.text is None:
        return [Asked(i % condition.num_classes) for i in range(count)]
    with blame("data.validation_images"):
        shards = ShardSet(str(data.validation_images), open_shards=1, remote=data.remote)
        found = [Asked(*both) for both in read_told(shards, evenly(shards, count)) if both[1] is not None]
        if not found or (condition.has_class and any(asked.label is None for asked in found)):
            raise UsageError("it has no captions (.txt) or labels (.cls), which conditioning.kind wants")
    return [found[i % len(found)] for i in range(count)]


def own_conditions(config: Config, shown: Shown) -> list[Asked]:
    """What held-out images show, as the model is told it.  Raises UsageError where they don't say."""
    if (config.conditioning.has_class and shown.labels is None) or (config.conditioning.text and not shown.captions):
        raise UsageError("data.validation_images: it lacks the labels (.cls) or captions (.txt) of conditioning.kind")
    labels = [None] * len(shown.pixels) if shown.labels is None else shown.labels.tolist()
    return [Asked(*both) for both in zip(labels, shown.captions or [None] * len(labels), strict=True)]


def labels_of(asked: Sequence[Asked]) -> NDArray[np.int64] | None:
    """The classes asked for, int64 [N]; None where one has none."""
    labels = [one.label for one in asked]
    return None if None in labels else np.array(labels, dtype=np.int64)


def model_sha256(pipe: ClassConditionalPipeline) -> str:
    """Of all of a pipeline that its images depend on: the same for a checkpoint and for its fp32 export."""
    scheduler = {
        key: repr(value) if value in (math.inf, -math.inf) else value  # such as DPMSolverMultistep's lambda_min_clipped
        for key, value in pipe.scheduler.config.items()
        if not key.startswith("_")
    }
    return files.fingerprint(
        {
            "unet": state_sha256(pipe.unet.state_dict()),
            "vae": weights_sha256(pipe.vae),
            "vae_scale": [pipe.vae.config["scaling_factor"], pipe.vae.config.get("shift_factor")],
            "text": [state_sha256(model.state_dict()) for model in pipe.text_encoders],
            "scheduler": [type(pipe.scheduler).__name__, scheduler],
            "tile_pixels": sampler.tile_of(pipe),
        }
    )
