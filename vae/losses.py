"""Losses of the autoencoder, one value per image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def reconstruction_loss(x_hat: Tensor, x: Tensor, kind: Literal["l1", "l2"]) -> Tensor:
    """Pixel error: mean over C, H and W of |x_hat - x| (l1) or its square (l2).

    x_hat, x [B,3,H,W] in [-1,1] units → [B]; at least fp32.
    """
    if x_hat.shape != x.shape:
        raise ValueError(f"reconstruction {list(x_hat.shape)} came, {list(x.shape)} is wanted")
    dtype = torch.promote_types(x_hat.dtype, torch.float32)
    difference = x_hat.to(dtype) - x.to(dtype)
    match kind:
        case "l1":
            return difference.abs().mean(dim=(1, 2, 3))
        case "l2":
            return difference.square().mean(dim=(1, 2, 3))


def kl_of_elements(moments: Tensor) -> Tensor:
    """½ (mean² + exp(logvar) - 1 - logvar) of each element of z: the terms of `kl_divergence`.

    moments [B,2C,h,w], mean ‖ logvar → [B,C,h,w] in nats; at least fp32.
    """
    mean, logvar = moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, dim=1)
    # expm1(v) - v keeps the digits that exp(v) - 1 - v loses near the prior.
    return 0.5 * (mean.square() + logvar.expm1() - logvar)


def kl_divergence(moments: Tensor) -> Tensor:
    """KL(q(z|x) ‖ N(0, I)) = ½ Σ (mean² + exp(logvar) - 1 - logvar), Kingma & Welling 2014, appendix B.

    moments [B,2C,h,w], mean ‖ logvar → [B] in nats per image; at least fp32.
    """
    return kl_of_elements(moments).sum(dim=(1, 2, 3))
