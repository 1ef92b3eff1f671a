"""The random numbers are the published ones, apart where they must be apart, and the same for ever."""

from itertools import combinations, product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from pipeline.data.draws import Purpose, integer_seed, normal, permutation, signs, stream, uniform, uniforms

MASK = 2**64 - 1


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011, section 3.3 and table 2), written from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high_0, low_0 = divmod(0xD2E7470EE14C6C93 * c[0], 2**64)
        high_1, low_1 = divmod(0xCA5A826395121157 * c[2], 2**64)
        c = [high_1 ^ c[1] ^ k[0], low_1, high_0 ^ c[3] ^ k[1], low_0]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def hexes(words: NDArray[np.unsignedinteger]) -> list[str]:
    return [hex(word) for word in words.tolist()]


@pytest.mark.parametrize(("seed", "place"), [(7, 12345), (0, 0), (2**63 - 1, 2**62), (2**64 - 1, 2**64 - 1)])
def test_words_are_those_of_the_paper(seed: int, place: int) -> None:
    words = stream(seed, Purpose.BLOCK_ORDER, place, fine=6, finer=9).random_raw(8).tolist()
    key = [seed, Purpose.BLOCK_ORDER]
    assert words == philox4x64([1, 9, 6, place], key) + philox4x64([2, 9, 6, place], key)


def test_golden_words() -> None:
    assert hexes(stream(7, Purpose.NOISE, 12345).random_raw(5)) == [
        "0x4054a0bc0fd9bca1",
        "0x7df29d493a3c4e53",
        "0x9ae2f829241d598",
        "0x9335cf711aca63a7",
        "0xd98f1611a525dfce",
    ]


def test_golden_permutations() -> None:
    assert permutation(12, 7, Purpose.SHARD_ORDER, 3).tolist() == [0, 2, 7, 11, 6, 4, 1, 8, 9, 5, 10, 3]
    fine = permutation(12, 7, Purpose.BLOCK_ORDER, 3, fine=2, finer=1)
    assert fine.tolist() == [0, 4, 7, 8, 1, 11, 10, 9, 3, 6, 5, 2]


def test_golden_uniforms() -> None:
    drawn = [uniform(7, Purpose.TIMESTEP, place).hex() for place in range(3)]
    assert drawn == ["0x1.8f46d54719bb0p-5", "0x1.2b3e2573da9fbp-1", "0x1.d95367e051bfcp-2"]


def test_the_first_of_many_uniforms_is_the_one() -> None:
    many = uniforms(7, Purpose.TIMESTEP, 2, 1000)
    assert many[0] == uniform(7, Purpose.TIMESTEP, 2)
    assert stats.kstest(many, "uniform").pvalue > 0.01


def test_signs_are_fair_and_apart_by_their_fine_place() -> None:
    drawn = signs(7, Purpose.LIKELIHOOD_PROBE, 5, (100, 100))
    assert set(drawn.flatten().tolist()) == {-1.0, 1.0}
    assert abs(float(drawn.mean())) < 4 / 100
    other = signs(7, Purpose.LIKELIHOOD_PROBE, 5, (100, 100), fine=1)
    assert abs(float((drawn * other).mean())) < 4 / 100


def test_golden_normals() -> None:
    drawn = normal(7, Purpose.NOISE, 5, (2, 3))
    assert drawn.dtype == np.float32
    assert hexes(drawn.ravel().view(np.uint32)) == [
        "0x3db38126",
        "0x3ef0deed",
        "0x3f225eb2",
        "0x3f7710b9",
        "0xbe80827c",
        "0x3ecf1ba8",
    ]


def test_golden_seed_for_others() -> None:
    assert integer_seed(7, Purpose.SAMPLE, 5) == 3194676407711282040
    assert all(0 <= integer_seed(seed, Purpose.SAMPLE, 0) < 2**63 for seed in range(100))


def test_purposes_keep_their_numbers() -> None:
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "SHARD_ORDER": 1,
        "BLOCK_ORDER": 2,
        "POSTERIOR": 3,
        "NOISE": 4,
        "TIMESTEP": 5,
        "CONDITION_DROPOUT": 6,
        "SAMPLE": 7,
        "INITIAL_WEIGHTS": 8,
        "LINE_START": 9,
        "CROP": 10,
        "FLIP": 11,
        "SUBSTITUTE": 12,
        "TIMESTEP_ALONE": 13,
        "LIKELIHOOD_POSTERIOR": 14,
        "LIKELIHOOD_TIMESTEPS": 15,
        "LIKELIHOOD_NOISE": 16,
        "LIKELIHOOD_PROBE": 17,
        "TRANSFORM": 18,
        "EVIDENCE_POSTERIOR": 19,
        "EVIDENCE_FIT": 20,
        "VALIDATION_TIMESTEP": 21,
        "VALIDATION_NOISE": 22,
    }


def test_a_draw_depends_on_nothing_drawn_before() -> None:
    first = normal(1, Purpose.NOISE, 10, (4,))
    np.random.seed(0)
    normal(1, Purpose.NOISE, 9, (1000,))
    assert np.array_equal(normal(1, Purpose.NOISE, 10, (4,)), first)
    assert np.array_equal(normal(1, Purpose.NOISE, 10, (100,))[:4], first)


def test_no_two_streams_share_a_word() -> None:
    places = list(product((0, 1, 2, 2**32), Purpose, (0, 1, 2, 2**32), (0, 1), (0, 1)))
    words = [
        word
        for seed, purpose, place, fine, finer in places
        for word in stream(seed, purpose, place, fine=fine, finer=finer).random_raw(8).tolist()
    ]
    assert len(set(words)) == len(words) == 8 * len(places)


def test_streams_are_uncorrelated() -> None:
    n = 20_000
    drawn = [
        normal(seed, purpose, place, (n,)) for seed, purpose, place in product((0, 1), tuple(Purpose)[2:6], (0, 1))
    ]
    for one, other in combinations(drawn, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(n)


def test_posterior_and_noise_differ() -> None:
    for position in range(200):
        posterior, eps = (normal(0, purpose, position, (64,)) for purpose in (Purpose.POSTERIOR, Purpose.NOISE))
        assert not np.any(posterior == eps)


def test_normals_are_normal() -> None:
    x = np.concatenate([normal(3, Purpose.NOISE, position, (256,)) for position in range(800)]).astype(np.float64)
    sigma = 1 / np.sqrt(x.size)
    assert abs(x.mean()) < 4 * sigma
    assert abs(x.var() - 1) < 4 * np.sqrt(2) * sigma
    assert abs((x**3).mean()) < 4 * np.sqrt(15) * sigma
    assert abs((x**4).mean() - 3) < 4 * np.sqrt(96) * sigma
    assert stats.kstest(x, "norm").pvalue > 1e-3


def test_first_numbers_of_positions_are_independent() -> None:
    x = np.concatenate([normal(4, Purpose.NOISE, position, (1,)) for position in range(8000)])
    u = np.array([uniform(4, Purpose.TIMESTEP, position) for position in range(8000)])
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    for numbers in (x, u):
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / np.sqrt(8000)


def test_uniforms_are_below_one_with_53_bits() -> None:
    for position in range(1000):
        u = uniform(5, Purpose.CONDITION_DROPOUT, position)
        assert 0 <= u < 1 and (u * 2**53).is_integer()


def test_permutations_are_uniform() -> None:
    n = 6000
    orders = [tuple(permutation(3, 6, Purpose.SHARD_ORDER, epoch).tolist()) for epoch in range(n)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 6
    assert np.abs(counts - n / 6).max() < 4.5 * np.sqrt(n * 5 / 36)


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_a_permutation_has_every_number_once(n: int) -> None:
    assert sorted(permutation(n, 1, Purpose.SHARD_ORDER, 0).tolist()) == list(range(n))


def test_a_long_draw_does_not_reach_the_next_position() -> None:
    generator = stream(1, Purpose.NOISE, 5, fine=3, finer=4)
    mine = generator.random_raw(2**17)
    state: dict[str, NDArray[np.uint64]] = generator.state["state"]
    assert state["counter"].tolist() == [2**15, 4, 3, 5]  # four words a count; the place stands still
    for place, fine, finer in ((6, 3, 4), (5, 4, 4), (5, 3, 5)):
        other = stream(1, Purpose.NOISE, place, fine=fine, finer=finer).random_raw(2**17)
        assert not np.intersect1d(mine, other).size


@pytest.mark.parametrize("large", [2**53, 2**62, 2**63 - 2, 2**63, 2**64 - 2])
def test_large_seeds_and_positions_are_told_apart(large: int) -> None:
    drawn = [
        normal(seed, Purpose.NOISE, position, (16,)).tobytes()
        for seed, position in ((large, 0), (large + 1, 0), (0, large), (0, large + 1), (large, large), (0, 0))
    ]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("wrong", [-1, 2**64])
def test_what_does_not_fit_is_refused(wrong: int) -> None:
    with pytest.raises(OverflowError):
        uniform(wrong, Purpose.NOISE, 0)
    with pytest.raises(OverflowError):
        uniform(0, Purpose.NOISE, wrong)
