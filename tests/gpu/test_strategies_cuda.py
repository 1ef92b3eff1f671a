"""The strategies on GPUs: as on the CPU, and without a wait where none is promised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from strategy_runs import HALF, STRATEGIES, Case, Leg, Runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
SEVERAL = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices on this machine")
# Kernels choose their sums by shape, so fp32 agrees less well than on the CPU.
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2, "fp16": 5e-3, "bf16_weights": 1e-2}


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_gpu_finds_the_losses_of_the_cpu(tmp_path: Path, strategy: str, precision: str) -> None:
    runs = Runs(tmp_path)
    wanted = runs.of(Leg("ddp", 1, HALF, precision=precision))["losses"]
    found = runs.of(Leg(strategy, 1, HALF, precision=precision, device="cuda"))["losses"]
    assert all(abs(a - b) <= TOLERANCE[precision] * b for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_weights", "fp16"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_step_does_not_wait_for_the_device(tmp_path: Path, strategy: str, precision: str) -> None:
    """torch raises an error at a synchronisation, in the last steps and in one that is not finite."""
    leg = Leg(strategy, 1, HALF, precision=precision, device="cuda", poison=(HALF - 1, "gradient"), no_waiting=True)
    assert Runs(tmp_path).of(leg)["num_updates"] == HALF - 1


@pytest.mark.parametrize("offload", ["zero1", "zero2", "zero3"])
def test_an_offloaded_optimizer_goes_on(tmp_path: Path, offload: str) -> None:
    moved = Leg(offload, 1, HALF, offload=True, device="cuda")
    found = Runs(tmp_path).differences(Case(Leg("ddp", 1, HALF, device="cuda"), moved))
    assert found["first"] <= 1e-4 and found["rest"] <= 1e-3


@SEVERAL
@pytest.mark.parametrize("precision", ["fp32", "bf16_weights"])
@pytest.mark.parametrize("second", STRATEGIES)
@pytest.mark.parametrize("first", STRATEGIES)
def test_pairs(tmp_path: Path, first: str, second: str, precision: str) -> None:
    legs = (Leg(strategy, 2, HALF, precision=precision, device="cuda") for strategy in (first, second))
    found = Runs(tmp_path).differences(Case(*legs))
    assert found["first"] <= 1e-4 and found["rest"] <= 1e-2
