"""Every strategy trains as DDP on one rank does, changes no weight in a bad step, and goes on from any other."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from strategy_runs import STRATEGIES, Leg, Runs, largest

from pipeline.strategies.precision import GROWTH_INTERVAL_STEPS, LossScale, scaled

SEED = os.environ.get("SEED", "0")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_as_one_and_drop_a_step_that_is_not_finite(runs: Runs, strategy: str) -> None:
    """Only rank 1 sees what is not finite; its loss in some runs, a gradient behind a good loss in others."""
    what = random.Random(f"{SEED} {strategy}").choice(["loss", "gradient"])
    alone = runs.of(Leg("ddp", 1, 3))
    found = runs.of(Leg(strategy, 2, 4, poison=(3, what)))
    for a, b in zip(found["losses"][:3], alone["losses"], strict=True):
        assert abs(a - b) <= 1e-6 * b
    for (norm, finite, skipped), (wanted, _, _) in zip(found["reports"][:3], alone["reports"], strict=True):
        assert abs(norm - wanted) <= 1e-5 * wanted and finite and not skipped
    assert found["reports"][3][1:] == (False, False)
    assert found["num_updates"] == 3
    assert largest(found["weights"], alone["weights"]) <= 1e-6
    assert largest(found["ema"], alone["ema"]) <= 1e-6
    for moment in ("exp_avg", "exp_avg_sq"):
        assert largest(found["moments"][moment], alone["moments"][moment]) <= 1e-6


def test_a_run_may_change_strategy_and_ranks_at_every_checkpoint(runs: Runs) -> None:
    """Through all five, in an order drawn by the seed, against DDP in one go; what was before a load is forgotten."""
    order = random.Random(SEED).sample(STRATEGIES, len(STRATEGIES))
    alone = runs.of(Leg("ddp", 1, 2 * len(order)))
    losses: list[float] = []
    came_from: Path | None = None
    for i, strategy in enumerate(order):
        leg = Leg(strategy, 1 + i % 2, 2, start=2 * i, load=came_from, detour=1)
        found = runs.of(leg)
        losses += found["losses"]
        came_from = runs.path(leg)
    assert max(abs(a - b) / b for a, b in zip(losses, alone["losses"], strict=True)) <= 1e-6, order
    assert largest(found["ema"], alone["ema"]) <= 1e-6
    assert found["num_updates"] == 2 * len(order)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_fp16_skips_overflows_and_lowers_the_scale(runs: Runs, strategy: str) -> None:
    """From a scale that is far too high: nothing changes until it is low enough."""
    leg = Leg(strategy, 1, 8, precision="fp16", scale=2.0**24)
    found = runs.of(leg)
    skipped = [report[2] for report in found["reports"]]
    num_skipped = sum(skipped)
    assert skipped == sorted(skipped, reverse=True) and 1 <= num_skipped < 8
    assert all(finite for _, finite, _ in found["reports"])
    assert found["num_updates"] == 8 - num_skipped
    assert found["scaler"] == {"scale": 2.0 ** (24 - num_skipped), "good_steps": 8.0 - num_skipped}
    until_then = runs.of(replace(leg, steps=num_skipped))
    at_start = runs.of(replace(leg, steps=0))
    assert largest(until_then["weights"], at_start["weights"]) == 0
    assert until_then["num_updates"] == 0


def test_the_loss_scale_grows_after_enough_good_steps_and_ends_at_one() -> None:
    scale = LossScale(torch.device("cpu"))
    first, good, bad = scale.state()["scale"], torch.tensor(False), torch.tensor(True)
    for _ in range(GROWTH_INTERVAL_STEPS - 1):
        assert not scale.update(good)
    assert scale.state() == {"scale": first, "good_steps": GROWTH_INTERVAL_STEPS - 1}
    scale.update(good)
    assert scale.state() == {"scale": 2 * first, "good_steps": 0}
    scale.update(good)
    mendable = [bool(scale.update(bad)) for _ in range(20)]
    assert mendable == [True] * 17 + [False] * 3  # at 1 a smaller scale mends nothing
    assert scale.state() == {"scale": 1, "good_steps": 0}


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_has_no_gradient_to_trust(value: float) -> None:
    weight = torch.ones(3, requires_grad=True)
    scaled(weight.sum() + value, None).backward()
    assert weight.grad is not None and weight.grad.isnan().all()
