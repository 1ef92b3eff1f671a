"""Numbers, spans of time and what was trained, as a person wants to read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import floor, isfinite, log10
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Config
from pipeline.config_diffusion import DiffusionConfig

NAMES_SHOWN = 12  # of classes, in a sentence
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Score:
    """What a score is called, which way is better, how its value is written, and what few images do to it."""

    title: str
    better: Literal["up", "down", ""] = ""
    percent: bool = False
    bias: str = ""  # N images are drawn, M real ones are the reference

    def write(self, value: Any) -> str:
        """A value in words; nothing where there is none."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "" if value is None else str(value)
        return f"{100 * value:.1f}\N{NO-BREAK SPACE}%" if self.percent else number(value)


UP, DOWN, NONE = "biased up, ~1/N", "biased down, small N", "no bias, ± error"
GROWS, OF_M = "grows with N", "depends on M"
SCORES = {
    "class_accuracy": Score("Class accuracy", "up", percent=True),
    "accuracy": Score("Class accuracy", "up", percent=True),
    "frechet_distance": Score("Fréchet distance", "down", bias=UP),
    "frechet_distance_equal_n": Score("Fréchet distance, at equal numbers", "down"),
    "fid": Score("Fréchet distance", "down", bias=UP),
    "fid_equal_n": Score("Fréchet distance, at equal numbers", "down"),
    "kernel_distance": Score("Kernel distance", "down", bias=NONE),
    "kid": Score("Kernel distance", "down", bias=NONE),
    "inception_score": Score("Inception score", "up", bias=DOWN),
    "clip_score": Score("CLIP score", "up"),
    "precision": Score("Precision", "up", bias=OF_M),
    "recall": Score("Recall", "up", bias=GROWS),
    "density": Score("Density", bias=OF_M),
    "coverage": Score("Coverage", "up", bias=GROWS),
    "recall_equal_n": Score("Recall, at equal numbers", "up"),
    "coverage_equal_n": Score("Coverage, at equal numbers", "up"),
    "recall_of_validation": Score("Recall, of the real images'", "up", percent=True),
    "coverage_of_validation": Score("Coverage, of the real images'", "up", percent=True),
    "near_copy_share": Score("Near copies", "down", percent=True),
    "near_copy_threshold_levels": Score("Near copy: within, levels"),
    "nearest_train_median_levels": Score("Nearest training image: median, levels"),
    "kernel_distance_std": Score("Kernel distance: spread"),
    "num_images": Score("Images"),
    "num_inference_steps": Score("Steps of the sampler"),
    "num_train_images": Score("Training images"),
    "num_images_equal_n": Score("Images, for equal numbers"),
    "num_reference_images": Score("Reference images"),
    "bits_per_dim": Score("Bits per dimension", "down"),
    "validation_loss": Score("Validation loss", "down"),
    "validation_loss/mean": Score("Validation loss", "down"),
}


def score_of(name: str) -> Score:
    """What is known of a score, such as `precision` or `dinov2/precision`; of others their name, made readable."""
    if known := SCORES.get(name):
        return known
    head, _, last = name.rpartition("/")
    if head and (known := SCORES.get(last)):
        return replace(known, title=f"{known.title} ({head})")
    return Score(readable(name))


def biases(names: Iterable[str]) -> str:
    """What few images do to each of these scores, whatever network's they are, in one line."""
    of_bias: dict[str, dict[str, None]] = {}
    for score in (score_of(name.rpartition("/")[2]) for name in names):
        if score.bias:
            of_bias.setdefault(score.bias, {})[score.title] = None
    return "; ".join(f"{', '.join(titles)}: {bias}" for bias, titles in of_bias.items())


def readable(name: str) -> str:
    """A name of ours for people: `grad_norm` → Grad norm."""
    said = name.replace("/", ": ").replace("_", " ").strip()
    return said[:1].upper() + said[1:]


def number(value: float) -> str:
    """Three significant digits, whole numbers in full, powers of ten where there are many zeros."""
    if isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    if not isfinite(value):
        return str(value)
    exponent = floor(log10(abs(value)))
    if -4 <= exponent < 3:
        said = f"{value:.{2 - exponent}f}"
    elif 3 <= exponent < 15:
        said = f"{value:,.0f}"
    else:
        said = f"{value / 10.0**exponent:.2f} × 10{str(exponent).translate(SUPERSCRIPTS)}"
    return said.replace("-", "−")


def with_error(value: float, error: float) -> str:
    """A value and its standard error, to the error's first digit: 37.71 ± 0.06."""
    if not isfinite(error) or error <= 0:
        return number(value)
    places = max(0, -floor(log10(error)))
    return f"{value:,.{places}f} ± {error:.{places}f}".replace("-", "−")


def short(value: float) -> str:
    """A large count in short: 2,491,332 → 2.49 million."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A span of time in its two largest units."""
    units = (("day", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    left = round(seconds)
    for i, (unit, size) in enumerate(units):
        if left >= size:
            many, rest = divmod(left, size)
            said = f"{many:,}\N{NO-BREAK SPACE}{unit}{'s' if unit == 'day' and many > 1 else ''}"
            finer = rest // units[i + 1][1] if unit != "s" else 0
            return f"{said} {finer}\N{NO-BREAK SPACE}{units[i + 1][0]}" if finer else said
    return f"{seconds:.1f}\N{NO-BREAK SPACE}s"


def listed(names: list[str], limit: int = NAMES_SHOWN) -> str:
    """Names in a row; of many the first ones and the last."""
    if len(names) <= limit:
        return ", ".join(names)
    return ", ".join([*names[: limit - 1], "…", names[-1]])


def what_it_draws(config: Config) -> str:
    """The model's purpose."""
    condition, side = config.conditioning, config.data.image_size
    images = f"images of {side} × {side} pixels"
    if condition.kind == "text":
        return f"It draws {images} from captions."
    names = list(condition.class_names or ())
    classes = f"{condition.num_classes:,} classes" + (f" ({listed(names)})" if names else "")
    return f"It draws {images} of {classes}" + (", told captions too." if condition.kind == "class_text" else ".")


def what_it_learned(diffusion: DiffusionConfig) -> str:
    """What the network was asked to say."""
    match diffusion.objective:
        case "edm":
            return "to denoise as EDM does (Karras et al. 2022)"
        case "flow":
            return "the velocity of flow matching, ε − z₀ on straight lines (Lipman et al. 2023)"
        case "ddpm":
            said = {"epsilon": "the noise ε", "v_prediction": "the velocity v", "sample": "the clean latent z₀"}
            words = f"{said[diffusion.prediction_type]} in a latent noised over {diffusion.num_timesteps:,} timesteps"
            words += f" ({diffusion.schedule.replace('_', ' ')} schedule"
            words += ", zero terminal SNR" if diffusion.zero_terminal_snr else ""
            words += f", {diffusion.weighting.replace('_', ' ')} weighting" * (diffusion.weighting != "unweighted")
            return words + (", learned variance)" if diffusion.variance_type == "learned_range" else ")")


def what_it_saw(location: str, samples: int | None, made_by: dict[str, Any] | None) -> str:
    """A set of images."""
    count = f"{samples:,} images" if samples is not None else "images (the set is not on this machine)"
    prepared = f", made by prepare {made_by['prepare']}" if made_by and "prepare" in made_by else ""
    return f"{count} in {location}{prepared}"


def name_of(run: Path) -> str:
    """A run's name: that of its folder."""
    return run.resolve().name
