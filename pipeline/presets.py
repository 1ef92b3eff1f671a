"""U-Nets by name: shapes of published models, in the words of diffusers' UNet2DConditionModel.

Data alone.  Every preset has the same keys; `None` is the shape where no preset is named.  Parameters are counted
without what the condition adds: a class embedding, in and out channels other than 4.
"""

from __future__ import annotations

from typing import Any

_STABLE_DIFFUSION: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 32,
    "class_embedding": True,
}

_LDM4: dict[str, Any] = {  # 400,924,036 parameters
    "block_out_channels": (192, 384, 576, 960),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 512,
    "use_linear_projection": False,
    "norm_num_groups": 32,
}

PRESETS: dict[str | None, dict[str, Any]] = {
    None: {
        "block_out_channels": (64, 128),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": 64,
        "use_linear_projection": False,
        "norm_num_groups": 32,
        "class_embedding": True,
    },
    # The shape of configs/digits_class.yaml.
    "digits": {
        "block_out_channels": (64, 96),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": 64,
        "use_linear_projection": False,
        "norm_num_groups": 8,
        "class_embedding": True,
    },
    # The shape of configs/imagenet256_class.yaml, which says why it has eight heads.
    "ldm4_class": {**_LDM4, "attention_head_dim": 8, "class_embedding": True},
    # As Rombach et al. 2022 have it, whose weights it fits: one head, the class as a token of the cross-attention.
    "ldm4_class_token": {**_LDM4, "attention_head_dim": 1, "class_embedding": False},
    # Stable Diffusion 1.1 to 1.5: 859,520,964 parameters, CLIP ViT-L/14's width.
    "sd15": {
        **_STABLE_DIFFUSION,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "use_linear_projection": False,
    },
    # Stable Diffusion 2: 865,910,724 parameters, OpenCLIP ViT-H/14's width, heads of 64 channels at every level.
    "sd2": {
        **_STABLE_DIFFUSION,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
}
