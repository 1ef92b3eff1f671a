"""PSNR against its formula, and reconstruction without chance."""

from __future__ import annotations

import math

import pytest
import torch

from vae.config import VaeModelConfig
from vae.metrics import psnr, reconstruct
from vae.model import build


def test_psnr_is_the_formula_per_image() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 8, 8, generator=generator) * 1.6 - 0.8
    x_hat = x + 0.05 * torch.randn(4, 3, 8, 8, generator=generator)
    wanted = [10 * math.log10(4 / float((a - b).double().square().mean())) for a, b in zip(x_hat, x, strict=True)]
    assert psnr(x_hat, x).tolist() == pytest.approx(wanted, rel=1e-5)


def test_psnr_of_known_errors() -> None:
    x = torch.zeros(3, 3, 4, 4)
    x_hat = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.02), torch.full((3, 4, 4), 3.0)])
    exact, small, cut = psnr(x_hat, x).tolist()
    assert exact == math.inf
    assert small == pytest.approx(40.0, abs=1e-4)
    assert cut == pytest.approx(20 * math.log10(2), abs=1e-4), "3 is shown as 1"


def test_psnr_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="is wanted"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4))


def test_reconstruction_has_no_chance_and_no_gradient() -> None:
    torch.manual_seed(0)
    vae = build(VaeModelConfig(block_out_channels=(4, 8), norm_num_groups=4))
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    first, second = reconstruct(vae, x), reconstruct(vae, x)
    assert torch.equal(first, second) and first.shape == x.shape and not first.requires_grad
    mean = vae.encode(x).latent_dist.mode()  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(first, vae.decode(mean, return_dict=False)[0])
