"""Statistics of latent channels: against brute force, known shapes, any division into parts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from vae.channels import Channels, ChannelStatistics, mixed_channels
from vae.losses import kl_per_channel


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(*batches: Tensor) -> ChannelStatistics:
    statistics = ChannelStatistics(batches[0].shape[1] // 2)
    for batch in batches:
        statistics.update(batch)
    return statistics


def channels_of(*batches: Tensor) -> Channels:
    return mixed_channels([measured(*batches)], (1.0,))


def test_channels_are_those_of_brute_force() -> None:
    """Central moments of a mixture of N(m, v): with d = m - mean, E d³ + 3 d v and E d⁴ + 6 d² v + 3 v²."""
    batches = [1.5 * draw(n, 6, 3, 5, seed=n) + 0.7 for n in (1, 4, 7)]
    found = channels_of(*batches)
    mean, logvar = np.split(torch.cat(batches).numpy(), 2, axis=1)
    over, v = (0, 2, 3), np.exp(logvar)
    d = mean - mean.mean(over, keepdims=True)
    std = np.sqrt((d**2 + v).mean(over))
    np.testing.assert_allclose(found.mean, mean.mean(over), rtol=1e-12)
    np.testing.assert_allclose(found.std, std, rtol=1e-12)
    np.testing.assert_allclose(found.skewness, (d**3 + 3 * d * v).mean(over) / std**3, rtol=1e-9)
    kurtosis = (d**4 + 6 * d**2 * v + 3 * v**2).mean(over) / std**4 - 3
    np.testing.assert_allclose(found.excess_kurtosis, kurtosis, rtol=1e-9)
    np.testing.assert_allclose(found.kl_nats, kl_per_channel(torch.cat(batches)), rtol=1e-12)
    np.testing.assert_allclose(found.information_share, np.array(found.kl_nats) / sum(found.kl_nats))


def test_they_are_those_of_samples() -> None:
    """What is said of z ~ q(z|x) without a draw is what draws show."""
    moments = draw(50, 2, 4, 4)
    noise = draw(4000, 50, 1, 4, 4, seed=1)
    z = moments[:, :1] + (0.5 * moments[:, 1:]).exp() * noise
    found = channels_of(moments)
    standard = (z - z.mean()) / z.std()
    assert found.skewness[0] == pytest.approx(standard.pow(3).mean().item(), abs=0.02)
    assert found.excess_kurtosis[0] == pytest.approx(standard.pow(4).mean().item() - 3, abs=0.1)


def test_known_shapes() -> None:
    prior = torch.zeros(3, 2, 2, 2)  # N(0, 1) itself, whatever the image
    found = channels_of(prior)
    assert (found.mean, found.std, found.skewness, found.excess_kurtosis) == ([0], [1], [0], [0])
    assert found.kl_nats == [0] and found.dead() == [0] and found.information_share == [0]
    coin = torch.full((2, 2, 1, 1), -200.0)  # half of the images at -1, half at 5
    coin[:, 0] = torch.tensor([-1.0, 5.0]).view(2, 1, 1)
    found = channels_of(coin)
    assert (found.mean[0], found.std[0]) == pytest.approx((2, 3))
    assert (found.skewness[0], found.excess_kurtosis[0]) == pytest.approx((0, -2), abs=1e-12)
    constant = torch.full((2, 2, 1, 1), -200.0)
    constant[:, 0] = 1.1
    assert (channels_of(constant).skewness, channels_of(constant).excess_kurtosis) == ([0], [0])


def test_a_channel_that_says_nothing_is_dead() -> None:
    moments = torch.zeros(4, 6, 2, 2)
    moments[:, 0] = 1.0  # ½ nat
    moments[:, 1] = 0.2  # 0.02 nats
    moments[:, 2] = 0.1  # 0.005 nats
    found = channels_of(moments)
    assert found.kl_nats == pytest.approx([0.5, 0.02, 0.005])
    assert found.dead() == [2] and found.dead(least=0.1) == [1, 2]
    assert found.information_share == pytest.approx([0.5 / 0.525, 0.02 / 0.525, 0.005 / 0.525])


def test_parts_measured_apart_are_the_whole() -> None:
    batches = [draw(n + 1, 4, 3, 3, seed=n) for n in range(4)]
    whole = measured(torch.cat(batches))
    for cut in range(1, 4):
        left, right = measured(*batches[:cut]), measured(*batches[cut:])
        right.merge(left)
        torch.testing.assert_close(right.expectations, whole.expectations, rtol=1e-12, atol=1e-14)
        assert right.moments.count == whole.moments.count


def test_sums_survive_json_to_the_bit() -> None:
    statistics = measured(draw(3, 4, 2, 2))
    back = ChannelStatistics.from_dict(json.loads(json.dumps(statistics.to_dict())))
    assert back.to_dict() == statistics.to_dict()
    back.merge(ChannelStatistics(2))
    assert torch.equal(back.expectations, statistics.expectations), "a rank without images adds nothing"


def test_a_mixture_is_that_of_its_draws() -> None:
    """Each set seen as often as its weight says, whatever its size: as if it were one set."""
    few, many = draw(2, 4, 3, 3, seed=1), draw(5, 4, 3, 3, seed=2) + 1
    mixed = mixed_channels([measured(few), measured(many)], (3, 1))
    as_one = channels_of(*[few] * 3 * 5, *[many] * 2)  # 30 and 10 images
    for name in ("mean", "std", "skewness", "excess_kurtosis", "kl_nats"):
        assert getattr(mixed, name) == pytest.approx(getattr(as_one, name), rel=1e-9), name


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        mixed_channels([ChannelStatistics(2)], (1,))
    with pytest.raises(ValueError, match=r"\[2, 3\] channels"):
        mixed_channels([measured(draw(1, 4, 2, 2)), measured(draw(1, 6, 2, 2))], (1, 1))
    with pytest.raises(ValueError, match="1 sets and 2 weights"):
        mixed_channels([measured(draw(1, 4, 2, 2))], (1, 1))
    statistics = measured(draw(1, 4, 2, 2))
    before = statistics.to_dict()
    with pytest.raises(ValueError, match="not finite"):
        statistics.update(torch.full((1, 4, 2, 2), float("nan")))
    with pytest.raises(ValueError, match="of 3 channels came"):
        statistics.merge(ChannelStatistics(3))
    assert statistics.to_dict() == before
