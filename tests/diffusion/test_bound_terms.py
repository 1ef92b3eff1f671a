"""Some of the bound's terms for all of them: unbiased, in their places, or refused."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.bound import Bound, Terms, every_term, reverse_of, stratified_terms, variational_bound
from pipeline.diffusion.schedule import Schedule, make_schedule

T = 1000
SCHEDULE = make_schedule("linear", T, 1e-4, 0.02)


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_bound(schedule: Schedule, chosen: Terms | None, batch: int) -> Bound:
    z_0 = draws(1, 2, 2, 2, seed=7).expand(batch, -1, -1, -1)
    table = draws(schedule.num_timesteps, 2, 2, 2, seed=8)  # one ε for each t
    reverse = reverse_of(lambda z_t, t: 0.3 * z_t, schedule, "epsilon", "fixed_large")
    return variational_bound(z_0, schedule, reverse, lambda t: table[t], chosen=chosen)


@pytest.mark.parametrize(("num_timesteps", "num_parts"), [(8, 1), (8, 3), (8, 7), (9, 4), (2, 1)])
def test_the_mean_over_all_choices_of_terms_is_the_bound(num_timesteps: int, num_parts: int) -> None:
    schedule = make_schedule("linear", num_timesteps, 0.01, 0.4)
    some = stratified_terms(torch.zeros(1, num_parts, dtype=torch.float64), schedule)
    sizes_found = some.weight[0, 1:].long().tolist()
    assert sizes_found == sorted(sizes_found) and sum(sizes_found) == num_timesteps - 1 and min(sizes_found) >= 1
    # the middle of each t's share of [0, 1)
    places = [[(i + 0.5) / n for i in range(n)] for n in sizes_found]
    u = torch.tensor(list(itertools.product(*places)), dtype=torch.float64)
    chosen = stratified_terms(u, schedule)
    part = small_bound(schedule, chosen, len(u))
    whole = small_bound(schedule, None, 1)
    assert chosen.t[:, 1:].unique().tolist() == list(range(1, num_timesteps))
    for name in ("total", "rate", "distortion", "total_bits"):
        assert getattr(part, name).mean().item() == pytest.approx(getattr(whole, name).item(), rel=1e-12)
    if num_parts == num_timesteps - 1:
        assert torch.equal(chosen.t, every_term(1, schedule).t)
        assert torch.equal(chosen.weight, every_term(1, schedule).weight)


def test_parts_double_where_t_does() -> None:
    sizes = stratified_terms(torch.zeros(1, 10, dtype=torch.float64), make_schedule("linear", 1024, 1e-4, 0.02)).weight
    assert sizes[0].tolist() == [1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def test_the_ends_of_each_part_stay_inside_it() -> None:
    last = math.nextafter(1.0, 0.0)
    for num_parts in (1, 7, 64, 333, 998, 999):
        low = stratified_terms(torch.zeros(1, num_parts, dtype=torch.float64), SCHEDULE)
        high = stratified_terms(torch.full((1, num_parts), last, dtype=torch.float64), SCHEDULE)
        assert low.t[0, :2].tolist() == [0, 1]
        assert high.t[0, -1] == T - 1
        assert torch.equal((high.t - low.t)[0, 1:] + 1, low.weight[0, 1:].long())
        assert torch.equal(high.t[0, 1:-1] + 1, low.t[0, 2:])
        assert low.weight.sum() == T


def test_bits_are_nats_over_ln_2_and_the_parts_make_the_whole() -> None:
    schedule = make_schedule("linear", 8, 0.01, 0.4)
    bound = small_bound(schedule, stratified_terms(torch.full((3, 2), 0.6, dtype=torch.float64), schedule), 3)
    torch.testing.assert_close(bound.rate + bound.distortion, bound.total, rtol=0, atol=0)
    torch.testing.assert_close(bound.distortion, bound.terms[:, 0], rtol=0, atol=0)
    for bits, nats in (
        (bound.prior_bits, bound.prior),
        (bound.terms_bits, bound.terms),
        (bound.total_bits, bound.total),
    ):
        torch.testing.assert_close(bits * math.log(2), nats)


# What is refused ----------------------------------------------------------------------------------

U = torch.full((2, 3), 0.5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("u", "message"),
    [
        (U.float(), r"u must be float64 \[B,K\], got torch.float32 of shape \[2, 3\]"),
        (U[0], r"u must be float64 \[B,K\], got torch.float64 of shape \[3\]"),
        (U[:, :0], "1 to T - 1 = 7 columns, got 0"),
        (U.repeat(1, 3), "1 to T - 1 = 7 columns, got 9"),
        (U + 0.5, r"u must lie in \[0, 1\), got values from 1.0 to 1.0"),
        (U * math.nan, r"u must lie in \[0, 1\)"),
    ],
)
def test_bad_numbers_choose_no_terms(u: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stratified_terms(u, make_schedule("linear", 8, 0.01, 0.4))


@pytest.mark.parametrize(
    ("t", "weight", "message"),
    [
        (
            torch.zeros(2, 3).long(),
            torch.ones(2, 2),
            r"with B = 2, got t \[2, 3\] and weight \[2, 2\]",
        ),
        (torch.zeros(3, 3).long(), torch.ones(3, 3), r"with B = 2, got t \[3, 3\]"),
        (torch.zeros(2, 0).long(), torch.ones(2, 0), r"got t \[2, 0\]"),
        (torch.zeros(2, 3), torch.ones(2, 3), "int64"),
        (torch.tensor([[0, 8], [0, 1]]), torch.ones(2, 2), r"t must lie in \[0, 8\), got 8"),
        (torch.tensor([[0, 1], [1, 1]]), torch.ones(2, 2), r"first column of chosen.t must be 0, .* got \[0, 1\]"),
    ],
)
def test_bad_choices_are_refused(t: Tensor, weight: Tensor, message: str) -> None:
    schedule = make_schedule("linear", 8, 0.01, 0.4)
    with pytest.raises(ValueError, match=message):
        small_bound(schedule, Terms(t, weight), 2)
