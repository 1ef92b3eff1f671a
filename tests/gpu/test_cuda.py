"""The same code path on a GPU as on the CPU."""

from __future__ import annotations

import pytest
import torch
from world import World, losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 5e-2)])
def test_a_run_on_the_gpu_finds_the_losses_of_the_cpu(world: World, precision: str, tolerance: float) -> None:
    cpu, gpu = world.root / "cpu", world.root / "gpu"
    assert world.do("train", f"run_dir={cpu}") == [0], world.said()
    words = ("engine.device=auto", f"engine.precision={precision}")
    assert world.do("train", f"run_dir={gpu}", *words) == [0], world.said()
    for a, b in zip(losses(cpu), losses(gpu), strict=True):
        assert a[:2] == b[:2]
        assert abs(a[2] - b[2]) <= tolerance * a[2]


def test_the_road_on_the_gpu(world: World) -> None:
    words = ("engine.device=auto", "engine.precision=bf16")
    for verb in ("train", "export", "sample", "evaluate"):
        assert world.do(verb, *words) == [0], world.said()
    assert (world.run_dir / "scores.json").exists()
