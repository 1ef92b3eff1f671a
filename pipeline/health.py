"""How an autoencoder's training is, looked at every so many steps: alarms that say what is wrong and what to do.

    saturated_discriminator   it is sure of everything, and tells the decoder nothing
    collapsed_coverage        reconstructions no longer cover the images
    collapsed_posterior       a latent channel says nothing of the image

An alarm is raised when the last three looks all found it, and again only after a look that did not.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline import files, program
from pipeline.metrics.manifold import density_coverage
from vae import game
from vae.metrics import reconstruct

NUM_LOOKS = 3
LEAST_COVERAGE = 0.5  # of the best that there was
THUMBNAIL_SIDE = 8  # pixels

Features = Callable[[Tensor], Tensor]  # x [B,3,H,W] in [-1,1] → [B,D]


def thumbnails(x: Tensor) -> Tensor:
    """Features without a network: x [B,3,H,W] → [B,192], the means of 8×8 areas."""
    return functional.adaptive_avg_pool2d(x, THUMBNAIL_SIDE).flatten(1)


class Health:
    """The looks of one rank at a training, and RUN/alarms.jsonl."""

    def __init__(self, run: Path, images: NDArray[np.float32] | None, features: Features, *, batch_images: int) -> None:
        """images [N,3,H,W] in [-1,1], N > 5: those whose reconstructions' `features` are looked at; None: none are."""
        self.path = run / "alarms.jsonl"
        self.images, self.features, self.batch_images = images, features, batch_images
        self.best_coverage = torch.zeros((), dtype=torch.float64)  # what a resumed run goes on from
        self._looks: deque[dict[str, Any]] = deque(maxlen=NUM_LOOKS)
        self._raised: set[str] = set()

    def begin(self, step: int) -> None:
        """Go on after `step`: alarms of later ones belong to work that was lost."""
        kept = [line for line in files.whole_lines(self.path) if json.loads(line)["step"] <= step]
        if kept or self.path.exists():
            files.write_text(self.path, "".join(f"{line}\n" for line in kept))

    def look(self, step: int, vae: AutoencoderKL, figures: Mapping[str, float]) -> dict[str, float]:
        """Look at what was found after `step`, and raise what is wrong.  `figures`: of the newest step that is known.

        What the look itself measured: `coverage`, the share of images with a reconstruction near them (Naeem et al.
        2020, section 3), in [0,1].
        """
        kl = [value for name, value in figures.items() if name.startswith("kl_channel/")]
        saturation = figures.get("discriminator/saturation")
        coverage = None if self.images is None else self._coverage(vae, self.images)
        if coverage is not None:
            self.best_coverage.clamp_(min=coverage)
        self._looks.append({"kl": kl, "saturation": saturation, "coverage": coverage})
        for name, told in self._alarms().items():
            if told is not None and name not in self._raised:
                program.say(f"\nwarning: step {step}: {told}")
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "alarm": name, "told": told}) + "\n")
            (self._raised.discard if told is None else self._raised.add)(name)
        return {} if coverage is None else {"coverage": coverage}

    def _alarms(self) -> dict[str, str | None]:
        """What each alarm says of the last looks, where all of them measured what it looks at."""
        found: dict[str, str | None] = {}
        for name, figure, says in (
            ("saturated_discriminator", "saturation", game.saturated_discriminator),
            ("collapsed_coverage", "coverage", self._coverage_says),
            ("collapsed_posterior", "kl", game.collapsed_posterior),
        ):
            values = [look[figure] for look in self._looks if look[figure] is not None]
            if len(values) == NUM_LOOKS:
                found[name] = says(values)
        return found

    def _coverage_says(self, coverage: Sequence[float]) -> str | None:
        return game.collapsed_coverage(coverage, least=LEAST_COVERAGE * float(self.best_coverage))

    @torch.no_grad()
    def _coverage(self, vae: AutoencoderKL, images: NDArray[np.float32]) -> float:
        real: list[Tensor] = []
        fake: list[Tensor] = []
        for start in range(0, len(images), self.batch_images):
            x = torch.from_numpy(images[start : start + self.batch_images]).to(vae.device)
            x_hat = reconstruct(vae, x).clamp(-1, 1)
            real.append(self.features(x).float().cpu())
            fake.append(self.features(x_hat).float().cpu())
        return density_coverage(torch.cat(real).numpy(), torch.cat(fake).numpy())[1]
