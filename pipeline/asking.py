"""What `sample` is asked for: lines of classes, prompts or both, by options or in a file, and the images of each.

Everything is found wrong here, before anything is drawn: an error names the option, or the file and its line.
"""

from __future__ import annotations

import csv
import difflib
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.errors import UsageError, blame
from pipeline.sampler import Asked, sample_seeds

Cells = dict[str, Any]  # one line of a file, by the names of its columns
KNOWN = ("class", "prompt", "seed", "guidance", "negative_class", "negative_prompt")
FIRST_CLASSES = 10  # drawn where a model of classes is asked for nothing


class Line(NamedTuple):
    """What a line asks for; None: it doesn't say, and the command line's or the config's holds."""

    asked: Asked
    negative: Asked = Asked()
    guidance: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Wanted:
    """One image."""

    index: int
    asked: Asked
    negative: Asked
    guidance: float
    seed: int  # as in pipe(..., seeds=seed)

    @property
    def batch_key(self) -> tuple[float, bool, bool]:
        """Images of one key may be drawn in one call of the pipeline: guidance is a number for all of them."""
        return self.guidance, self.negative.label is None, self.negative.prompt is None


def wanted_lines(
    pipe: ClassConditionalPipeline, classes: str | None, prompts: Sequence[str] | None, path: Path | None
) -> list[Line]:
    """The lines that are asked for, by options or in a file; without any, a model of classes draws its first ones.

    Raises UsageError for what is unknown, for what the model was not trained with, and for what it lacks.
    """
    if path is not None:
        for option, given in (("--classes", classes), ("--prompts", prompts)):
            if given is not None:
                raise UsageError(f"--from and {option} came; one of them was wanted")
        return read_lines(path, pipe)
    if classes is None and prompts is None and pipe.num_classes and not pipe.text_encoders:
        return [Line(Asked(label)) for label in range(min(FIRST_CLASSES, pipe.num_classes))]
    for option, given, known, instead in (
        ("--classes", classes, pipe.num_classes, "knows no classes; --prompts was wanted"),
        ("--prompts", prompts, len(pipe.text_encoders), "reads no prompts; --classes was wanted"),
    ):
        if given is not None and not known:
            raise UsageError(f"{option} came; this model {instead}")
    for option, given, known in (
        ("--classes", classes, pipe.num_classes),
        ("--prompts", prompts, len(pipe.text_encoders)),
    ):
        if given is None and known:
            raise UsageError(f"no {option} came, which this model wants; or --from FILE")
    with blame("--classes"):
        labels = [class_id(pipe, word) for word in classes.split(",")] if classes is not None else [None]
    with blame("--prompts"):
        texts = [text(prompt) for prompt in prompts] if prompts is not None else [None]
    if len({len(labels), len(texts)} - {1}) > 1:
        raise UsageError(
            f"--classes, --prompts: {len(labels)} and {len(texts)} came; as many of each, or one for all, were wanted"
        )
    count = max(len(labels), len(texts))
    labels, texts = (given * count if len(given) == 1 else given for given in (labels, texts))
    return [Line(Asked(label, prompt)) for label, prompt in zip(labels, texts, strict=True)]


def images_of(lines: Sequence[Line], count: int, *, seed: int, guidance: float) -> list[Wanted]:
    """`count` images of each line, one line after another.

    Image i of all begins from sample_seeds(seed, [i]).  Where a line has a seed of its own, its images have that one
    and those that follow it, as pipe(..., seeds=s) has it.
    """
    seeds = sample_seeds(seed, range(len(lines) * count))
    return [
        Wanted(
            index := number * count + repeat,
            line.asked,
            line.negative,
            guidance if line.guidance is None else line.guidance,
            seeds[index] if line.seed is None else line.seed + repeat,
        )
        for number, line in enumerate(lines)
        for repeat in range(count)
    ]


def batches(images: Sequence[Wanted], batch_images: int) -> list[list[Wanted]]:
    """Images that are drawn together: a function of what is asked alone.

    A network rounds differently in batches of other sizes.  So the batches are these for any number of ranks, and
    whatever has been drawn before: pixels are then the same to the last bit.
    """
    alike: dict[tuple[float, bool, bool], list[Wanted]] = {}
    for image in images:
        alike.setdefault(image.batch_key, []).append(image)
    return [group[i : i + batch_images] for group in alike.values() for i in range(0, len(group), batch_images)]


def read_lines(path: Path, pipe: ClassConditionalPipeline) -> list[Line]:
    """The lines of a .txt, .jsonl or .csv file.  Raises UsageError naming the file, and the line where it is one's."""
    match path.suffix.lower():
        case ".jsonl":
            numbered = _jsonl(path)
        case ".csv":
            numbered = _csv(path)
        case ".txt" | "":
            numbered = _plain(path, pipe)
        case suffix:
            raise UsageError(f"{path}: {suffix} came, .txt, .jsonl or .csv was wanted")
    lines: list[Line] = []
    try:
        for number, cells in numbered:
            with blame(f"{path}:{number}"):
                lines.append(_line(cells, pipe))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not readable ({error})") from None
    if not lines:
        raise UsageError(f"{path}: empty; a line for each class or prompt was wanted")
    return lines


def class_id(pipe: ClassConditionalPipeline, word: Any) -> int:
    """The id of a class, told as a name or an id; a number is a name where a class is called so.  Raises ValueError."""
    if isinstance(word, str):
        word = word.strip()
        if word.isdecimal() and word not in (pipe.config["class_names"] or ()):
            word = int(word)
    if isinstance(word, bool) or not isinstance(word, str | int):
        raise ValueError(f"{word!r} came, the name or id of a class was wanted")
    return pipe.label_ids(word)[0]


def text(value: Any) -> str:
    """A prompt.  Raises ValueError for anything but text that a file can hold."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} came, a text was wanted")
    value.encode()  # what a terminal or JSON may smuggle in: half a character
    return value


def whole_number(value: Any) -> int:
    """A seed: an integer in [0, 2^63), also as text.  Raises ValueError."""
    found = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < 2**63:
        raise ValueError(f"{value!r} came, an integer from 0 to 2^63 - 1 was wanted")
    return found


def guidance_scale(value: Any) -> float:
    """A finite number of 0 or more, also as text.  Raises ValueError."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not (math.isfinite(found) and found >= 0):
        raise ValueError(f"{value!r} came, a finite number of 0 or more was wanted")
    return found


def scheduler_like(pipe: ClassConditionalPipeline, name: str) -> Any:
    """diffusers' scheduler of this name with the noise schedule of the export's.

    Those that know flow matching beside DDPM's noise, such as DPMSolverMultistepScheduler, are told which it is.
    Raises UsageError where there is none.  Whether it fits what the network says, the pipeline finds.
    """
    kind = getattr(diffusers.schedulers, name, None)
    if lacking := getattr(kind, "_backends", None):  # diffusers' stand-in for what it can't import
        raise UsageError(f"--scheduler: {name} came, which wants {', '.join(lacking)} installed")
    if not (inspect.isclass(kind) and issubclass(kind, SchedulerMixin) and hasattr(kind, "step")):
        others = [other for other in dir(diffusers.schedulers) if other.endswith("Scheduler") and other != name]
        near = difflib.get_close_matches(name, others, n=1, cutoff=0.4)
        raise UsageError(
            f"--scheduler: {name!r} came, the name of one of diffusers' schedulers that steps was wanted"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    made: Any = kind
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    known = inspect.signature(made.__init__).parameters
    said = flow if pipe.config["prediction"] == flow["prediction_type"] and flow.keys() <= known.keys() else {}
    if said and "flow_shift" in known:
        said = {**said, "flow_shift": pipe.scheduler.config.get("shift", 1.0)}
    try:
        return made.from_config(pipe.scheduler.config, **said)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--scheduler: {name} can't be made of the export's settings: {error}") from error


def takes_eta(scheduler: Any) -> bool:
    """Whether a scheduler's steps have DDIM's η."""
    return "eta" in inspect.signature(scheduler.step).parameters


def _line(cells: Cells, pipe: ClassConditionalPipeline) -> Line:
    """One line of a file.  Raises ValueError."""
    for key in cells:
        if key not in KNOWN:
            raise ValueError(f"unknown key {key!r}; known: {', '.join(KNOWN)}")
    reads = {
        "class": lambda value: class_id(pipe, value),
        "prompt": text,
        "seed": whole_number,
        "guidance": guidance_scale,
        "negative_class": lambda value: class_id(pipe, value),
        "negative_prompt": text,
    }
    for kind, known, lacks in (
        ("class", pipe.num_classes, "knows no classes"),
        ("prompt", len(pipe.text_encoders), "reads no prompts"),
    ):
        for key in (kind, f"negative_{kind}"):
            if cells.get(key) is not None and not known:
                raise ValueError(f"{key} came; this model {lacks}")
        if cells.get(kind) is None and known:
            raise ValueError(f"no {kind} came, which this model wants")
    found: Cells = {}
    for key, value in cells.items():
        if value is not None:
            with blame(key):
                found[key] = reads[key](value)
    return Line(
        Asked(found.get("class"), found.get("prompt")),
        Asked(found.get("negative_class"), found.get("negative_prompt")),
        found.get("guidance"),
        found.get("seed"),
    )


def _plain(path: Path, pipe: ClassConditionalPipeline) -> Iterator[tuple[int, Cells]]:
    """A class or a prompt on each line; empty lines are passed over."""
    if pipe.num_classes and pipe.text_encoders:
        raise UsageError(f"{path}: this model wants a class and a prompt for each image: a .jsonl or .csv was wanted")
    key = "prompt" if pipe.text_encoders else "class"
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, {key: line.strip()}


def _jsonl(path: Path) -> Iterator[tuple[int, Cells]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                cells: object = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}:{number}: not JSON: {error}") from None
            if not isinstance(cells, dict):
                raise UsageError(f"{path}:{number}: {type(cells).__name__} came, a JSON object was wanted")
            yield number, {str(key): value for key, value in cells.items()}


def _csv(path: Path) -> Iterator[tuple[int, Cells]]:
    """Cells are texts; an empty one says nothing."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                cells: dict[Any, Any] = row
                if None in cells or None in cells.values():  # too many, too few
                    wanted = len(reader.fieldnames or ())
                    raise UsageError(f"{path}:{reader.line_num}: {wanted} fields were wanted, as in the first line")
                yield reader.line_num, {str(key): value or None for key, value in cells.items()}
        except csv.Error as error:
            raise UsageError(f"{path}:{reader.reader.line_num}: not CSV: {error}") from None
