"""A sampling to look at: the latents on the way from noise to image, and what the model takes the clean ones for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import files, sampler
from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.config import Config
from pipeline.data.images import to_pixels
from pipeline.metrics.pictures import labelled_grid, readable_scale
from pipeline.painting import watched
from pipeline.sampler import Asked

DENOISING = "denoising.png"  # in RUN/evaluation
ROWS, COLUMNS = 3, 9  # images; places on the way


def save_denoising(
    path: Path, pipe: ClassConditionalPipeline, rows: Sequence[tuple[str, Asked]], config: Config, *, title: str
) -> None:
    """A PNG file: the first `rows` at places of one sampling, each one's latents decoded and the prediction below.

    At the last guidance scale.  Schedulers that don't tell what they predict give the latents alone.
    """
    settings, rows = config.evaluation, rows[:ROWS]
    steps, latents, clean = on_the_way(
        pipe,
        [asked for _, asked in rows],
        sampler.sample_seeds(config.seed, range(len(rows))),
        guidance_scale=settings.guidance_scales[-1],
        num_inference_steps=settings.num_inference_steps,
    )
    lines: list[tuple[str, list[NDArray[np.uint8]]]] = []
    for i, (name, _) in enumerate(rows):
        lines.append((name, [at[i] for at in latents]))
        if clean:
            lines.append(("as predicted", [at[i] for at in clean]))
    columns = [f"step {step}" for step in steps]
    scale, together = readable_scale(latents[0]), 2 if clean else None
    with files.whole(path) as aside:
        labelled_grid(lines, scale, title, columns=columns, group_rows=together).save(aside, format="PNG")


def on_the_way(
    pipe: ClassConditionalPipeline, asked: Sequence[Asked], seeds: Sequence[int], **how: Any
) -> tuple[list[int], list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """Steps of a sampling, from 1, evenly spaced; what z_t and the predicted z_0 decode to after each, uint8 [B,H,W,3].

    No predictions where the scheduler tells none.  `how`: other arguments of the pipeline.
    """
    met: list[tuple[Tensor, Tensor | None]] = []

    def after_step(_: Any, i: int, t: float, at: dict[str, Any]) -> dict[str, Any]:
        met.append((at["latents"], clean.z_0))
        return at

    with watched(pipe.scheduler) as clean:
        pipe(**sampler.told_of(pipe, asked), seeds=seeds, output_type="latent", callback_on_step_end=after_step, **how)
    chosen = np.unique(np.linspace(0, len(met) - 1, COLUMNS).round().astype(int)).tolist()
    predicted = [z_0 for _, z_0 in (met[i] for i in chosen) if z_0 is not None]
    if len(predicted) < len(chosen):
        predicted = []
    decoded = [decode(pipe, met[i][0]) for i in chosen]
    return [i + 1 for i in chosen], decoded, [decode(pipe, z_0) for z_0 in predicted]


@torch.no_grad()
def decode(pipe: ClassConditionalPipeline, z: Tensor) -> NDArray[np.uint8]:
    """Latents as the network knows them, [B,C,h,w] → pixels uint8 [B,H,W,3]."""
    config: Any = pipe.vae.config
    z = z / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
    x: Any = pipe.vae.decode(z.to(pipe.vae.dtype))
    return to_pixels(x.sample.float().cpu())
