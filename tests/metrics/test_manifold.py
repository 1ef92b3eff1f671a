import numpy as np
import pytest

from pipeline.metrics.manifold import density_coverage, fidelity_by_image, manifold, precision_recall


def features(num, width=6, seed=0):
    return np.random.default_rng(seed).standard_normal((num, width))


def column(*values):
    return np.array(values, dtype=np.float64)[:, None]


def by_loops(real, fake, k):
    """Kynkäänniemi et al. 2019 and Naeem et al. 2020, a distance at a time: (precision, recall, density, coverage)."""

    def distance(a, b):
        return np.sqrt(sum((a - b) ** 2))

    def radius(points, i):
        return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    in_real = [[distance(x, y) <= radius(real, i) for i, x in enumerate(real)] for y in fake]
    in_fake = [[distance(x, y) <= radius(fake, j) for j, y in enumerate(fake)] for x in real]
    precision = np.mean([any(row) for row in in_real])
    recall = np.mean([any(row) for row in in_fake])
    density = np.sum(in_real) / (k * len(fake))
    coverage = np.mean([any(column) for column in zip(*in_real, strict=True)])
    return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_is_the_formulas(k, dtype):
    real, fake = features(30).astype(dtype), (features(22, seed=1) * 1.3 + 0.4).astype(dtype)
    precision, recall, density, coverage = by_loops(real.astype(np.float64), fake.astype(np.float64), k)
    assert precision_recall(real, fake, k) == pytest.approx((precision, recall), abs=1e-12)
    assert density_coverage(real, fake, k) == pytest.approx((density, coverage), abs=1e-12)


def test_one_pass_gives_all_four():
    real, fake = features(30), features(22, seed=1)
    both = manifold(real, fake, k_precision_recall=2, k_density_coverage=4)
    assert both[:2] == precision_recall(real, fake, k=2)
    assert both[2:4] == density_coverage(real, fake, k=4)
    assert both[4:] == (30, 22, 2, 4)
    assert manifold(real, fake)[6:] == (3, 5)  # the papers' choices


def test_precision_and_density_are_means_over_the_fakes():
    real, fake = features(60), features(45, seed=1) * 1.3
    is_precise, density = fidelity_by_image(real, fake)
    whole = manifold(real, fake)
    assert (is_precise.mean(), density.mean()) == pytest.approx((whole.precision, whole.density), abs=1e-12)
    alone = fidelity_by_image(real, fake[7:8])  # what one image is does not depend on the others
    assert (alone[0][0], alone[1][0]) == (is_precise[7], density[7])


def test_known_configuration():
    # On a line with k = 1, real balls: [-1, 1], [0, 2], [1, 3], [2, 18]; fake balls: [0.5, 1.5], [1, 2] and
    # [1.5, 38.5], which recalls the real outlier at 10.
    real, fake = column(0, 1, 2, 10), column(1, 1.5, 20)
    fake_in_real_balls = [3, 2, 0]  # 1 is on two surfaces and in a centre; 1.5 in [0, 2] and [1, 3]
    assert precision_recall(real, fake, k=1) == pytest.approx((2 / 3, 3 / 4))
    assert density_coverage(real, fake, k=1) == pytest.approx((sum(fake_in_real_balls) / 3, 3 / 4))


def test_a_ball_includes_its_surface_and_a_sample_is_not_its_own_neighbour():
    # k = 1: both real radii are 2, so the fakes at 4 and at -2 lie exactly on surfaces, and 4.001 outside.
    assert precision_recall(column(0, 2), column(4, 4.001, -2), k=1)[0] == pytest.approx(2 / 3)


def test_equal_sets():
    real = features(40)
    same = manifold(real, real)
    assert same[:4] == (1.0, 1.0, (5 + 1) / 5, 1.0)  # density: the k neighbours in a ball, and its centre


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_duplicates_and_points_on_surfaces_survive_rounding(offset):
    # Every sample four times: with k = 3 all radii are 0, where only exact copies are inside.
    real = np.repeat(features(10, width=64), 4, axis=0) + offset
    same = manifold(real, real[::-1].copy(), k_precision_recall=3, k_density_coverage=3)
    assert same[:4] == (1.0, 1.0, 4 / 3, 1.0)
    apart = manifold(real, real + 0.1, k_precision_recall=3, k_density_coverage=3)
    assert apart[:4] == (0.0, 0.0, 0.0, 0.0)


def test_sets_far_apart_share_nothing():
    assert manifold(features(20), features(20, seed=1) + 100)[:4] == (0.0, 0.0, 0.0, 0.0)


def test_one_source_has_density_one():
    both = manifold(features(1000), features(1000, seed=1))
    assert both.density == pytest.approx(1.0, abs=0.05)
    assert both.coverage == pytest.approx(1 - 2**-5, abs=0.02)  # Naeem et al. 2020: 1 - 2^-k for N = M


def test_a_missing_mode_lowers_recall_and_coverage_only():
    modes = np.repeat([[0.0, 0.0], [30.0, 0.0], [0.0, 30.0]], 60, axis=0)
    real, fake = modes + features(180, width=2), modes + features(180, width=2, seed=1)
    whole, part = manifold(real, fake), manifold(real, fake[:120])
    assert part.precision >= whole.precision - 0.03
    assert part.recall <= 2 / 3 < whole.recall
    assert part.coverage <= 2 / 3 < whole.coverage


def test_recall_and_coverage_grow_with_the_number_of_fakes():
    real, fake = features(400), features(400, seed=1)
    few, many = manifold(real, fake[:50]), manifold(real, fake)
    assert few.coverage < many.coverage - 0.2


@pytest.mark.filterwarnings("ignore:Could not adhere to working_memory config")
def test_chunks_do_not_change_the_result():
    real, fake = features(3000, width=16), features(500, width=16, seed=1)
    one, many = manifold(real, fake), manifold(real, fake, chunk_mib=1)  # 262 rows a chunk: 12 of them
    assert one == many
    assert 0 < one.recall < 1


def test_what_has_no_manifold_says_why():
    x = features(10)
    with pytest.raises(ValueError, match="fake features: needs at least 6 samples, got 5"):
        manifold(x, x[:5])
    with pytest.raises(ValueError, match="real features: needs at least 4 samples, got 3"):
        precision_recall(x[:3], x)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        density_coverage(x, x, k=0)
    with pytest.raises(ValueError, match="differ in width"):
        manifold(x, x[:, :2])
