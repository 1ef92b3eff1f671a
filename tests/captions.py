"""A tiny CLIP, trained tokenizer and all: what a stable-diffusion folder holds, made in a second."""

from __future__ import annotations

from pathlib import Path

import torch

CAPTIONS = ["a cat", "a dog beside a cat", "the digit seven", "two wooden houses", "zero one two three four five six"]
NUM_TOKENS, WIDTH = 12, 8


def write_text_encoder(folder: Path, seed: int = 0) -> Path:
    """FOLDER/tokenizer and FOLDER/text_encoder."""
    from tokenizers import CharBPETokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    begin, end = "<|startoftext|>", "<|endoftext|>"
    words = CharBPETokenizer(suffix="</w>", unk_token=end)
    words.train_from_iterator(
        CAPTIONS, vocab_size=120, min_frequency=1, special_tokens=[begin, end], suffix="</w>", show_progress=False
    )
    folder.mkdir(parents=True)
    words.save_model(str(folder))
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=NUM_TOKENS
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=NUM_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder
