"""One training step of the autoencoder: images to reconstruction and moments, those to a loss."""

from __future__ import annotations

from typing import NamedTuple

from diffusers import AutoencoderKL
from torch import Tensor, nn

from vae.config import VaeTrainConfig
from vae.losses import kl_divergence, reconstruction_loss
from vae.moments import encode_moments, sample_posterior


class AutoencoderOutput(NamedTuple):
    """What a forward pass gives."""

    x_hat: Tensor  # [B,3,H,W] in units of [-1,1]
    moments: Tensor  # [B,2C,h,w], mean ‖ logvar


class AutoencoderStep(nn.Module):
    """Encoder, posterior draw and decoder as one forward pass.

    Wrappers for several ranks reduce only the gradients of what ran through the wrapped module's own forward, so
    training never calls the autoencoder beside it.
    """

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: Tensor, noise: Tensor) -> AutoencoderOutput:
        """x [B,3,H,W] in [-1,1]; noise [B,C,h,w] from N(0, I), which the caller draws by (seed, position).

        z is drawn in fp32 and decoded in x's dtype, which is that of weights kept in bf16.
        """
        moments = encode_moments(self.autoencoder, x)
        z = sample_posterior(moments, noise)
        decoded = self.autoencoder.decode(z.to(x.dtype))  # pyright: ignore[reportArgumentType]
        return AutoencoderOutput(decoded.sample, moments)  # pyright: ignore[reportAttributeAccessIssue]


def autoencoder_loss(output: AutoencoderOutput, x: Tensor, config: VaeTrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """reconstruction + kl_weight · KL: Rombach et al. 2022, eq. 25, without the adversary.

    The reconstruction error is a mean over pixel channels and the KL one over latent elements (in nats), so a
    weight means the same at any batch and image size.  Elsewhere the KL is summed over a latent: a weight w of
    diffusers (mean reconstruction) is kl_weight = w · Chw here, one of CompVis (summed) w · Chw / 3HW.

    x [B,3,H,W] in [-1,1] → the mean over the batch, and detached parts: `reconstruction`, `kl_nats_per_element`.
    """
    reconstruction = reconstruction_loss(output.x_hat, x, config.reconstruction).mean()
    num_elements = output.moments[0].numel() // 2  # Chw
    kl = kl_divergence(output.moments).mean() / num_elements
    parts = {"reconstruction": reconstruction.detach(), "kl_nats_per_element": kl.detach()}
    return reconstruction + config.kl_weight * kl, parts
