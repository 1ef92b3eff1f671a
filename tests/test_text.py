"""Captions become what the stock pipeline makes of them, or the folder is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captions import CAPTIONS, NUM_TOKENS, WIDTH, write_text_encoder

from pipeline.text import TextEncoders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("text") / "clip")


LONG = " ".join(CAPTIONS)


def stock(encoder: TextEncoders, captions: list[str]) -> Any:
    """encode_prompt of StableDiffusionPipeline, of which only the text parts are there."""
    from diffusers import StableDiffusionPipeline

    class OnlyText(StableDiffusionPipeline):
        def __init__(self) -> None:
            self.register_modules(text_encoder=encoder.models[0], tokenizer=encoder.words.each[0], unet=None)

    return OnlyText().encode_prompt(captions, "cpu", 1, False)[0]


def test_it_is_what_the_stock_pipeline_makes(folder: Path) -> None:
    encoder = TextEncoders.load(folder)
    captions = [*CAPTIONS, "", LONG, "words unknown, ÄÖ 猫"]
    made = encoder.encode(captions).tokens
    assert made is not None
    assert made.shape == (len(captions), NUM_TOKENS, WIDTH) and made.dtype == torch.float32
    assert torch.equal(made, stock(encoder, captions).detach())


def test_long_captions_are_counted(folder: Path) -> None:
    encoder = TextEncoders.load(folder)
    assert encoder.words.num_truncated(CAPTIONS) == 0
    assert encoder.words.num_truncated([LONG, "a cat", LONG + LONG]) == 2


def test_the_hash_knows_weights_and_words(folder: Path, tmp_path: Path) -> None:
    known = TextEncoders.load(folder).sha256()
    assert TextEncoders.load(folder).sha256() == known
    other = write_text_encoder(tmp_path / "other", seed=1)
    assert TextEncoders.load(other).sha256() != known
    shutil.rmtree(other / "tokenizer")
    shutil.copytree(folder / "tokenizer", other / "tokenizer")
    shutil.rmtree(other / "text_encoder")
    shutil.copytree(folder / "text_encoder", other / "text_encoder")
    assert TextEncoders.load(other).sha256() == known
    # the layout of the first stable-diffusion folders
    (other / "tokenizer" / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / name, other / "tokenizer" / name)
    assert TextEncoders.load(other).sha256() == known


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), r"tokenizer has no tokenizer_config\.json"),
    "no words": (
        lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(),
        r"tokenizer has neither tokenizer\.json nor vocab\.json and merges\.txt",
    ),
    "no model": (lambda folder: shutil.rmtree(folder / "text_encoder"), r"text_encoder has no config\.json"),
    "another kind": (
        lambda folder: change_json(folder / "text_encoder" / "config.json", model_type="t5"),
        "is of type 't5', a CLIP text model is wanted",
    ),
    "no weights": (lambda folder: (folder / "text_encoder" / "model.safetensors").unlink(), "model.safetensors"),
    "other weights": (
        lambda folder: change_json(folder / "text_encoder" / "config.json", num_hidden_layers=3),
        r"don't fit the config\.json beside them",
    ),
    "a mask": (
        lambda folder: change_json(folder / "text_encoder" / "config.json", use_attention_mask=True),
        "says use_attention_mask",
    ),
    "long captions": (
        lambda folder: change_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=77),
        "captions of 77 tokens came, the text encoder knows [0-9]+ words and 12 tokens",
    ),
}


@pytest.mark.parametrize(("broken", "said"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_folder_is_refused(folder: Path, tmp_path: Path, broken: Callable[[Path], object], said: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    broken(copy)
    with pytest.raises((OSError, ValueError), match=said):
        TextEncoders.load(copy)
