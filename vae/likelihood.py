"""What an image costs under the autoencoder and a density of its latents together: the bound on -ln P(x) in pixels.

    -ln P(x) ≤ E_q[-ln P(x|z)] + E_q[-ln p(z)] - H(q(z|x)),  q = q(z|x): Kingma & Welling 2014 eq. 2 and 3

Its three parts come apart: the first from the decoder, the second from the diffusion model, the last from the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy.optimize import minimize_scalar
from torch import Tensor

from vae.moments import LatentScale


def posterior_entropy(moments: Tensor) -> Tensor:
    """H(q(z|x)) = ½ (ln 2πe + logvar), the mean over the elements of z: Kingma & Welling 2014, appendix B.

    moments [B,2C,h,w], mean ‖ logvar → float64 [B], nats per element of z.  Below 0 where q is narrow: a density.

    Raises ValueError: moments not [B,2C,h,w].
    """
    if moments.ndim != 4 or moments.shape[1] % 2:
        raise ValueError(f"moments {list(moments.shape)} came, [B,2C,h,w] are wanted")
    _, logvar = moments.double().chunk(2, dim=1)
    return 0.5 * (math.log(2 * math.pi) + 1 + logvar.mean(dim=(1, 2, 3)))


def autoencoder_nll(nll: Tensor, latent_scale: LatentScale) -> Tensor:
    """-ln p(z_0) → -ln p(z), z_0 = (z - shift)·scale: p(z) = p(z_0) scale^D.  Nats per element, any shape, float64."""
    return nll.double() - math.log(latent_scale.scale)


def mean_square_log_variance(x_hat: Tensor, x: Tensor) -> float:
    """ln of the mean square error, over all elements: the most likely ln σ² of a decoder N(x; x_hat, σ²).

    Raises ValueError: shapes that differ, or no error at all, for which no σ² is the most likely.
    """
    if x_hat.shape != x.shape:
        raise ValueError(f"reconstruction {list(x_hat.shape)} came, {list(x.shape)} is wanted")
    mean_square = float((x_hat.double() - x.double()).square().mean())
    if not (math.isfinite(mean_square) and mean_square > 0):
        raise ValueError(f"a mean square error of {mean_square} came, a finite number above 0 is wanted")
    return math.log(mean_square)


def fit_log_variance(mean_nll: Callable[[float], float], near: float) -> float:
    """The ln σ² at which a decoder with one variance for all pixels costs the least, to 1e-6.

    mean_nll: ln σ² → the mean over all pixels of -ln P(x|z), with one minimum.  near: `mean_square_log_variance`.
    For levels the best σ² is smaller by about the square of their step / 12 (Sheppard 1898), which is the mean square
    of what rounding did to x: no difference in practice, but for a decoder with errors of less than one level.  Looked
    for from e^-8 to e^2 of near.  Any σ² gives a bound; fit it on other images than those that it's told of.

    Raises ValueError: near not finite.
    """
    if not math.isfinite(near):
        raise ValueError(f"near = {near} came, a finite ln of a variance is wanted")
    found = minimize_scalar(mean_nll, bounds=(near - 8, near + 2), method="bounded", options={"xatol": 1e-6})
    return float(found.x)


@dataclass(frozen=True, eq=False)
class PixelBound:
    """The bound on -ln P(x) of each image, and its parts.  Float64 [B], nats per element of x (C·H·W of them)."""

    decoder: Tensor  # E_q[-ln P(x|z)]
    latent: Tensor  # E_q[-ln p(z)]
    entropy: Tensor  # H(q(z|x))

    @property
    def total(self) -> Tensor:
        """decoder + latent - entropy; latent - entropy is the KL of the posterior from the density of latents."""
        return self.decoder + self.latent - self.entropy

    @property
    def total_bits(self) -> Tensor:
        """Bits/dim: of 8-bit pixels where `decoder` counts levels, and then at least 0."""
        return self.total / math.log(2)


def pixel_bound(decoder: Tensor, latent: Tensor, entropy: Tensor, *, pixels: int, latents: int) -> PixelBound:
    """The bound of whole images from parts that are each per own element.

    decoder [B]: -ln P(x|z) in nats per element of x, z ~ q(z|x) (or its mean over several); latent [B]: -ln p(z), or a
    bound on it, in nats per element of z, of the autoencoder's own z (`autoencoder_nll`), the same draws;
    entropy [B]: `posterior_entropy`.  pixels = C·H·W of x, latents = C·h·w of z.

    Raises ValueError: shapes that differ, pixels or latents below 1.
    """
    if not (decoder.ndim == 1 and decoder.shape == latent.shape == entropy.shape):
        came = f"{list(decoder.shape)}, {list(latent.shape)} and {list(entropy.shape)}"
        raise ValueError(f"decoder, latent and entropy of shapes {came} came, one shape [B] is wanted")
    if pixels < 1 or latents < 1:
        raise ValueError(f"pixels={pixels} and latents={latents} came, numbers of at least 1 are wanted")
    share = latents / pixels
    return PixelBound(decoder.double(), share * latent.double(), share * entropy.double())
