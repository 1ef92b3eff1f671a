"""Lines between images: their ends, their middle, and what can't be joined."""

from __future__ import annotations

import pytest
import torch

from vae.config import VaeModelConfig
from vae.interpolation import blend, interpolate
from vae.metrics import reconstruct
from vae.model import build
from vae.moments import encode_moments


def test_a_line_in_latent_space_runs_between_the_reconstructions() -> None:
    torch.manual_seed(0)
    vae = build(VaeModelConfig(block_out_channels=(4, 8), norm_num_groups=4)).eval()
    first, second = torch.rand(2, 3, 3, 8, 8) * 2 - 1
    lines = interpolate(vae, first, second, 5)
    assert lines.shape == (3, 5, 3, 8, 8) and not lines.requires_grad
    torch.testing.assert_close(lines[:, 0], reconstruct(vae, first))
    torch.testing.assert_close(lines[:, -1], reconstruct(vae, second))
    with torch.no_grad():
        ends = [encode_moments(vae, x)[:, :4] for x in (first, second)]
        quarter = vae.decode(0.75 * ends[0] + 0.25 * ends[1]).sample  # pyright: ignore
    torch.testing.assert_close(lines[:, 1], quarter, rtol=1e-4, atol=1e-5)


def test_a_blend_is_the_weighted_sum() -> None:
    first, second = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    found = blend(first, second, 5)
    assert found.shape == (2, 5, 3, 4, 4)
    assert found[1, :, 0, 0, 0].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert torch.equal(blend(first, second, 2), torch.stack([first, second], dim=1))


def test_what_cannot_be_joined_is_refused() -> None:
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="one shape is wanted"):
        blend(x, torch.zeros(2, 3, 4, 4), 3)
    with pytest.raises(ValueError, match="num_steps=1 came, at least 2"):
        blend(x, x, 1)
