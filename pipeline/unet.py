"""Config → UNet2DConditionModel."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from pipeline.config import ConditioningConfig, UnetConfig
from pipeline.data.draws import Purpose, integer_seed


def build_unet(
    config: UnetConfig,
    conditioning: ConditioningConfig,
    latent_shape: tuple[int, int, int],
    seed: int,
    *,
    learned_variance: bool = False,
) -> UNet2DConditionModel:
    """A U-Net over latents (C, h, w), its weights a function of the seed, the global generator left as it was.

    It has C output channels, with a learned variance 2C: the prediction, then the variance.
    """
    channels, height, width = latent_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer_seed(seed, Purpose.INITIAL_WEIGHTS, 0))
        return UNet2DConditionModel(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            out_channels=2 * channels if learned_variance else channels,
            num_class_embeds=conditioning.num_classes + 1,  # the last one is the null class
            dropout=0.0,  # the network draws nothing
            **config.model_dump(),
        )
