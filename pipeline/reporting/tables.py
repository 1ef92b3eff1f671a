"""What a run has come to, in words and rows: how it stands, its first figures, its scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.reporting import words
from pipeline.reporting.charts import OF_GUIDANCE, bookkeeping, is_number
from pipeline.reporting.gather import Gathered, Json
from pipeline.reporting.words import Score, score_of
from pipeline.score_rows import first_network, flat_name

STATES = {
    "running": "running",
    "done": "done",
    "preempted": "stopped, all saved",
    "failed": "failed",
    "usage": "wrong settings",
}


@dataclass(frozen=True)
class ScoreRow:
    """A score of each column of the table, in words; `aside`: it says how another was measured."""

    score: Score
    values: list[str]
    aside: bool


def state_of(found: Gathered) -> tuple[str, str]:
    """How the run stands: a word, and what is to be said about it."""
    state = str(found.status.get("state", "unknown"))
    reason = str(found.status.get("reason") or "")
    if state == "running" and not found.live:
        said = "status.json says that it runs, but no process on this machine holds its folder: killed, or elsewhere"
        return "not running", said
    return STATES.get(state, state), reason


def figures(found: Gathered) -> list[tuple[str, str, str]]:
    """(what, value, more about it): the first that one wants to know."""
    table, config = found.table, found.config
    made: list[tuple[str, str, str]] = []
    step = max(int(table.step[-1]) if len(table) else 0, int(found.status.get("step") or 0))
    of = f"of {words.number(config.train.steps)}" if config else ""
    made.append(("Steps", words.number(step), of))
    if config:
        seen = step * config.train.global_batch_images
        size = sum(each.num_samples or 0 for each in found.train_sets)
        made.append(("Images seen", words.number(seen), f"{seen / size:,.3g} times the set" if size else ""))
        seconds = table.training_s(config.train.global_batch_images)
        throughput = table.columns.get("images_per_s", np.empty(0))
        throughput = throughput[~np.isnan(throughput)]
        if seconds:
            left = (config.train.steps - step) * config.train.global_batch_images / float(np.median(throughput[-100:]))
            ahead = f"about {words.duration(left)} to go" if found.live and left > 0 else "in logged steps"
            made.append(("Training time", words.duration(seconds), ahead))
            median = float(np.median(throughput))
            made.append(("Throughput", words.number(median), "images/s, median"))
    if len(table) and "loss" in table.columns:
        losses = table.columns["loss"][~np.isnan(table.columns["loss"])]
        if len(losses):
            made.append(("Loss", words.number(float(losses[-1])), f"lowest {words.number(float(losses.min()))}"))
    for name in (flat_name(first_network(found.scores), "fid"), "class_accuracy"):
        by_scale = {
            match[1]: value
            for key, value in found.scores.items()
            if (match := OF_GUIDANCE.fullmatch(key)) and match[2] == name and is_number(value)
        }
        if by_scale:
            score = score_of(name)
            scale = (min if score.better == "down" else max)(by_scale, key=by_scale.__getitem__)
            more = f"at guidance {scale}"
            if is_number(real := found.scores.get(f"validation/{name}")):
                more += f"; real images {score.write(real)}"
            if is_number(drawn := found.scores.get(f"guidance_{scale}/num_images")):
                more += f"; N = {words.number(drawn)}"
            made.append((score.title, score.write(by_scale[scale]), more))
    return made


def score_columns(scores: Json) -> list[tuple[str, str]]:
    """(prefix, heading) of the score table: real images, then each guidance scale; N of each in its heading."""
    drawn = list(dict.fromkeys(name.partition("/")[0] for name in scores if name.startswith("guidance_")))
    found = [(prefix, f"guidance {prefix.removeprefix('guidance_')}") for prefix in drawn]
    if any(name.startswith("validation/") for name in scores):
        found = [("validation", "real, held out"), *found]
    counts = {prefix: scores.get(f"{prefix}/num_images") for prefix, _ in found}
    return [
        (prefix, f"{said}, N = {words.number(count)}" if is_number(count := counts[prefix]) else said)
        for prefix, said in found
    ]


def num_reference_images(scores: Json) -> int | float | None:
    """M: how many real training images the scores compare with."""
    known = (v for k, v in scores.items() if k.endswith(("/num_train_images", "/num_reference_images")))
    return next(filter(is_number, known), None)


def score_rows(scores: Json) -> list[ScoreRow]:
    """The score table."""
    columns = [prefix for prefix, _ in score_columns(scores)]
    names = dict.fromkeys(name.partition("/")[2] for name in scores if name.partition("/")[0] in columns)

    def written(prefix: str, name: str) -> str:
        value, error = (scores.get(f"{prefix}/{key}") for key in (name, f"{name}_standard_error"))
        return words.with_error(value, error) if is_number(value) and is_number(error) else score_of(name).write(value)

    return [
        ScoreRow(
            score_of(name),
            [written(prefix, name) for prefix in columns],
            aside=bookkeeping(name),
        )
        for name in names
        if not name.endswith("_standard_error")
    ]


LIKELIHOODS = {
    "bound": "Variational bound of the latents",
    "l_0": "of it L₀, the last step",
    "kl": "of it the steps before",
    "l_T": "of it L_T, what is left of the image in the noise",
    "ode": "Likelihood of the latents by the ODE",
    "pixel_bound": "Bound of the whole system, of 8-bit pixels",
}


def likelihood_rows(scores: Json) -> list[tuple[str, str, str]]:
    """What held-out images cost, with its standard error, and how many of them there were."""
    return [
        (
            title,
            words.with_error(scores[key], scores.get(f"likelihood/{name}_standard_error", 0.0)),
            counted(scores, f"likelihood/{'ode_' if name == 'ode' else ''}num_images"),
        )
        for name, title in LIKELIHOODS.items()
        if isinstance(scores.get(key := f"likelihood/{name}_bits_per_dim"), int | float)
    ]


def counted(scores: Mapping[str, Any], name: str) -> str:
    """A number of images as a table has it; nothing where it is not known."""
    return f"N = {words.number(count)}" if is_number(count := scores.get(name)) else ""


VAE_SCORES = {
    "reconstruction/psnr_db": ("PSNR", "dB"),
    "reconstruction/ssim": ("SSIM", ""),
    "reconstruction/absolute_error_levels": ("Absolute error", "levels of 255"),
    "reconstruction/perceptual_distance": ("Perceptual distance", ""),
    "reconstruction/frechet_distance": ("Fréchet distance of reconstructions", ""),
    "reconstruction/coverage": ("Coverage of reconstructions", ""),
    "bound/elbo_bits_per_dim": ("Evidence lower bound", "bits/dim"),
    "bound/iwae_bits_per_dim": ("Importance-weighted bound", "bits/dim"),
    "latent/scale": ("Latents are scaled by", ""),
}


def vae_rows(found: Gathered) -> list[tuple[str, str, str]]:
    """The autoencoder's measures and of how many images; what evaluate found where it was not measured by itself."""
    measured: Mapping[str, Any] = found.vae_scores
    rows: list[tuple[str, str, str]] = []
    for name, (title, unit) in VAE_SCORES.items():
        value, error = measured.get(name), measured.get(f"{name}_standard_error")
        if isinstance(value, int | float):
            said = words.with_error(value, error) if isinstance(error, int | float) else words.number(value)
            rows.append((title, f"{said} {unit}".rstrip(), counted(measured, f"{name.partition('/')[0]}/num_images")))
    if dead := measured.get("latent/dead_channels"):
        rows.append(("Channels that say nothing", ", ".join(map(str, dead)), ""))
    if not rows and isinstance(psnr := found.scores.get("vae/psnr_db"), int | float):
        rows.append(("PSNR", f"{words.number(psnr)} dB", counted(found.scores, "vae/num_images")))
    return rows
