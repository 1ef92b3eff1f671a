"""A training step reaches every weight, draws nothing itself, and twenty of them learn something."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from vae.config import VaeModelConfig, VaeTrainConfig
from vae.metrics import psnr, reconstruct
from vae.model import build
from vae.moments import MomentStatistics, encode_moments, sample_posterior
from vae.objective import LossAndParts, Objective
from vae.steps import AutoencoderStep

TINY = VaeModelConfig(block_out_channels=(8, 8), norm_num_groups=4)


@pytest.fixture
def step() -> AutoencoderStep:
    torch.manual_seed(0)
    return AutoencoderStep(build(TINY))


def batch(num_images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(num_images, 3, 8, 8, generator=generator) * 2 - 1
    return x, torch.randn(num_images, 4, 4, 4, generator=generator)


def loss_of(step: AutoencoderStep, x: Tensor, noise: Tensor, config: VaeTrainConfig) -> LossAndParts:
    return Objective(config, step.autoencoder).autoencoder_loss(step, {"x": x, "posterior_noise": noise}, 0)


def test_forward_is_encode_draw_decode(step: AutoencoderStep) -> None:
    x, noise = batch(2)
    output = step(x, noise)
    z = sample_posterior(encode_moments(step.autoencoder, x), noise)
    assert output.x_hat.shape == x.shape and output.moments.shape == (2, 8, 4, 4)
    decoded = step.autoencoder.decode(z, return_dict=False)  # pyright: ignore[reportArgumentType]
    assert torch.equal(output.x_hat, decoded[0])


def test_nothing_is_drawn_inside(step: AutoencoderStep) -> None:
    x, noise = batch(2)
    state = torch.get_rng_state()
    first, second = step(x, noise), step(x, noise)
    assert torch.equal(first.x_hat, second.x_hat)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(step(x, -noise).x_hat, first.x_hat)


def test_gradients_reach_encoder_and_decoder(step: AutoencoderStep) -> None:
    x, noise = batch(2)
    loss, _ = loss_of(step, x, noise, VaeTrainConfig(kl_weight=0.0))
    loss.backward()
    for name, weight in step.named_parameters():
        # A key's bias moves all scores of a softmax row alike: its gradient is zero by theory.
        if not name.endswith("to_k.bias"):
            assert weight.grad is not None and weight.grad.abs().max() > 0, name


def test_micro_batches_add_up_to_the_batch(step: AutoencoderStep) -> None:
    step.double()
    x, noise = (part.double() for part in batch(4))
    config = VaeTrainConfig()
    whole = torch.autograd.grad(loss_of(step, x, noise, config)[0], list(step.parameters()))
    parts = [
        torch.autograd.grad(loss_of(step, x[half], noise[half], config)[0] / 2, list(step.parameters()))
        for half in (slice(0, 2), slice(2, 4))
    ]
    for gradient, first, second in zip(whole, *parts, strict=True):
        assert torch.allclose(gradient, first + second, rtol=1e-9, atol=1e-12)


def test_twenty_steps_on_digits_learn() -> None:
    digits, _ = load_digits(return_X_y=True)
    images = [Image.fromarray((digit.reshape(8, 8) / 16 * 255).astype(np.uint8)) for digit in digits[:200]]
    pixels = np.stack([np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)) for image in images])
    x = (torch.from_numpy(pixels).float() / 127.5 - 1).unsqueeze(1).expand(-1, 3, -1, -1)
    train, held_out = x[:160], x[160:]

    torch.manual_seed(0)
    step, config = AutoencoderStep(build(TINY)), VaeTrainConfig(learning_rate=1e-2)
    optimizer = torch.optim.AdamW(step.parameters(), lr=config.learning_rate)
    before = psnr(reconstruct(step.autoencoder, held_out), held_out).mean()
    losses: list[float] = []
    for i in range(20):
        part = train[(i * 16) % 160 :][:16]
        noise = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        loss, _ = loss_of(step, part, noise, config)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(step.parameters(), config.gradient_clip_norm)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert psnr(reconstruct(step.autoencoder, held_out), held_out).mean() > before + 3
    statistics = MomentStatistics(4)
    with torch.no_grad():
        statistics.update(encode_moments(step.autoencoder, held_out))
    assert statistics.latent_scale.scale > 0
