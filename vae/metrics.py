"""How well the autoencoder gives images back."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from vae.moments import encode_moments


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """x_hat from the posterior's mean, so without chance.  x, x_hat [B,3,H,W], x in [-1,1]."""
    mean, _ = encode_moments(vae, x).chunk(2, dim=1)  # [B,C,h,w]
    return vae.decode(mean).sample.float()  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image: 10 · log10(2² / mean square error), the peak being 1 - (-1).

    x_hat, x [B,3,H,W], cut to [-1,1] first, as they are when a picture is saved → [B] in dB; infinite where equal.
    """
    if x_hat.shape != x.shape:
        raise ValueError(f"reconstruction {list(x_hat.shape)} came, {list(x.shape)} is wanted")
    return peak_signal_noise_ratio(x_hat, x, data_range=(-1.0, 1.0), reduction="none", dim=(1, 2, 3))
