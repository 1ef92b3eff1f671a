"""Moments, the posterior draw and the scale: against diffusers, finite differences and brute force."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torch import Tensor

from vae.config import VaeModelConfig
from vae.model import build
from vae.moments import LatentScale, MomentStatistics, encode_moments, mixed_scale, sample_posterior


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(*batches: Tensor) -> MomentStatistics:
    statistics = MomentStatistics(batches[0].shape[1] // 2)
    for batch in batches:
        statistics.update(batch)
    return statistics


def test_moments_are_those_of_diffusers() -> None:
    torch.manual_seed(0)
    vae = build(VaeModelConfig(block_out_channels=(4, 8), norm_num_groups=4)).eval()
    with torch.no_grad():
        assert vae.quant_conv is not None and vae.quant_conv.bias is not None
        vae.quant_conv.bias[4:] = torch.tensor([-1e3, 1e3, 0.0, 1.0])  # logvar beyond both ends of the clip
        x = draw(2, 3, 16, 16).float()
        posterior = vae.encode(x).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        moments = encode_moments(vae, x)
    mean, logvar = moments.chunk(2, dim=1)
    assert torch.equal(mean, posterior.mean) and torch.equal(logvar, posterior.logvar)
    assert (logvar[:, 0] == -30).all() and (logvar[:, 1] == 20).all()
    noise = posterior.sample(torch.Generator().manual_seed(1)) - mean
    assert torch.allclose(
        sample_posterior(moments, torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))) - mean, noise
    )


def test_moments_are_fp32_under_autocast() -> None:
    vae = build(VaeModelConfig(block_out_channels=(4,), norm_num_groups=4))
    with torch.autocast("cpu", torch.bfloat16):
        assert encode_moments(vae, torch.zeros(1, 3, 8, 8)).dtype == torch.float32


def test_posterior_draw_has_the_moments() -> None:
    moments = draw(1, 6, 2, 2)
    num_draws = 200_000
    z = sample_posterior(moments.expand(num_draws, -1, -1, -1), draw(num_draws, 3, 2, 2, seed=1))
    mean, logvar = moments[0].chunk(2)
    std = (0.5 * logvar).exp()
    assert ((z.mean(0) - mean).abs() < 5 * std / num_draws**0.5).all()
    assert ((z.std(0) / std - 1).abs() < 5 / (2 * num_draws) ** 0.5).all()


def test_posterior_draw_is_differentiable() -> None:
    """d E[f(z)] passes through mean and logvar: the reparameterised gradient against finite differences."""
    moments, noise = draw(2, 4, 2, 2).requires_grad_(), draw(2, 2, 2, 2, seed=1)

    def f(moments: Tensor) -> Tensor:
        return sample_posterior(moments, noise).sin().sum()

    (gradient,) = torch.autograd.grad(f(moments), moments)
    step = 1e-6
    for i in range(moments.numel()):
        nudge = torch.zeros_like(moments).view(-1).index_fill(0, torch.tensor(i), step).view_as(moments)
        difference = (f(moments + nudge) - f(moments - nudge)) / (2 * step)
        assert abs(difference - gradient.view(-1)[i]) < 1e-8


def test_one_noise_for_many_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 2, 2, 2\] came, \[3, 2, 2, 2\] is wanted"):
        sample_posterior(draw(3, 4, 2, 2), draw(1, 2, 2, 2))


def test_statistics_are_those_of_brute_force() -> None:
    """Variance over the whole mixture of posteriors = mean of variances + variance of means."""
    batches = [2 * draw(n, 8, 3, 5, seed=n) - 1 for n in (1, 4, 7)]
    statistics = measured(*batches)
    mean, logvar = np.split(np.concatenate([batch.numpy() for batch in batches]), 2, axis=1)
    assert statistics.count == 12 * 15
    np.testing.assert_allclose(statistics.channel_mean, mean.mean((0, 2, 3)), rtol=1e-12)
    variance = np.exp(logvar).mean((0, 2, 3)) + mean.var((0, 2, 3))
    np.testing.assert_allclose(statistics.channel_std, np.sqrt(variance), rtol=1e-12)
    scale = (np.exp(logvar).mean() + mean.var()) ** -0.5
    assert statistics.latent_scale.scale == pytest.approx(scale, rel=1e-12)
    assert statistics.latent_scale.shift == 0


def test_merging_in_any_order_is_one_pass() -> None:
    batches = [draw(n + 1, 4, 3, 3, seed=n) for n in range(4)]
    whole = measured(*batches)
    for order in itertools.permutations(batches):
        left, right = measured(*order[:1]), measured(*order[1:])
        left.merge(right)
        assert left.count == whole.count
        np.testing.assert_allclose(left.channel_mean, whole.channel_mean, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(left.channel_std, whole.channel_std, rtol=1e-12)
        assert left.latent_scale.scale == pytest.approx(whole.latent_scale.scale, rel=1e-12)


def test_statistics_survive_json_to_the_bit() -> None:
    statistics = measured(draw(3, 4, 2, 2))
    back = MomentStatistics.from_dict(json.loads(json.dumps(statistics.to_dict())))
    assert back.to_dict() == statistics.to_dict() and back.num_channels == 2
    assert back.latent_scale == statistics.latent_scale
    back.merge(MomentStatistics(2))
    assert back.to_dict() == statistics.to_dict(), "a rank without images adds nothing"


def test_normalised_latents_have_unit_variance_and_come_back() -> None:
    moments = torch.cat([3 * draw(4000, 2, 2, 2) + 0.5, draw(4000, 2, 2, 2, seed=1)], dim=1)
    scale = measured(moments).latent_scale
    z = sample_posterior(moments, draw(4000, 2, 2, 2, seed=2))
    z_0 = scale.normalise(z)
    assert z_0.std().item() == pytest.approx(1, abs=0.02)
    assert torch.allclose(scale.denormalise(z_0), z, rtol=1e-14, atol=1e-14)
    points = moments.clone()
    points[:, 2:] = -200.0  # posteriors without spread: the measured set is the set of means itself
    z_0 = measured(points).latent_scale.normalise(points[:, :2])
    assert z_0.var(correction=0).item() == pytest.approx(1, rel=1e-12)
    shifted = LatentScale(scale=0.25, shift=-2.0)
    assert torch.equal(shifted.normalise(torch.tensor([-2.0, 2.0])), torch.tensor([0.0, 1.0]))
    assert torch.equal(shifted.denormalise(torch.tensor([0.0, 1.0])), torch.tensor([-2.0, 2.0]))


def test_moments_that_are_not_finite_are_refused() -> None:
    for channel, value in itertools.product((0, 3), (float("nan"), float("inf"))):
        moments = draw(3, 4, 2, 2)
        moments[1, channel, 0, 0] = value
        with pytest.raises(ValueError, match=r"1 of 3 images are not finite \(first: number 1"):
            measured(moments)
    moments = draw(3, 4, 2, 2)
    moments[2, 3] = 800.0  # finite itself; exp of it is not
    with pytest.raises(ValueError, match="first: number 2"):
        measured(moments)


def test_refused_statistics_are_left_as_they_were() -> None:
    statistics = measured(draw(3, 4, 2, 2))
    before = statistics.to_dict()
    with pytest.raises(ValueError, match="not finite"):
        statistics.update(torch.full((1, 4, 2, 2), float("nan")))
    with pytest.raises(ValueError, match=r"\[1, 6, 2, 2\] came, \[B,4,h,w\] are wanted"):
        statistics.update(draw(1, 6, 2, 2))
    with pytest.raises(ValueError, match="of 3 channels came"):
        statistics.merge(MomentStatistics(3))
    assert statistics.to_dict() == before


def test_nothing_and_constants_have_no_scale() -> None:
    empty = MomentStatistics(2)
    for ask in ("latent_scale", "channel_mean", "channel_std"):
        with pytest.raises(ValueError, match="empty"):
            getattr(empty, ask)
    constant = torch.full((2, 4, 2, 2), 1.1)
    constant[:, 2:] = -200.0
    with pytest.raises(ValueError, match="no variance"):
        _ = measured(constant).latent_scale
    with pytest.raises(ValueError, match="no variance"):
        _ = measured(constant * torch.tensor([0.0, 0.0, 10.0, 10.0]).view(1, 4, 1, 1)).latent_scale


@pytest.mark.parametrize(
    "record",
    [
        {"count": 1, "sum_z": [0.0]},
        {"count": 1, "sum_z": [0.0], "sum_z_squared": [1.0, 1.0]},
        {"count": -1, "sum_z": [0.0], "sum_z_squared": [1.0]},
        {"count": 1, "sum_z": [float("nan")], "sum_z_squared": [1.0]},
    ],
)
def test_broken_records_are_refused(record: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="latent statistics"):
        MomentStatistics.from_dict(record)


@pytest.mark.parametrize(("scale", "shift"), [(0.0, 0.0), (-1.0, 0.0), (float("inf"), 0.0), (1.0, float("nan"))])
def test_impossible_scales_are_refused(scale: float, shift: float) -> None:
    with pytest.raises(ValueError, match="a finite scale > 0"):
        LatentScale(scale, shift)


def test_a_mixture_has_the_scale_of_its_draws() -> None:
    """Each set seen as often as its weight says, whatever its size: as if it were one set."""
    few, many = draw(2, 4, 3, 3, seed=1), draw(5, 4, 3, 3, seed=2) + 1
    mixed = mixed_scale([measured(few), measured(many)], (3, 1))
    as_one = measured(*[few] * 3 * 5, *[many] * 2)  # 30 and 10 images
    assert mixed.scale == pytest.approx(as_one.latent_scale.scale, rel=1e-12)
    assert mixed.scale != pytest.approx(measured(few, many).latent_scale.scale, rel=1e-3)
    assert mixed_scale([measured(few)] * 2, (0.2, 0.8)).scale == pytest.approx(measured(few).latent_scale.scale)


def test_one_set_keeps_its_scale_to_the_last_digit() -> None:
    assert mixed_scale([measured(draw(3, 4, 5, 5))], (0.3,)) == measured(draw(3, 4, 5, 5)).latent_scale


def test_sets_that_do_not_mix_are_refused() -> None:
    two, three = measured(draw(1, 4, 2, 2)), measured(draw(1, 6, 2, 2))
    for statistics, weights, said in (
        ([two, three], (1, 1), r"\[2, 3\] channels"),
        ([two], (1, 1), "1 sets and 2 weights"),
        ([], (), "0 sets"),
        ([two, MomentStatistics(2)], (1, 1), "empty"),
    ):
        with pytest.raises(ValueError, match=said):
            mixed_scale(statistics, weights)
