"""torch.compile, channels_last and attention kernels on a GPU: the losses of eager, contiguous mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from strategy_runs import Leg, Runs
from torch import nn
from world import World, losses

from pipeline.attention import preferred

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2, "bf16_weights": 1e-2}  # of a loss, relative, over five steps


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_a_gpu_compiled_and_in_channels_last_trains_alike(tmp_path: Path, strategy: str, precision: str) -> None:
    leg = Leg(strategy, 1, 5, precision=precision, device="cuda")
    runs = Runs(tmp_path)
    plain = runs.of(leg)["losses"]
    for changed in ({"channels_last": True}, {"channels_last": True, "compiled": "inductor"}):
        found = runs.of(replace(leg, **changed))
        assert found["graph_breaks"] == 0
        assert all(abs(a - b) <= TOLERANCE[precision] * b for a, b in zip(found["losses"], plain, strict=True))


@pytest.mark.parametrize("kind", ["cudnn", "flash", "efficient", "math"])
def test_attention_kernels_agree(kind: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 64, 64, device="cuda", dtype=torch.bfloat16).unbind()
    wanted = (q.float() @ k.float().transpose(-1, -2) / 8).softmax(-1) @ v.float()
    with preferred(kind, torch.device("cuda")):  # pyright: ignore[reportArgumentType]
        found = nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found.float(), wanted, rtol=5e-2, atol=2e-2)


def test_a_whole_run_compiled(world: World) -> None:
    """Train, export, sample and encode with all of it switched on."""
    plain, quick = world.root / "plain", world.root / "quick"
    words = ("engine.device=auto", "engine.precision=bf16")
    assert world.do("train", *words, f"run_dir={plain}") == [0], world.said()
    words = (*words, "engine.compile=true", "engine.channels_last=true", f"run_dir={quick}")
    for verb in ("train", "export", "sample"):
        assert world.do(verb, *words) == [0], world.said()
    for a, b in zip(losses(quick), losses(plain), strict=True):
        assert a[:2] == b[:2] and abs(a[2] - b[2]) <= 5e-2 * b[2]
    assert world.do("encode", *words, f"data.train_latents={world.root / 'latents'}") == [0], world.said()
