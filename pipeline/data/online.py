"""Latents that no one wrote down: images are encoded in the step that learns from them, at a scale measured before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from pipeline import files
from pipeline.data.dataset import Samples, load_batches
from pipeline.errors import UsageError
from vae.moments import MomentStatistics

NAME = "latents.json"


def describe(
    run: Path,
    samples: Samples,
    moments_of: Callable[[Tensor], Tensor],
    *,
    origin: dict[str, Any],
    num_images: int,
    batch_images: int,
    workers: int,
) -> dict[str, Any]:
    """RUN/latents.json: the scale of the latents of the first `num_images` positions, measured once in a run.

    `moments_of`: x [B,3,H,W] → moments [B,2C,h,w]; `origin`: what else they depend on.  Raises UsageError where the
    run measured those of another origin.
    """
    origin = {**origin, "num_images": num_images}
    if (run / NAME).exists():
        said = files.read_json(run / NAME)
        differing = [name for name in origin if said["origin"].get(name) != origin[name]]
        if differing:
            told = "; ".join(f"{name} was {said['origin'].get(name)!r}, now {origin[name]!r}" for name in differing)
            raise UsageError(f"{run / NAME}: of other latents: {told}. Restore these or choose another run_dir")
        return said
    positions = (list(range(i, min(i + batch_images, num_images))) for i in range(0, num_images, batch_images))
    statistics: MomentStatistics | None = None
    with tqdm(total=num_images, desc="measure the latents' scale", unit=" images", dynamic_ncols=True) as bar:
        for batch, _ in load_batches(samples, positions, workers=workers, pin_memory=False):
            moments = moments_of(batch["x"]).float().cpu()
            statistics = statistics or MomentStatistics(moments.shape[1] // 2)
            statistics.update(moments)
            bar.update(len(moments))
    assert statistics is not None  # num_images > 0
    measured = statistics.latent_scale
    said = {"scale": measured.scale, "shift": measured.shift, "origin": origin, "statistics": statistics.to_dict()}
    files.write_json(run / NAME, said)
    return said
