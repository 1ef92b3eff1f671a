"""Straight lines between two images in the autoencoder's latent space, decoded."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from vae.moments import encode_moments


@torch.no_grad()
def interpolate(vae: AutoencoderKL, first: Tensor, second: Tensor, num_steps: int) -> Tensor:
    """Decoded (1 - s) · mean(first) + s · mean(second) at num_steps even s from 0 to 1, the posteriors' means.

    So the ends are the reconstructions of both.  first, second [B,3,H,W] in [-1,1] → [B,num_steps,3,H,W].

    Raises ValueError: shapes that differ, or less than 2 steps.
    """
    start, end = (encode_moments(vae, x).chunk(2, dim=1)[0] for x in (first, second))
    along = blend(start, end, num_steps).unbind(dim=1)
    return torch.stack([vae.decode(z).sample.float() for z in along], dim=1)  # pyright: ignore


def blend(first: Tensor, second: Tensor, num_steps: int) -> Tensor:
    """(1 - s) · first + s · second at num_steps even s from 0 to 1: [B,...] → [B,num_steps,...].

    Raises ValueError: shapes that differ, or less than 2 steps.
    """
    if first.shape != second.shape:
        raise ValueError(f"ends {list(first.shape)} and {list(second.shape)} came, one shape is wanted")
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps} came, at least 2, the ends, are wanted")
    along = torch.linspace(0, 1, num_steps, dtype=first.dtype, device=first.device)
    return torch.stack([torch.lerp(first, second, s) for s in along], dim=1)
