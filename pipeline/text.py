"""Captions → embeddings, as the stock StableDiffusionPipeline makes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from pipeline import files
from vae.model import state_sha256

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # one of these sets is wanted


class TextEncoder:
    """A frozen CLIP tokenizer and text model, of a folder that holds `tokenizer/` and `text_encoder/`."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        """Raises ValueError where the two don't fit each other."""
        self.tokenizer, self.model = tokenizer, model.requires_grad_(False).eval()
        self.num_tokens: int = tokenizer.model_max_length  # L
        self.width: int = model.config.hidden_size  # D
        most, words = model.config.max_position_embeddings, model.config.vocab_size
        if self.num_tokens > most or len(tokenizer) > words:
            raise ValueError(
                f"a tokenizer of {len(tokenizer)} words and captions of {self.num_tokens} tokens came, the text "
                f"encoder knows {words} words and {most} tokens"
            )

    @classmethod
    def load(cls, folder: str | Path) -> TextEncoder:
        """Open a folder, fp32 on the CPU.  OSError: something is not there; ValueError: it is no such model."""
        from transformers import CLIPTextModel
        from transformers import CLIPTokenizerFast as Tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        from transformers.utils import logging

        logging.disable_progress_bar()  # two seconds for the largest
        words, model = Path(folder) / "tokenizer", Path(folder) / "text_encoder"
        for part, wanted in ((words, "tokenizer_config.json"), (model, "config.json")):
            if not (part / wanted).is_file():
                raise FileNotFoundError(f"{part} has no {wanted}; a folder with tokenizer/ and text_encoder/ is wanted")
        if not any(all((words / name).is_file() for name in names) for names in TOKENIZER_FILES):
            # transformers would make a tokenizer of two words
            raise FileNotFoundError(f"{words} has neither tokenizer.json nor vocab.json and merges.txt")
        kind = files.read_json(model / "config.json").get("model_type")
        if kind not in ("clip_text_model", "clip"):
            raise ValueError(f"{model} is of type {kind!r}, a CLIP text model is wanted")
        opened: Any = CLIPTextModel.from_pretrained(
            str(model),
            local_files_only=True,
            dtype=torch.float32,
            use_safetensors=True,  # a pickle may run code when it is opened
            output_loading_info=True,
        )
        encoder, loaded = opened
        if missing := sorted(loaded["missing_keys"]) or sorted(loaded["mismatched_keys"]):  # transformers only warns
            raise ValueError(f"the weights in {model} don't fit the config.json beside them: {missing[:3]}")
        return cls(Tokenizer.from_pretrained(str(words), local_files_only=True), encoder)

    def to(self, device: torch.device) -> TextEncoder:
        """Move the weights."""
        Module.to(self.model, device)
        return self

    def encode(self, captions: Sequence[str]) -> Tensor:
        """B captions → float32 [B,L,D]: the last hidden state, padded to L tokens, longer captions cut off."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=self.num_tokens, truncation=True, return_tensors="pt"
        )
        # Padding is seen, unless the model's own config says otherwise: so do the stock pipelines.
        masked = getattr(self.model.config, "use_attention_mask", False)
        device = next(self.model.parameters()).device
        with torch.no_grad():
            return self.model(
                tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device) if masked else None
            )[0].float()

    def num_truncated(self, captions: Sequence[str]) -> int:
        """How many of the captions have more tokens than are encoded."""
        ids = self.tokenizer(list(captions), verbose=False).input_ids
        return sum(len(of_caption) > self.num_tokens for of_caption in ids)

    def sha256(self) -> str:
        """Of the weights, and of all that the tokenizer does; the same from any file format."""
        weights = {name.removeprefix("text_model."): weight for name, weight in self.model.state_dict().items()}
        rules = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"]
        special = [self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token]
        told = [self.tokenizer.get_vocab(), rules["merges"], special, self.num_tokens]
        return files.fingerprint([state_sha256(weights), told])
