"""One drawing: what was asked for, the pictures on the way to it, what its PNGs carry, the code that redraws it."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.errors import UsageError

MAX_IMAGES, MAX_STEPS = 64, 1000
MAX_SEED = 2**32 - 1  # of the first image
SHOWN = 12  # pictures on the way: decoding costs time too
TOLD_EVERY_S = 0.2  # seconds between steps that are told of without a picture
PER_IMAGE = ("class_labels", "prompt", "seeds")
ROW_NAMES = {  # the pipeline's arguments, and what image_files calls them
    "class_labels": "class",
    "prompt": "prompt",
    "negative_label": "negative_class",
    "negative_prompt": "negative_prompt",
    "seeds": "seed",
    "guidance_scale": "guidance",
    "guidance_rescale": "guidance_rescale",
    "num_inference_steps": "steps",
}


@dataclass(frozen=True)
class Wish:
    """What somebody filled in, unchecked: None where a field was left empty.

    `labels`: classes, by name or id; of each, and of the prompt where none is given, `num_images` are drawn.
    """

    labels: Sequence[str | int] = ()
    prompt: str = ""
    negative_label: str | int | None = None
    negative_prompt: str = ""
    num_images: float | None = 1
    num_inference_steps: float | None = 25
    guidance_scale: float | None = 2.0
    guidance_rescale: float | None = 0.0
    seed: float | None = 0


class Frame(NamedTuple):
    """What can be seen after a step."""

    step: int  # of num_steps, from 1
    num_steps: int
    images: list[Image.Image]  # N predictions of the clean images, or none; where it is done, the images
    done: bool = False


def is_stock(folder: Path) -> bool:
    """Whether an export is a pipeline of diffusers itself (a text model's), without code of its own."""
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return isinstance(index["_class_name"], str)


def arguments(pipe: ClassConditionalPipeline, wish: Wish, *, stock: bool = False) -> dict[str, Any]:
    """A wish as arguments of the pipeline, with a label, a prompt and a seed for each image.

    `stock`: only what diffusers' own pipelines draw in the same way.  Raises UsageError, one line, for an empty wish,
    a condition that the model doesn't know, and numbers out of range.
    """
    each = _whole("Images", wish.num_images, 1, MAX_IMAGES)
    prompt = wish.prompt.strip()
    told: dict[str, Any] = {}
    if wish.labels and not pipe.num_classes:
        raise UsageError("Classes: this model was not trained with classes; a prompt was wanted")
    if (prompt or wish.negative_prompt.strip()) and not pipe.text_encoders:
        raise UsageError("Prompt: this model was not trained with text; classes were wanted")
    if pipe.num_classes and not wish.labels:
        raise UsageError("Classes: none came; pick one or more")
    if not pipe.num_classes and not prompt:
        raise UsageError("Prompt: nothing came; write what to draw")
    try:
        pipe.label_ids(wish.labels or [0])
        pipe.label_ids([0] if wish.negative_label is None else wish.negative_label)
    except ValueError as error:
        if pipe.num_classes:
            raise UsageError(f"Classes: {error}") from None
    count = each * max(1, len(wish.labels))
    if count > MAX_IMAGES:
        raise UsageError(f"Images: {each} of each of {len(wish.labels)} classes came, {MAX_IMAGES} at most were wanted")
    if pipe.num_classes:
        told["class_labels"] = [label for label in wish.labels for _ in range(each)]
    if pipe.text_encoders:
        told["prompt"] = [prompt] * count
    if wish.negative_label is not None:
        told["negative_label"] = wish.negative_label
    if wish.negative_prompt.strip():
        told["negative_prompt"] = wish.negative_prompt.strip()
    first = _whole("Seed", wish.seed, 0, MAX_SEED)
    told["seeds"] = list(range(first, first + count))
    told["num_inference_steps"] = _whole("Steps", wish.num_inference_steps, 1, MAX_STEPS)
    # Below 1 diffusers' own text pipelines leave guidance out.
    told["guidance_scale"] = _number("Guidance", wish.guidance_scale, 1.0 if stock else 0.0, math.inf)
    told["guidance_rescale"] = _number("Guidance rescale", wish.guidance_rescale, 0.0, 1.0)
    return told


class Painter:
    """A pipeline that makes one drawing at a time and shows it as it goes."""

    def __init__(self, pipe: ClassConditionalPipeline) -> None:
        self.pipe = pipe
        self._left, self._work = Event(), Thread()

    def stop(self) -> None:
        """End the drawing that is going on, if there is one, after the step that it is in."""
        self._left.set()
        if self._work.is_alive():
            self._work.join()

    def frames(self, asked: Mapping[str, Any]) -> Generator[Frame]:
        """Draw; tell of the steps, about SHOWN times with predictions; give the images last: those of `pipe(**asked)`.

        The pipeline runs in a thread of its own and speaks through its callback; closing the generator stops it, and so
        does the next drawing.  Raises what the pipeline raises.
        """
        self.stop()
        made: Queue[Frame | Exception | None] = Queue()
        left = Event()
        work = Thread(target=self._paint, args=(asked, made, left), daemon=True)
        self._left, self._work = left, work
        work.start()
        try:
            while (frame := made.get()) is not None:
                if isinstance(frame, Exception):
                    raise frame
                yield frame
        finally:
            left.set()
            work.join()

    def _paint(self, asked: Mapping[str, Any], made: Queue[Frame | Exception | None], left: Event) -> None:
        pipe: Any = self.pipe
        told = [-math.inf]  # when, in seconds

        def after_step(_: Any, i: int, t: float, at: dict[str, Any]) -> dict[str, Any]:
            if left.is_set():
                raise _LeftError
            num_steps = len(pipe.scheduler.timesteps)
            seen = i % max(1, num_steps // SHOWN) == 0
            if i + 1 < num_steps and (seen or time.monotonic() - told[0] >= TOLD_EVERY_S):
                z_0 = at["latents"] if clean.z_0 is None else clean.z_0
                made.put(Frame(i + 1, num_steps, pipe._decode(z_0, "pil") if seen else []))
                told[0] = time.monotonic()
            return at

        try:
            with watched(pipe.scheduler) as clean:
                images = pipe(**asked, callback_on_step_end=after_step).images
            num_steps = len(pipe.scheduler.timesteps)
            made.put(Frame(num_steps, num_steps, images, done=True))
        except _LeftError:
            pass
        except Exception as error:
            made.put(error)
        finally:
            made.put(None)


class _LeftError(Exception):
    """Nobody looks any more."""


@dataclass
class Clean:
    """The last step's prediction of the clean latents, [B,C,h,w]; None from schedulers that don't tell."""

    z_0: Tensor | None = None


@contextmanager
def watched(scheduler: Any) -> Generator[Clean]:
    """Note what a scheduler takes the clean latents for at each step; what it does is left as it is.

    DDIM, DDPM and EDM tell it as `pred_original_sample`.  Flow matching does not: z = (1-σ) z_0 + σ ε and the velocity
    v = ε - z_0 (Lipman et al. 2023) give z_0 = z - σ v.
    """
    clean, step = Clean(), scheduler.step

    @functools.wraps(step)  # the pipeline reads its parameters
    def noted(output: Tensor, t: Any, z_t: Tensor, **extra: Any) -> Any:
        made = step(output, t, z_t, **extra)
        clean.z_0 = getattr(made, "pred_original_sample", None)
        if clean.z_0 is None and hasattr(scheduler, "scale_noise") and getattr(scheduler, "order", 1) == 1:
            sigma = scheduler.sigmas[scheduler.step_index - 1]  # its step has counted on
            clean.z_0 = z_t - sigma.to(z_t.device) * output
        return made

    scheduler.step = noted
    try:
        yield clean
    finally:
        del scheduler.step  # the class's own is there again


def about(asked: Mapping[str, Any], index: int) -> dict[str, Any]:
    """What image `index` of a drawing was asked for, named as `sample` names it in its PNGs."""
    one = {name: value[index] if name in PER_IMAGE else value for name, value in asked.items()}
    return {said: one[name] for name, said in ROW_NAMES.items() if name in one}


def python_code(
    folder: Path, asked: Mapping[str, Any], device: str, *, stock: bool, tile_pixels: int | None = None
) -> str:
    """A program for which diffusers suffices: `images` are those of this drawing, decoded in tiles or whole (None)."""
    given = dict(asked)
    lines = ["from diffusers import DiffusionPipeline", ""]
    trust = "" if stock else ", trust_remote_code=True"
    moved = "" if device == "cpu" else f".to({device!r})"
    lines.append(f"pipe = DiffusionPipeline.from_pretrained({str(folder)!r}{trust}){moved}")
    if tile_pixels is not None:
        lines.append("pipe.vae.enable_tiling()")
        lines.append(f"pipe.vae.tile_sample_min_size = {tile_pixels}")
        factor = "2 ** (len(pipe.vae.config.block_out_channels) - 1)"
        lines.append(f"pipe.vae.tile_latent_min_size = {tile_pixels} // {factor}")
    words = {name: repr(value) for name, value in given.items()}
    if stock:
        lines.insert(0, "import torch")
        seeds = words.pop("seeds")
        words["generator"] = f'[torch.Generator("cpu").manual_seed(seed) for seed in {seeds}]'
        if "negative_prompt" in words:  # one for each image is wanted there
            words["negative_prompt"] = f"[{words['negative_prompt']}] * {len(given['prompt'])}"
    for name in ("class_labels", "prompt"):
        if name in words and len(given[name]) > 1 and len(set(given[name])) == 1:
            words[name] = f"[{given[name][0]!r}] * {len(given[name])}"
    lines += ["images = pipe(", *(f"    {name}={value}," for name, value in words.items()), ").images"]
    return "\n".join(lines) + "\n"


def _number(name: str, value: float | None, least: float, most: float) -> float:
    if value is None or not math.isfinite(value) or not least <= value <= most:
        came = "nothing" if value is None else f"{value:g}"
        raise UsageError(f"{name}: {came} came, {_between(least, most)} was wanted")
    return float(value)


def _whole(name: str, value: float | None, least: int, most: int) -> int:
    if value is None or not math.isfinite(value) or value != int(value) or not least <= value <= most:
        came = "nothing" if value is None else f"{value:.15g}"
        raise UsageError(f"{name}: {came} came, a whole number from {least} to {most} was wanted")
    return int(value)


def _between(least: float, most: float) -> str:
    return f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
