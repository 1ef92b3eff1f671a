"""The U-Net's loss of a batch: DDPM's Algorithm 1 (Ho et al. 2020), told classes, captions or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Module

from pipeline.conditioning import Conditioning
from pipeline.diffusion.objectives import Objective
from vae.moments import LatentScale, sample_posterior


@dataclass(frozen=True)
class DenoisingLoss:
    """z_0 ~ q(z|x), a time and eps by draw; what is minimised is the objective at what the network says.

    `autocast`: what frozen text encoders compute in; `moments_of`: x [B,3,H,W] → moments [B,2C,h,w], for batches that
    bring images.  Nothing here waits for the device.
    """

    objective: Objective
    latent_scale: LatentScale
    conditioning: Conditioning
    autocast: Callable[[], AbstractContextManager[object]]
    moments_of: Callable[[Tensor], Tensor]

    def __call__(self, model: Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss, and its detached parts.  The batch lies on the device, but for its float64 draws `u`."""
        moments = batch["moments"].float() if "moments" in batch else self.moments_of(batch["x"])  # [B,2C,h,w]
        z_0 = self.latent_scale.normalise(sample_posterior(moments, batch["posterior_noise"]))  # [B,C,h,w]
        noised = self.objective.noised(z_0, batch["u"], batch["eps"])
        with self.autocast():
            told = self.conditioning.arguments(batch)
        output = model(noised.z, noised.time, **told).sample
        loss, parts = self.objective.loss(output, z_0, batch["eps"], noised)
        if "truncated" in batch:
            parts |= {"truncated_captions": batch["truncated"].float()}  # share of the captions that are too long
        return loss.mean(), {name: part.mean() for name, part in parts.items()}
