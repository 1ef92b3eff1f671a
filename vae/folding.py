"""Normalised latents as an autoencoder of their own: z' = (z - mean) / std, folded into its two 1×1 convolutions.

Latent channels differ in mean and spread, and a stock pipeline knows one `scaling_factor` for all of them.  The map is
affine, and so are the last layer before z and the first after it: the folded autoencoder gives and takes z' itself, in
any program that opens diffusers folders, at no cost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn


def fold_normalisation(
    vae: AutoencoderKL, mean: float | Sequence[float], std: float | Sequence[float]
) -> AutoencoderKL:
    """Another autoencoder, whose latents are z' = (z - mean) / std and whose images are the same.

    mean, std: of each latent channel (`vae.moments.MomentStatistics.channel_mean` and `channel_std`), or one number for
    all.  The posterior N(m, exp(v)) becomes N((m - mean) / std, exp(v - 2 ln std)): exact, but that diffusers clips ln
    variances to [-30, 20], which are those of z' here.  `decode(z')` is what `decode(z)` was.  Where there was no
    `quant_conv` or `post_quant_conv` (use_quant_conv: false) there is one now.  Float64, rounded to vae's dtype.

    The result has dtype, device, mode and frozen weights as vae has, `scaling_factor` 1 and no shift: z' is what the
    diffusion model sees.  Its weights are others, so latents of vae are not latents of it; vae stays as it was.

    Raises ValueError: another number of channels, a mean that is not finite, a std that is not finite and above 0.
    """
    channels = int(vae.config["latent_channels"])
    shift, scale = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
    if not (scale > 0).all():
        raise ValueError(f"std {scale.tolist()} came, numbers above 0 are wanted")
    folded = copy.deepcopy(vae)
    like = next(vae.parameters())

    weight, bias = _affine(vae.quant_conv, 2 * channels)
    # Rows of mean, then of logvar: the first are shifted and divided, of the others only the bias moves.
    divisor = torch.cat([scale, torch.ones_like(scale)])
    weight, bias = weight / divisor[:, None], torch.cat([(bias[:channels] - shift) / scale, bias[channels:]])
    bias[channels:] -= 2 * scale.log()
    folded.quant_conv = _convolution(weight, bias, like)

    weight, bias = _affine(vae.post_quant_conv, channels)
    folded.post_quant_conv = _convolution(weight * scale, bias + weight @ shift, like)  # of z = scale z' + shift

    folded.register_to_config(
        use_quant_conv=True,
        use_post_quant_conv=True,
        scaling_factor=1.0,
        shift_factor=None,
        latents_mean=None,
        latents_std=None,
    )
    return folded


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> Tensor:
    """Float64 [C] on the CPU."""
    values = [value] * channels if isinstance(value, (int, float)) else list(value)
    if len(values) != channels or not all(math.isfinite(each) for each in values):
        raise ValueError(f"{name} {values} came, {channels} finite numbers are wanted, one per latent channel")
    return torch.tensor(values, dtype=torch.float64)


def _affine(convolution: nn.Conv2d | None, channels: int) -> tuple[Tensor, Tensor]:
    """Weight [out,in] and bias [out] of a 1×1 convolution, float64 on the CPU; where there is none, the identity's."""
    if convolution is None:
        return torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    weight = convolution.weight.detach().to("cpu", torch.float64).flatten(1)
    if convolution.bias is None:
        return weight, torch.zeros(len(weight), dtype=torch.float64)
    return weight, convolution.bias.detach().to("cpu", torch.float64)


def _convolution(weight: Tensor, bias: Tensor, like: nn.Parameter) -> nn.Conv2d:
    """The 1×1 convolution with these [out,in] and [out], on the device and of the dtype of `like`, frozen as it is."""
    made = nn.Conv2d(weight.shape[1], weight.shape[0], 1, device="meta")  # draws nothing
    made.weight = nn.Parameter(weight[:, :, None, None].to(like.device, like.dtype), like.requires_grad)
    made.bias = nn.Parameter(bias.to(like.device, like.dtype), like.requires_grad)
    return made
