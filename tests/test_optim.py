"""Learning rates are what they are said to be."""

from __future__ import annotations

import math

import pytest
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from pipeline.optim import hidden_weights, learning_rate_at


@pytest.mark.parametrize(
    ("step", "schedule", "expected"),
    [
        (0, "constant", 0.1),
        (4, "constant", 0.5),
        (9, "constant", 1.0),
        (10, "constant", 1.0),
        (99, "constant", 1.0),
        (10, "cosine", 1.0),
        (55, "cosine", 0.5),
        (100, "cosine", 0.0),
        (10, "inverse_sqrt", 1.0),
        (40, "inverse_sqrt", 1.0),
        (90, "inverse_sqrt", (40 / 90) ** 0.5),
        (160, "inverse_sqrt", 0.5),
        (70, "cosine", 0.5 * (1 + math.cos(math.pi * 60 / 90))),
    ],
)
def test_learning_rate(step: int, schedule: str, expected: float) -> None:
    rate = learning_rate_at(step, peak=1.0, schedule=schedule, warmup_steps=10, total_steps=100, decay_start_steps=40)
    assert rate == pytest.approx(expected, abs=1e-12)


def test_learning_rate_without_warmup_starts_at_its_peak() -> None:
    assert learning_rate_at(0, peak=2.0, schedule="constant", warmup_steps=0, total_steps=10) == 2.0


def test_muon_takes_hidden_matrices_and_leaves_edges_embeddings_and_vectors() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        num_class_embeds=11,
    )
    hidden = hidden_weights(unet)
    left = {name for name, weight in unet.named_parameters() if weight not in hidden and weight.ndim > 1}
    assert left == {"conv_in.weight", "conv_out.weight", "class_embedding.weight"}
    assert all(weight.ndim in (2, 4) for weight in hidden)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1))
    hidden = hidden_weights(text)
    left = {name for name, weight in text.named_parameters() if weight not in hidden and weight.ndim > 1}
    assert {name.rpartition("embeddings.")[2] for name in left} == {
        "token_embedding.weight",
        "position_embedding.weight",
    }
