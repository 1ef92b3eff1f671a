"""Averages and learning rates are the functions they are said to be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipeline.ema import Ema
from pipeline.optim import build_adamw, learning_rate_at


def test_ema_is_the_weighted_sum_of_all_weights() -> None:
    model = nn.Linear(3, 2).double()
    ema = Ema(model, (0.5, 0.9))
    history = [model.weight.detach().clone()]
    for n in range(30):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64))
        history.append(model.weight.detach().clone())
        ema.update(model.float(), n)
        model.double()
    for decay in (0.5, 0.9):
        expected = history[0]
        for n, weight in enumerate(history[1:]):
            d = min(decay, (1 + n) / (10 + n))
            expected = d * expected + (1 - d) * weight
        shadow = ema.state()[f"decay-{decay}"]["weight"]
        assert shadow.dtype == torch.float32
        torch.testing.assert_close(shadow.double(), expected, rtol=1e-5, atol=1e-6)


def test_ema_of_weights_that_stand_still_is_the_weights() -> None:
    model = nn.Linear(4, 4)
    ema = Ema(model, (0.9999,))
    for n in range(10):
        ema.update(model, n)
    torch.testing.assert_close(ema.state()["decay-0.9999"]["weight"], model.weight.detach())


def test_ema_leaves_the_model_alone() -> None:
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    ema = Ema(model, (0.5,))
    with torch.no_grad():
        model.weight.add_(1)
    ema.update(model, 100)
    assert torch.equal(model.weight.detach(), before + 1)
    torch.testing.assert_close(ema.state()["decay-0.5"]["weight"], before + 0.5)


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4))
    optimizer = build_adamw(model, learning_rate=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model[0].weight), id(model[2].weight)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


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
        (70, "cosine", 0.5 * (1 + math.cos(math.pi * 60 / 90))),
    ],
)
def test_learning_rate(step: int, schedule: str, expected: float) -> None:
    rate = learning_rate_at(step, peak=1.0, schedule=schedule, warmup_steps=10, total_steps=100)
    assert rate == pytest.approx(expected, abs=1e-12)


def test_learning_rate_without_warmup_starts_at_its_peak() -> None:
    assert learning_rate_at(0, peak=2.0, schedule="constant", warmup_steps=0, total_steps=10) == 2.0
