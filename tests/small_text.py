"""A pipeline of small, untrained networks that reads captions, and classes too where wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from captions import WIDTH, write_text_encoder
from small_pipe import small_pipe

from pipeline.class_conditional import ClassConditionalPipeline


def small_text_pipe(folder: Path, classes: bool = False) -> Any:
    """FOLDER: where the text encoder is made."""
    from transformers import CLIPTextModel, CLIPTokenizer

    pipe = small_pipe()
    unet = pipe.unet
    if not classes:
        kept = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        unet = type(unet)(**{**kept, "num_class_embeds": None, "cross_attention_dim": WIDTH})
        unet.requires_grad_(False).eval()
    made = write_text_encoder(folder)
    text = ClassConditionalPipeline(
        pipe.vae,
        unet,
        pipe.scheduler,
        ["cat", "dog", "House, Wooden"] if classes else None,
        tokenizer=CLIPTokenizer.from_pretrained(made / "tokenizer"),
        text_encoder=CLIPTextModel.from_pretrained(made / "text_encoder"),
    )
    text.set_progress_bar_config(disable=True)
    return text
