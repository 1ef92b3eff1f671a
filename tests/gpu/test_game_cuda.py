"""On a GPU the autoencoder's game goes as on the CPU, and nobody waits in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vae.config import VaeModelConfig, VaeTrainConfig
from vae.discriminator import build_discriminator
from vae.model import build
from vae.objective import Objective
from vae.steps import AutoencoderStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
ALL = {
    "reconstruction": "gaussian",
    "kl_weight": 1.0,
    "kl_warmup_steps": 4,
    "equivariance_share": 0.5,
    "adversary": {"discriminator": {"base_channels": 8, "num_downsamplings": 1}},
}


def test_two_steps_on_the_gpu_are_those_on_the_cpu_and_nobody_waits() -> None:
    config = VaeTrainConfig.model_validate(ALL)
    assert config.adversary is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    noise = torch.randn(2, 4, 16, 16, generator=generator)
    found: list[list[Tensor]] = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            step = AutoencoderStep(build(VaeModelConfig(block_out_channels=(8, 8), norm_num_groups=4))).to(device)
        discriminator = build_discriminator(config.adversary.discriminator, 3, 1).to(device)
        objective = Objective(config, step.autoencoder, discriminator=discriminator, device=device)
        images, draws = x.to(device), noise.to(device)
        figures: list[Tensor] = []
        for number, transform in enumerate(((1.0, 0.0), (0.5, 1.0))):
            turned = torch.tensor([transform] * 2, dtype=torch.float64)  # stays on the CPU, as the engine leaves it
            batch = {"x": images, "posterior_noise": draws, "transform": turned}
            if device.type == "cuda" and number:  # the first step looks for the fastest kernels
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")  # from here on a wait raises
            try:
                loss, parts = objective.autoencoder_loss(step, batch, number)
                loss.backward()
                its, of_game = objective.discriminator_loss(discriminator, batch)
                its.backward()
                objective.settle()
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            figures += [loss, its, *parts.values(), *of_game.values(), *objective.carried.values()]
        gradients = [p.grad for p in (*step.parameters(), *discriminator.parameters()) if p.grad is not None]
        found.append([value.detach().cpu() for value in (*(f.clone() for f in figures), *gradients)])
    for on_gpu, on_cpu in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=2e-2, atol=1e-3)
