"""How well the autoencoder gives images back."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from vae.moments import downsampling_factor, encode_moments


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """x_hat from the posterior's mean, so without chance.  x, x_hat [B,3,H,W], x in [-1,1]; in the weights' dtype."""
    mean, _ = encode_moments(vae, x.to(vae.dtype)).chunk(2, dim=1)  # [B,C,h,w]
    return vae.decode(mean.to(vae.dtype)).sample.float()  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image: 10 · log10(2² / mean square error), the peak being 1 - (-1).

    x_hat, x [B,3,H,W], cut to [-1,1] first, as they are when a picture is saved → [B] in dB; infinite where equal.
    """
    if x_hat.shape != x.shape:
        raise ValueError(f"reconstruction {list(x_hat.shape)} came, {list(x.shape)} is wanted")
    return peak_signal_noise_ratio(x_hat, x, data_range=(-1.0, 1.0), reduction="none", dim=(1, 2, 3))


def absolute_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean |x_hat - x| of each image, in levels of 0..255: units of [-1,1] times 127.5.

    x_hat, x [B,3,H,W], cut to [-1,1] first → float64 [B].
    """
    if x_hat.shape != x.shape:
        raise ValueError(f"reconstruction {list(x_hat.shape)} came, {list(x.shape)} is wanted")
    return 127.5 * (_cut(x_hat).double() - _cut(x).double()).abs().mean(dim=(1, 2, 3))


def ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004, eq. 13), the mean over its pixels and channels.

    Windows are Gaussians of `ssim_window` pixels, beyond the border of the image mirrored; K1 = 0.01, K2 = 0.03.

    x_hat, x [B,3,H,W], cut to [-1,1] first → float64 [B], at most 1.  ValueError: other shapes, a side below 3 pixels.
    """
    if x_hat.shape != x.shape:
        raise ValueError(f"reconstruction {list(x_hat.shape)} came, {list(x.shape)} is wanted")
    _, sigma = ssim_window(min(x.shape[-2:]))
    both = x_hat.double(), x.double()
    found = structural_similarity_index_measure(*both, sigma=sigma, reduction="none", data_range=(-1.0, 1.0))
    assert isinstance(found, Tensor)  # a pair only where more is asked for
    return found


def ssim_window(side: int) -> tuple[int, float]:
    """The window's side and its Gaussian's standard deviation, pixels: 11 and 1.5, the authors' own, where it fits.

    In smaller images the largest odd number that does, and the same Gaussian in proportion.  ValueError: a side below
    3 pixels, which no window has.
    """
    if side < 3:
        raise ValueError(f"images with a side of {side} pixels came, at least 3 are wanted")
    radius = min(5, (side - 1) // 2)
    return 2 * radius + 1, 0.3 * radius  # torchmetrics makes of it the radius ⌊3.5 σ + ½⌋


def _cut(x: Tensor) -> Tensor:
    """To [-1,1], as a saved picture is."""
    return x.clamp(-1, 1)


# Large images in tiles ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SeamGradient:
    """Mean |difference of neighbours| in the lines where tiles meet, and in all others: units of what was looked at."""

    seams: float
    elsewhere: float

    @property
    def ratio(self) -> float:
        """seams / elsewhere: 1 where no tile shows, but for what the picture itself has there."""
        return self.seams / self.elsewhere


@dataclass(frozen=True)
class TilingSeams:
    """Seams that tiles leave in an image decoded and in latents encoded by parts, beside those of the whole."""

    decoded: SeamGradient  # of x_hat in [-1,1] units, across the seams' lines
    decoded_whole: SeamGradient  # the same lines of x_hat decoded in one piece: what the picture has there
    encoded: SeamGradient  # of the posterior's mean
    encoded_whole: SeamGradient
    decoded_error: float  # root mean square of tiled less whole
    encoded_error: float


@torch.no_grad()
def tiling_seams(vae: AutoencoderKL, x: Tensor, *, tile_pixels: int, overlap: float) -> TilingSeams:
    """How much diffusers' `enable_tiling` shows: the gradient across tile seams against elsewhere.

    A tile is normalised by statistics of its own (GroupNorm), pads at its own border and attends within itself, so
    neighbours disagree; overlap · tile_pixels are blended linearly, which spreads a step over as many lines.  What no
    seam shows may still be another image: the errors say how far it is from the one made whole.

    x [B,3,H,W] in [-1,1], larger than a tile; tile_pixels: side of a tile; overlap: share of it that neighbours have in
    common, below a half (beyond it no line is elsewhere).  vae comes back with the tiling that it had.

    Raises ValueError: an overlap outside [0, 0.5); sides of x that are no multiples of f = H/h; tiles not larger than f
    or not smaller than x; a tile or its overlap that is no whole number of latents, for diffusers then sets tiles down
    in places that don't fit, and the result has another size.
    """
    if not 0 <= overlap < 0.5:
        raise ValueError(f"overlap={overlap} came, 0 or more and below 0.5 is wanted")
    factor = downsampling_factor(vae)
    if not factor < tile_pixels < max(x.shape[-2:]) or any(side % factor for side in x.shape[-2:]):
        came = f"tiles of {tile_pixels} pixels in images {list(x.shape)}"
        raise ValueError(f"{came} came, larger ones than {factor} in larger images, multiples of it, are wanted")
    latents = tile_pixels // factor
    blend = int(latents * overlap)
    step = latents - blend
    # Where diffusers lets tiles begin (in latents, in pixels) and how much it blends, each rounded down by itself.
    cuts = int(latents * (1 - overlap)), int(tile_pixels * (1 - overlap)), int(tile_pixels * overlap)
    if factor * latents != tile_pixels or cuts != (step, factor * step, factor * blend):
        raise ValueError(f"{overlap} of {tile_pixels} pixels came, both whole multiples of {factor} pixels are wanted")

    whole, _ = encode_moments(vae, x).chunk(2, dim=1)
    x_hat = reconstruct(vae, x)
    with _tiles(vae, tile_pixels, latents, overlap):
        parts, _ = encode_moments(vae, x).chunk(2, dim=1)
        pieced = vae.decode(whole).sample.float()  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    return TilingSeams(
        decoded=seam_gradient(pieced, factor * step, factor * blend),
        decoded_whole=seam_gradient(x_hat, factor * step, factor * blend),
        encoded=seam_gradient(parts, step, blend),
        encoded_whole=seam_gradient(whole, step, blend),
        decoded_error=float((pieced - x_hat).square().mean().sqrt()),
        encoded_error=float((parts - whole).square().mean().sqrt()),
    )


def seam_gradient(images: Tensor, step: int, blend: int) -> SeamGradient:
    """Mean |difference of neighbours| of images [B,C,H,W] whose tiles begin at each multiple of step.

    A seam: the line before a tile's first row or column where nothing is blended; else the `blend` lines after it,
    for the first row is still all of the tile before.  Both directions; float64.

    Raises ValueError: a blend that is not below step, images of no seam.
    """
    if not 0 <= blend < step:
        raise ValueError(f"step={step} and blend={blend} came, 0 ≤ blend < step is wanted")
    if max(images.shape[-2:]) <= step:
        raise ValueError(f"images {list(images.shape)} came, larger ones than {step} are wanted")
    at_seams: list[Tensor] = []
    elsewhere: list[Tensor] = []
    for dim in (-2, -1):
        gradient = images.double().diff(dim=dim).abs().movedim(dim, 0)  # line k lies between k and k + 1
        line = torch.arange(len(gradient), device=images.device)
        place = line % step  # 0: between a tile's first and second
        seam = (line >= step) & (place < blend) if blend else place == step - 1
        at_seams.append(gradient[seam].flatten())
        elsewhere.append(gradient[~seam].flatten())
    return SeamGradient(float(torch.cat(at_seams).mean()), float(torch.cat(elsewhere).mean()))


@contextmanager
def _tiles(vae: AutoencoderKL, pixels: int, latents: int, overlap: float) -> Generator[None]:
    """diffusers' tiling with tiles of this size and overlap; afterwards the one that was."""
    wanted = {
        "use_tiling": True,
        "tile_sample_min_size": pixels,
        "tile_latent_min_size": latents,
        "tile_overlap_factor": overlap,
    }
    before = {name: getattr(vae, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(vae, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
