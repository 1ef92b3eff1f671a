"""Losses of the autoencoder, one value per image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Pixelwise = Literal["l1", "l2"]


def reconstruction_loss(x_hat: Tensor, x: Tensor, kind: Pixelwise) -> Tensor:
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


def kl_per_channel(moments: Tensor) -> Tensor:
    """What each latent channel tells of an image: its share of `kl_divergence`, the mean over batch and positions.

    moments [B,2C,h,w], mean ‖ logvar → [C] in nats per latent element, detached; at least fp32.
    """
    return kl_of_elements(moments.detach()).mean(dim=(0, 2, 3))


@dataclass(frozen=True)
class SpatialTransform:
    """τ of EQ-VAE (Kouzelis et al. 2025): resized by one factor, then turned; drawn by whoever passes it in.

    The authors draw scale from 8/32 to 31/32 and 1 to 3 quarter turns, for half of the steps, and resize bilinearly.
    """

    scale: float = 1.0  # of both sides
    quarter_turns: int = 0  # of 90° anticlockwise

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"{self} came, a finite scale > 0 is wanted")

    def sides(self, h: int, w: int) -> tuple[int, int]:
        """h', w' of τ∘z: max(1, round(scale · h)) and so w', the two swapped by an odd number of turns."""
        height, width = max(1, round(self.scale * h)), max(1, round(self.scale * w))
        return (width, height) if self.quarter_turns % 2 else (height, width)

    def of_latents(self, z: Tensor) -> Tensor:
        """τ∘z.  z [B,C,h,w] → [B,C,h',w']."""
        h, w = z.shape[-2:]
        return self.to_sides(z, *self.sides(h, w))

    def to_sides(self, images: Tensor, height: int, width: int) -> Tensor:
        """τ, but for the size that comes out: [B,C,H,W] → [B,C,height,width].

        Bilinear between the centres of pixels, and no filter before, as the authors have it.
        """
        wanted = (width, height) if self.quarter_turns % 2 else (height, width)
        if images.shape[-2:] != wanted:
            images = functional.interpolate(images, size=wanted, mode="bilinear", align_corners=False)
        return images.rot90(self.quarter_turns, dims=(-2, -1))

    def of_images(self, x: Tensor, *, latents: tuple[int, int]) -> Tensor:
        """τ∘x, what D(τ∘E(x)) is to give: f times as large as τ∘z, without gradient, at least fp32.

        For where scale · h is no whole number the factor is h'/h and not `scale`.  A loss between the two is EQ-VAE's
        (Kouzelis et al. 2025, section 3.2), whose gradient reaches decoder and encoder.

        x [B,3,H,W]; latents: h, w of z → [B,3,fh',fw'].  ValueError: x not of f·h by f·w pixels with a whole f.
        """
        factor = x.shape[-1] // latents[1]
        if [*x.shape[-2:]] != [factor * side for side in latents]:
            raise ValueError(
                f"images {list(x.shape)} of latents {list(latents)} came, a whole multiple of both is wanted"
            )
        exact = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        return self.to_sides(exact, *(factor * side for side in self.sides(*latents)))
