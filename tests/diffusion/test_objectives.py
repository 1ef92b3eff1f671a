"""Timesteps are uniform and stratified, targets are what they say, the best denoiser minimises the loss."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from pipeline.diffusion.objectives import simple_loss, stratified, target, timesteps
from pipeline.diffusion.process import predict_z_0, q_sample
from pipeline.diffusion.schedule import PredictionType, make_schedule

LAST_BELOW_ONE = math.nextafter(1.0, 0.0)
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
SCHEDULE = make_schedule("linear", 1000, 1e-4, 0.02)
prediction_types = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# u ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [1, 2, 7, 64, 1000, 4096])
def test_every_stratum_gets_exactly_one_point(num_slots: int) -> None:
    for u_0 in np.random.default_rng(num_slots).random(50).tolist():
        u = stratified(u_0, np.arange(num_slots), num_slots)
        assert np.array_equal(np.sort(np.floor(u * num_slots)), np.arange(num_slots))


@given(
    u_0=st.one_of(
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 4095).map(lambda k: k / 4096),
        st.sampled_from([0.0, 5e-324, 2**-53, 0.5 - 2**-54, LAST_BELOW_ONE]),
    ),
    num_slots=st.integers(1, 300),
)
@settings(max_examples=150, deadline=None)
def test_points_are_one_stratum_apart_and_below_one(u_0: float, num_slots: int) -> None:
    u = [stratified(u_0, slot, num_slots) for slot in range(num_slots)]
    assert all(0 <= point < 1 for point in u)
    # On the circle, so that an edge that rounds to the other side of 0 is no exception.
    circle = sorted(u)
    gaps = [after - before for before, after in pairwise([*circle, circle[0] + 1])]
    assert gaps == pytest.approx([1 / num_slots] * num_slots, abs=1e-15)


@pytest.mark.parametrize("slot", [0, 1, 30, 63])
def test_each_slot_alone_is_uniform(slot: int) -> None:
    u = stratified(np.random.default_rng(slot).random(4000), slot, 64)
    assert stats.kstest(u, "uniform").pvalue > 1e-3


def test_floats_arrays_and_tensors_agree_bitwise() -> None:
    num_slots = 37
    for u_0 in (0.0, 0.3, 1 / 3, LAST_BELOW_ONE):
        one_by_one = [stratified(u_0, slot, num_slots) for slot in range(num_slots)]
        of_array = stratified(u_0, np.arange(num_slots), num_slots)
        of_tensor = stratified(u_0, torch.arange(num_slots), num_slots)
        of_tensor_u_0 = stratified(torch.tensor(u_0, dtype=torch.float64), torch.arange(num_slots), num_slots)
        assert of_array.dtype == np.float64
        assert of_tensor.dtype == of_tensor_u_0.dtype == torch.float64
        assert of_array.tolist() == of_tensor.tolist() == of_tensor_u_0.tolist() == one_by_one


@pytest.mark.parametrize(
    ("u_0", "slot", "num_slots", "message"),
    [
        (1.0, 0, 4, r"u_0 must lie in \[0, 1\), got 1.0"),
        (-1e-20, 0, 4, "u_0 must lie"),  # -1e-20 % 1.0 is 1.0
        (math.nan, 0, 4, "u_0 must lie"),
        (0.5, 4, 4, r"slot must lie in \[0, 4\), got 4"),
        (0.5, -1, 4, "slot must lie"),
        (0.5, 0, 0, "num_slots must be at least 1, got 0"),
    ],
)
def test_stratified_refuses(u_0: float, slot: int, num_slots: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stratified(u_0, slot, num_slots)
    with pytest.raises(ValueError, match=message.split(", got", maxsplit=1)[0]):
        stratified(u_0, torch.tensor([slot]), num_slots)
    with pytest.raises(ValueError, match=message.split(", got", maxsplit=1)[0]):
        stratified(np.array([u_0]), slot, num_slots)


# t ------------------------------------------------------------------------------------------------


def test_timesteps_are_equal_shares_of_the_unit_interval() -> None:
    middles = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.equal(timesteps(middles, 1000), torch.arange(1000))
    assert timesteps(torch.zeros(3, dtype=torch.float64), 1000).tolist() == [0, 0, 0]
    assert timesteps(middles, 1000).dtype == torch.int64
    assert timesteps(middles[:0], 1000).shape == (0,)


def test_the_largest_u_gives_the_last_timestep() -> None:
    u = torch.tensor([LAST_BELOW_ONE], dtype=torch.float64)
    for num_timesteps in [*range(1, 2050), 2**20 - 1, 2**20 + 1, 10**6, 2**31 - 1]:
        assert timesteps(u, num_timesteps).item() == num_timesteps - 1


@given(u=st.floats(0, 1, exclude_max=True), num_timesteps=st.integers(1, 10**6))
@settings(max_examples=150, deadline=None)
def test_timesteps_stay_in_range(u: float, num_timesteps: int) -> None:
    t = timesteps(torch.tensor([u], dtype=torch.float64), num_timesteps)
    assert 0 <= t.item() < num_timesteps
    assert abs(t.item() + 0.5 - u * num_timesteps) <= 0.5 + 1e-9


def test_a_global_batch_of_t_slots_visits_every_timestep_once() -> None:
    u = stratified(0.0371, torch.arange(1000), 1000)
    assert torch.equal(timesteps(u, 1000).sort().values, torch.arange(1000))


@pytest.mark.parametrize(
    ("u", "message"),
    [
        (torch.tensor([0.5]), "float64 vector"),
        (torch.tensor(0.5, dtype=torch.float64), "float64 vector"),
        (torch.tensor([0.5, 1.0], dtype=torch.float64), r"u must lie in \[0, 1\)"),
        (torch.tensor([-0.1], dtype=torch.float64), r"u must lie in \[0, 1\)"),
        (torch.tensor([math.nan], dtype=torch.float64), r"u must lie in \[0, 1\)"),
    ],
)
def test_timesteps_refuses(u: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timesteps(u, 1000)
    with pytest.raises(ValueError, match="num_timesteps must be at least 1"):
        timesteps(u, 0)


# The target and the loss --------------------------------------------------------------------------


@prediction_types
def test_a_network_that_hits_its_target_means_z_0(prediction_type: PredictionType) -> None:
    t = torch.arange(1000)
    z_0, eps = draws(1000, 1, 2, 2, seed=0), draws(1000, 1, 2, 2, seed=1)
    z_t = q_sample(z_0, t, eps, SCHEDULE)
    wanted = target(prediction_type, z_0, eps, t, SCHEDULE)
    assert wanted.dtype == torch.float64
    torch.testing.assert_close(predict_z_0(wanted, z_t, t, SCHEDULE, prediction_type), z_0, rtol=0, atol=1e-10)
    assert target(prediction_type, z_0.bfloat16(), eps.float(), t, SCHEDULE).dtype == torch.float32


def test_targets_are_the_named_tensors() -> None:
    t, z_0, eps = torch.tensor([10, 990]), draws(2, 1, 2, 2, seed=2), draws(2, 1, 2, 2, seed=3)
    assert torch.equal(target("epsilon", z_0, eps, t, SCHEDULE), eps)
    assert torch.equal(target("sample", z_0, eps, t, SCHEDULE), z_0)
    # v is the derivative of z_t by the angle: almost ε near the data, almost -z_0 near the noise.
    v = target("v_prediction", z_0, eps, t, SCHEDULE)
    torch.testing.assert_close(v[0], eps[0], rtol=0, atol=0.2)
    torch.testing.assert_close(v[1], -z_0[1], rtol=0, atol=0.05)


@prediction_types
@pytest.mark.parametrize("t", [0, 100, 400, 999])
def test_the_optimal_denoiser_of_a_gaussian_minimises_the_loss(prediction_type: PredictionType, t: int) -> None:
    # For z_0 ~ N(m, s²): E[z_0 | z_t] = m + √ᾱ s² (z_t - √ᾱ m) / (ᾱ s² + 1-ᾱ), and E[ε | z_t] and E[v |
    # z_t] follow from it linearly. At the minimum of a squared loss the residual is uncorrelated with every
    # function of z_t: here with 1 and z_t, which span all affine denoisers.
    mean, std, num_draws = 0.8, 0.5, 20_000
    at = torch.full((num_draws,), t)
    z_0 = mean + std * draws(num_draws, 1, 1, 1, seed=4)
    eps = draws(num_draws, 1, 1, 1, seed=5)
    z_t = q_sample(z_0, at, eps, SCHEDULE)
    abar = SCHEDULE.alphas_cumprod[t].item()
    centred = (z_t - math.sqrt(abar) * mean) / (abar * std**2 + 1 - abar)
    optimal_z_0 = mean + math.sqrt(abar) * std**2 * centred
    optimal_eps = math.sqrt(1 - abar) * centred
    # Every target is linear in z_0 and ε, so their conditional means give its own.
    optimal = target(prediction_type, optimal_z_0, optimal_eps, at, SCHEDULE)
    wanted = target(prediction_type, z_0, eps, at, SCHEDULE)
    loss = simple_loss(optimal, wanted)
    assert loss.shape == (num_draws,)

    residual = wanted - optimal
    for direction in (torch.ones_like(z_t), z_t):
        gradient = (residual * direction).flatten()
        assert abs(gradient.mean()) < 4 * gradient.std() / math.sqrt(num_draws)

    # And its value is the posterior variance of what is predicted.
    posterior = std**2 * (1 - abar) / (abar * std**2 + 1 - abar)  # of z_0 given z_t
    share = {"sample": 1.0, "epsilon": abar / (1 - abar), "v_prediction": 1 / (1 - abar)}[prediction_type]
    assert abs(loss.mean() - posterior * share) < 4 * loss.std() / math.sqrt(num_draws)

    # Any affine step away costs more; 0.2 is far outside the noise of this many draws.
    scale = wanted.std()
    for a, b in ((0.2, 0.0), (-0.2, 0.0), (0.0, 0.2), (0.0, -0.2)):
        worse = simple_loss(optimal + scale * (a + b * centred / centred.std()), wanted)
        assert worse.mean() > loss.mean()


def test_simple_loss_is_a_mean_per_sample() -> None:
    prediction, wanted = draws(3, 2, 4, 5, seed=6), draws(3, 2, 4, 5, seed=7)
    loss = simple_loss(prediction, wanted)
    assert loss.dtype == torch.float64
    for b in range(3):
        difference = (wanted[b] - prediction[b]).flatten().tolist()
        assert loss[b].item() == pytest.approx(math.fsum(d * d for d in difference) / 40, rel=1e-14)


def test_simple_loss_subtracts_in_float32() -> None:
    # 1 + 2^-9 has no bfloat16: rounding the target before the subtraction would make this loss 0.
    prediction = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    loss = simple_loss(prediction, torch.full((1, 1, 1, 1), 1 + 2**-9))
    assert loss.dtype == torch.float32
    assert loss.item() == 2**-18
    assert simple_loss(prediction, prediction).dtype == torch.float32
    assert simple_loss(prediction, prediction.double()).dtype == torch.float64


def test_simple_loss_has_the_gradient_of_a_square() -> None:
    prediction = draws(2, 1, 2, 2, seed=8).requires_grad_()
    wanted = draws(2, 1, 2, 2, seed=9)
    simple_loss(prediction, wanted).sum().backward()  # pyright: ignore[reportUnknownMemberType]
    assert prediction.grad is not None
    torch.testing.assert_close(prediction.grad, 2 * (prediction - wanted).detach() / 4)


def test_target_and_loss_never_read_a_value_back_to_the_host() -> None:
    z, t = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    for prediction_type in PREDICTION_TYPES:
        assert simple_loss(z, target(prediction_type, z, z, t, SCHEDULE.to("meta"))).shape == (2,)


def test_wrong_shapes_and_names_are_refused() -> None:
    z, t = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"one shape \[B,C,h,w\], got \[2, 4, 8, 8\] and \[2, 1, 8, 8\]"):
        simple_loss(z, z[:, :1])
    with pytest.raises(ValueError, match="one shape"):
        simple_loss(z[0], z[0])
    for prediction_type in PREDICTION_TYPES:
        with pytest.raises(ValueError, match="eps must have z_0's shape"):
            target(prediction_type, z, z[:1], t, SCHEDULE)
        with pytest.raises(ValueError, match="t must be int64"):
            target(prediction_type, z, z, t.int(), SCHEDULE)
    with pytest.raises(ValueError, match="unknown prediction_type 'noise'"):
        target("noise", z, z, t, SCHEDULE)  # pyright: ignore[reportArgumentType]
