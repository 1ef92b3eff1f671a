"""The same code path on a GPU as on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_pipe import small_pipe
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


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2), (torch.float16, 5e-2)])
def test_the_exports_pipeline_on_the_gpu(offloaded: bool, dtype: torch.dtype, tolerance: float) -> None:
    """Guided by a network that lies on the CPU, from an image; the same with the weights offloaded between calls."""
    pipe: Any = small_pipe()
    guide = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        guide.conv_out.weight.mul_(0.9)
    x = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    words = {"seeds": 0, "guide": guide, "image": x, "strength": 0.5, "num_inference_steps": 4, "output_type": "latent"}
    wanted = pipe([0, 2], **words).images
    pipe.to(dtype)
    if offloaded:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to("cuda")
    found = pipe([0, 2], **words).images
    assert found.device.type == "cuda" and found.dtype == torch.float32 and guide.device.type == "cpu"
    assert float((found.cpu() - wanted).norm() / wanted.norm()) <= tolerance
    assert not offloaded or pipe.unet.device.type == "cpu"
