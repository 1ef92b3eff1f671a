"""Config → UNet2DConditionModel, with random weights or pretrained ones."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from pipeline import pretrained
from pipeline.config import ConditioningConfig, UnetConfig
from pipeline.data.draws import Purpose, integer_seed
from pipeline.pretrained import Arguments, Pretrained


def build_unet(
    config: UnetConfig,
    conditioning: ConditioningConfig | None,
    latent_shape: tuple[int, int, int],
    seed: int,
    *,
    learned_variance: bool = False,
    start: Pretrained | None = None,
    condition_channels: int = 0,
) -> UNet2DConditionModel:
    """A U-Net over latents (C, h, w), its weights a function of the seed, the global generator left as it was.

    It has C + `condition_channels` input channels, z_t first, and C output channels, with a learned variance 2C: the
    prediction, then the variance.  `conditioning`: None for condition tokens alone, without a class embedding.
    `start`: the network that it begins as, instead of random weights (see `pretrained.fit`); the config must be the
    resolved one.  Raises ValueError where that can't be.
    """
    channels, height, width = latent_shape
    num_class_embeds = None
    if conditioning is not None and config.class_embedding:
        num_class_embeds = conditioning.num_classes + 1  # the last one is the null class
    given: Arguments = {
        "sample_size": height if height == width else (height, width),
        "dropout": 0.0,  # the network draws nothing
    }
    if start is not None:
        arguments, weights = pretrained.fit(
            start,
            in_channels=channels + condition_channels,
            channels=channels,
            learned_variance=learned_variance,
            num_class_embeds=num_class_embeds,
        )
        with torch.device("meta"):
            unet = UNet2DConditionModel(**arguments | given)
        unet.load_state_dict(weights, assign=True)
        return unet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer_seed(seed, Purpose.INITIAL_WEIGHTS, 0))
        return UNet2DConditionModel(
            in_channels=channels + condition_channels,
            out_channels=2 * channels if learned_variance else channels,
            num_class_embeds=num_class_embeds,
            **given,
            **config.shape,
        )
