"""A run is saved under one strategy and number of ranks and goes on under another as if nothing had changed.

PAIRS=all runs every case; a number (default 12) that many, drawn by SEED (default 0).  `-rP` shows the differences.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from itertools import product

import pytest
from strategy_runs import HALF, STRATEGIES, Case, Leg, Runs, largest

PAIRS, SEED = os.environ.get("PAIRS", "12"), os.environ.get("SEED", "0")
RANKS = ((2, 1), (1, 2))


def every_case() -> list[Case]:
    """Each ordered pair at 2 → 1 and 1 → 2 ranks, each strategy at 2 → 2; then each other setting, changed or kept."""
    cases: list[Case] = []
    for precision in ("fp32", "bf16_weights"):
        pairs = [(a, b, *ranks) for a, b in product(STRATEGIES, STRATEGIES) for ranks in RANKS]
        pairs += [(strategy, strategy, 2, 2) for strategy in STRATEGIES]
        for a, b, before, after in pairs:
            cases.append(Case(Leg(a, before, HALF, precision=precision), Leg(b, after, HALF, precision=precision)))
    for i, strategy in enumerate(STRATEGIES):
        other = STRATEGIES[(i + 1) % len(STRATEGIES)]
        leg = Leg(strategy, 2, HALF)
        cases.append(Case(leg, replace(leg, micro_batches=4)))
        cases.append(Case(leg, replace(leg, checkpointing=True)))
        cases.append(Case(leg, replace(leg, detour=2)))
        cases.append(Case(replace(leg, frozen=True), replace(leg, strategy=other, frozen=True)))
        cases.append(Case(replace(leg, global_batch=12), replace(leg, strategy=other, ranks=3, global_batch=12)))
        for precision in ("bf16", "fp16"):
            mixed = replace(leg, precision=precision, scale=2.0**24 if precision == "fp16" else None)
            cases.append(Case(mixed, replace(mixed, strategy=other, scale=None)))
        joint = replace(leg, network="joint")
        cases.append(Case(joint, replace(joint, strategy=other, ranks=1)))
        cases.append(Case(replace(joint, strategy=other), replace(joint, micro_batches=4, checkpointing=True)))
        drawn = replace(leg, network="autoencoder")
        cases.append(Case(drawn, replace(drawn, strategy=other, ranks=1)))
    for strategy, precision in product(("zero1", "zero2", "zero3"), ("fp32", "bf16_weights")):
        moved = Leg(strategy, 2, HALF, precision=precision, offload=True)
        plain = Leg("ddp", 1, HALF, precision=precision)
        cases += [Case(plain, moved), Case(moved, plain), Case(moved, replace(moved, micro_batches=4, detour=2))]
    return cases


def sampled() -> list[Case]:
    cases = every_case()
    return cases if PAIRS == "all" else random.Random(SEED).sample(cases, min(int(PAIRS), len(cases)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("case", sampled(), ids=str)
def test_goes_on_as_if_nothing_had_changed(runs: Runs, case: Case) -> None:
    found = runs.differences(case)
    print(case, {name: f"{value:.1e}" for name, value in found.items()})
    exact = case.first.precision == "fp32"
    assert found["first"] <= 1e-6
    assert found["rest"] <= (1e-6 if exact else 1e-3)
    if exact:
        assert found["ddp"] <= 1e-6
    # Some of the autoencoder's gradients are zero but for rounding, which AdamW makes as large as all others.
    if exact and case.first.network == "unet":
        assert found["ema"] <= 1e-6
        assert found["ddp_ema"] <= (1e-6 if case.second.ranks < 3 else 1e-5)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_weights", "fp16"])
@pytest.mark.parametrize(
    ("strategy", "offload"),
    [*((strategy, False) for strategy in STRATEGIES), ("zero1", True), ("zero2", True), ("zero3", True)],
)
def test_nothing_reaches_the_weights_that_is_not_finite(
    runs: Runs, strategy: str, offload: bool, precision: str, poison: str
) -> None:
    """What one rank sees in one of two micro-batches changes neither weights nor moments, and all ranks report it."""
    if PAIRS != "all" and random.Random(f"{SEED}{strategy}{offload}{precision}{poison}").random() > 0.1:
        pytest.skip("not drawn; PAIRS=all runs it")
    leg = Leg(strategy, 2, 2, precision=precision, offload=offload, micro_batches=2)
    before = runs.of(leg)
    after = runs.of(replace(leg, steps=3, poison=(2, poison)))
    fp16 = precision == "fp16"
    assert after["reports"][-1][1:] == (fp16, fp16)  # fp16 tries a smaller scale first
    assert after["num_updates"] == before["num_updates"] == 2
    assert largest(after["weights"], before["weights"]) == 0
    for moment, tensors in before["moments"].items():
        assert largest(after["moments"][moment], tensors) == 0
    assert after["scaler"] == ({"scale": 2.0**15, "good_steps": 0.0} if fp16 else {})
