"""The autoencoder's forward pass in training: images to moments, a draw of them, and back."""

from __future__ import annotations

from typing import NamedTuple

from diffusers import AutoencoderKL
from torch import Tensor, nn

from vae.losses import SpatialTransform
from vae.moments import encode_moments, sample_posterior, upcast


class AutoencoderOutput(NamedTuple):
    """What a forward pass gives."""

    x_hat: Tensor  # [B,3,H,W] in units of [-1,1]; of another size after a transform
    moments: Tensor  # [B,2C,h,w], mean ‖ logvar


class AutoencoderStep(nn.Module):
    """Encoder, posterior draw and decoder as one forward pass.

    Wrappers for several ranks reduce only the gradients of what ran through the wrapped module's own forward, so
    training never calls the autoencoder beside it.
    """

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: Tensor, noise: Tensor, transform: SpatialTransform | None = None) -> AutoencoderOutput:
        """x [B,3,H,W] in [-1,1]; noise [B,C,h,w] from N(0, I); transform: what z goes through before it is decoded.

        The caller draws both by (seed, position).  z is drawn in fp32 and decoded in x's dtype, which is that of
        weights kept in bf16.
        """
        moments = encode_moments(self.autoencoder, x)
        z = sample_posterior(moments, noise)
        if transform is not None:
            z = transform.of_latents(z)
        with upcast(self.autoencoder, x.device.type):
            decoded = self.autoencoder.decode(z.to(x.dtype))  # pyright: ignore[reportArgumentType]
        return AutoencoderOutput(decoded.sample, moments)  # pyright: ignore[reportAttributeAccessIssue]
