"""The images that a folder lacks, drawn by all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline import image_files, sampler
from pipeline.asking import Wanted
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.engine import Engine
from pipeline.errors import UsageError
from pipeline.image_files import Row

Batch = Sequence[Wanted]


def draw_missing(
    engine: Engine,
    pipe: ClassConditionalPipeline,
    batches: Sequence[Batch],
    rows: Sequence[Row],
    *,
    folder: Path,
    how: dict[str, Any],
) -> None:
    """Draw what FOLDER lacks of these images, each rank its share; returns when all of them are there.

    A file that is whole and says what it would say is kept.  Of a batch that lacks a file all is drawn, and only that
    file written: see asking.batches.  `rows`: by the images' indices; `how`: arguments of the pipeline, for all alike.
    """
    paths = [folder / name for name in image_files.file_names(rows)]

    def lacking(batch: Batch) -> list[int]:
        """Places in the batch of the images that are to be written."""
        return [i for i, one in enumerate(batch) if image_files.said_by(paths[one.index]) != rows[one.index]]

    mine = range(engine.rank, len(batches), engine.num_ranks)
    found = engine.gather([number for number in mine if lacking(batches[number])])
    todo = sorted(number for share in found for number in share)  # shared out anew: a kill leaves uneven shares
    with tqdm(
        total=len(rows),
        initial=len(rows) - sum(len(batches[number]) for number in todo),
        desc="sample",
        unit=" images",
        dynamic_ncols=True,
        disable=not engine.is_main,
    ) as bar:
        for first in range(0, len(todo), engine.num_ranks):
            at_once = todo[first : first + engine.num_ranks]
            if engine.rank < len(at_once):
                batch = batches[at_once[engine.rank]]
                pixels = draw(pipe, batch, how)
                for i in lacking(batch):
                    index = batch[i].index
                    image_files.write_png(paths[index], pixels[i], rows[index], engine.rank)
            bar.update(sum(len(batches[number]) for number in at_once))
    engine.wait()


def try_out(pipe: ClassConditionalPipeline, image: Wanted, how: dict[str, Any]) -> None:
    """Take the first step of an image.  Raises UsageError for what the pipeline refuses, such as a scheduler.

    To be called on every rank before anything is written, so that all of them end alike.
    """

    def stop(*step: object) -> NoReturn:
        raise EnoughError

    try:
        draw(pipe, [image], how | {"callback_on_step_end": stop})
    except EnoughError:
        return
    except ValueError as error:
        raise UsageError(str(error)) from error


class EnoughError(Exception):
    """The first step has been taken."""


def draw(pipe: ClassConditionalPipeline, batch: Batch, how: dict[str, Any]) -> NDArray[np.uint8]:
    """uint8 [B,H,W,3]; the images of the batch have one Wanted.batch_key."""
    against: dict[str, Any] = {}
    if batch[0].negative.label is not None:  # then all of the batch have one
        against["negative_label"] = [image.negative.label for image in batch]
    if batch[0].negative.prompt is not None:
        against["negative_prompt"] = [image.negative.prompt for image in batch]
    asked, seeds = [image.asked for image in batch], [image.seed for image in batch]
    return sampler.draw_batch(pipe, asked, seeds, guidance_scale=batch[0].guidance, **against, **how)
