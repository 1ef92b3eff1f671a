"""Pipelines of small, untrained networks that know named classes, captions or both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from captions import WIDTH, write_text_encoder
from diffusers import UNet2DConditionModel
from small_pipe import small_pipe

from pipeline.class_conditional import ClassConditionalPipeline
from pipeline.config import DiffusionConfig
from pipeline.text import TextEncoder

NAMES = ["zero", "one", "two"]


def class_pipe(**kind: Any) -> Any:
    """Three named classes, 16×16 pixels."""
    pipe = small_pipe(diffusion=DiffusionConfig(**kind))
    pipe.register_to_config(class_names=NAMES)
    return pipe


def text_pipe(folder: Path, *, classes: bool = False) -> Any:
    """The same of a U-Net that reads captions, with classes beside them or without."""
    text = TextEncoder.load(write_text_encoder(folder))
    known = class_pipe()
    config = {**known.unet.config, "cross_attention_dim": WIDTH}
    if not classes:
        config["num_class_embeds"] = None
    torch.manual_seed(1)
    unet: Any = UNet2DConditionModel.from_config(config)
    given = {"tokenizer": text.tokenizer, "text_encoder": text.model}
    pipe = ClassConditionalPipeline(
        known.vae, unet.requires_grad_(False).eval(), known.scheduler, NAMES if classes else None, **given
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
