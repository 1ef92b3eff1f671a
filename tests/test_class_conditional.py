"""The pipeline guides a prediction and leaves a learned variance alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from small_pipe import small_pipe
from torch import Tensor

LABELS, SEEDS = [0, 2], [3, 4]


@pytest.fixture
def learned() -> Any:
    pipe = small_pipe(channels_out=8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, **words: Any) -> Tensor:
    words = {"num_inference_steps": 4, "output_type": "latent", "seeds": SEEDS, "guidance_scale": 3.0} | words
    return pipe(LABELS, **words).images


def test_ddim_draws_as_if_the_variance_had_been_cut_off(learned: Any) -> None:
    whole = latents(learned)
    unet = learned.unet
    unet.conv_out.weight, unet.conv_out.bias = (torch.nn.Parameter(p[:4]) for p in unet.conv_out.parameters())
    unet.register_to_config(out_channels=4)
    torch.testing.assert_close(latents(learned), whole)


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_ancestral_steps_get_the_conditions_own_variance(learned: Any, w: float) -> None:
    learned.scheduler = DDPMScheduler.from_config(learned.scheduler.config, variance_type="learned_range")
    given: list[Tensor] = []
    step = learned.scheduler.step

    def spy(prediction: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(prediction)
        return step(prediction, *args, **kwargs)

    learned.scheduler.step = spy
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents(learned, guidance_scale=w, latents=start, seeds=SEEDS, num_inference_steps=1)
    condition = {"encoder_hidden_states": torch.zeros(2, 1, 8)}
    t = learned.scheduler.timesteps[0]
    c, u = (
        learned.unet(start, t, class_labels=torch.tensor(labels), **condition).sample for labels in (LABELS, [3, 3])
    )
    prediction, variance = given[0].chunk(2, dim=1)
    wanted = u + w * (c - u) if w not in {0.0, 1.0} else (c if w else u)
    torch.testing.assert_close(prediction, wanted[:, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance, (u if w == 0 else c)[:, 4:], rtol=1e-4, atol=1e-5)


def test_a_learned_variance_is_used_by_ancestral_steps_and_not_by_ddim(learned: Any) -> None:
    config = learned.scheduler.config
    drawn: dict[str, list[Tensor]] = {}
    for name, scheduler in {
        "ddim": DDIMScheduler.from_config(config),
        "learned": DDPMScheduler.from_config(config, variance_type="learned_range"),
        "small": DDPMScheduler.from_config(config, variance_type="fixed_small"),
    }.items():
        learned.scheduler = scheduler
        before = latents(learned)
        with torch.no_grad():
            learned.unet.conv_out.bias[4:] += 5.0
        drawn[name] = [before, latents(learned)]
        with torch.no_grad():
            learned.unet.conv_out.bias[4:] -= 5.0
    torch.testing.assert_close(*drawn["ddim"])
    torch.testing.assert_close(*drawn["small"])
    assert not torch.allclose(*drawn["learned"], atol=1e-2)
