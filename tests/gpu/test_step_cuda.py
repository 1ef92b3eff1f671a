"""The steady step on a GPU: no wait for the device, by torch's own account."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from steady_step import Step

from pipeline.config_diffusion import DiffusionConfig
from pipeline.optim import UpdateRule
from pipeline.strategies.masters import Masters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """torch raises an error at a synchronisation, once a test says so."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_weights", "fp16"])
@pytest.mark.parametrize("objective", ["ddpm", "edm", "flow"])
def test_a_step_waits_for_nothing(objective: str, precision: str) -> None:
    step = Step(torch.device("cuda"), DiffusionConfig.model_validate({"objective": objective}), precision=precision)
    for _ in range(3):  # streams, pinned memory and workspaces are made
        step.take().read()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        summed = step.take()
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(1, device="cuda").item()
    torch.cuda.set_sync_debug_mode("default")
    assert summed.read()["not_finite"] == 0


def test_what_is_read_late_is_that_steps() -> None:
    """Figures that are fetched over another stream, while later steps run."""
    device = torch.device("cuda")
    early, late = (Step(device, DiffusionConfig()) for _ in range(2))
    at_once = [early.take().read()["loss"] for _ in range(4)]
    summed = [late.take() for _ in range(4)]
    assert [one.read()["loss"] for one in summed] == pytest.approx(at_once, rel=1e-5)


@pytest.mark.usefixtures("no_waiting")
def test_muon_updates_as_on_a_cpu_and_waits_for_nothing() -> None:
    """But for bf16's rounding, which changes a matrix by one part in a hundred."""
    rule = UpdateRule(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip_norm=1e9, muon_momentum=0.95)
    draw = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(32, 16, 3, 3, generator=draw) for _ in range(4))
    moved: list[torch.Tensor] = []
    for device in ("cpu", "cuda"):
        masters = Masters([start.to(device, copy=True)], [4], rule, hidden=[0])
        given = [[gradient.to(device)] for gradient in gradients]
        masters.step(given[0], 1e-2, None)
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        for one in given[1:]:
            masters.step(one, 1e-2, None)
        torch.cuda.set_sync_debug_mode("default")
        moved.append(masters.weights[0].cpu() - start)
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < 0.02
