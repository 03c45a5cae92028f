"""Intervals and p values of correlations against every permutation, real shuffles and draws made one by one."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, pearson3

from tasks.correlation import DRAWS, bootstrap, fisher, followed, paired, permutation_p, product, redrawn, standardised

LEVELS = (0.1, 0.05, 0.01, 0.002)


def test_constant_rows_are_unknown_whatever_their_value():
    rows = np.array([[0.1] * 7, [1e30] * 7, [0.0] * 7, range(7)])
    assert np.isnan(standardised(rows)[:3]).all()
    assert standardised(rows)[3] == pytest.approx((np.arange(7) - 3) / 2)
    other = np.repeat([[3.0, 1, 4, 1, 5, 9, 2]], 4, 0)
    for found in (paired(rows, other), permutation_p(rows, other), *bootstrap(rows, other, redrawn(7))):
        assert np.isnan(found).tolist() == [True, True, True, False]


def test_three_images_tell_nothing():
    a, s = np.array([[1.0, 2, 3]]), np.array([[1.0, 3, 2]])
    for found in (paired(a, s), permutation_p(a, s), *bootstrap(a, s, redrawn(3))):
        assert np.isnan(found).all()
    assert redrawn(0).shape == (0, DRAWS)


@settings(max_examples=15)
@given(st.sampled_from([6, 7]), st.integers(0, 2**31))
def test_the_fit_has_the_moments_of_all_permutations(count, seed):
    """All of the 720 or 5,040: the p value is the tail of Pearson's distribution with their mean, variance and
    skewness, but no less than one of them, and where that ends no less than the normal one."""
    rng = np.random.default_rng(seed)
    a, s = np.exp(rng.normal(size=(1, count))), rng.gamma(0.5, size=(1, count))
    r = np.array([np.corrcoef(a[0], s[0, list(order)])[0, 1] for order in permutations(range(count))])
    skewness = ((r - r.mean()) ** 3).mean() / r.std() ** 3
    for pair in (s, np.sort(s), -s):
        sign = -1 if pair is not s and (pair < 0).all() else 1
        z = (paired(a, pair) - sign * r.mean()) / r.std()
        least = max(1 / len(r), norm.sf(max(z[0], -2 / (sign * skewness))) if sign * skewness < 0 else 0)
        expected = np.maximum(pearson3.sf(z, sign * skewness), least)
        np.testing.assert_allclose(permutation_p(a, pair), expected, rtol=1e-6, atol=1e-12)


def skewed(count: int = 300) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Activations with few large values and skewed similarities, as of a unit and its name."""
    rng = np.random.default_rng(0)
    heavy, sparse = np.exp(1.5 * rng.normal(size=count)), np.maximum(rng.standard_t(3, size=count) - 1.5, 0)
    return {
        "heavy, right": (heavy, rng.gamma(1.5, size=count)),
        "sparse, right": (sparse, rng.gamma(1, size=count)),
        "heavy, left": (heavy, -rng.gamma(1.5, size=count)),
    }


@settings(max_examples=20)
@given(st.integers(4, 40), st.integers(0, 2**31))
def test_followed_is_what_every_similarity_gives(count, seed):
    """Of float16 vectors of norm 1; unit 2 is constant, and to one concept all images are equally similar."""
    rng = np.random.default_rng(seed)
    x, c = rng.normal(size=(count, 6)), rng.normal(size=(3, 4, 6))
    x, c = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, c))
    x[:, 5], c[1, 2] = 0.25, np.eye(6)[5]
    x, c = x.astype(np.float16).astype(np.float32), c.astype(np.float16).astype(np.float32)
    a = np.exp(rng.normal(size=(3, count))).astype(np.float32)
    a[2] = 0.1
    found, with_first = followed(a, x, c)
    assert np.isnan(followed(a[:, :3], x[:3], c)).all()
    for unit in range(3):
        for concept in range(4):
            if unit == 2 or (unit, concept) == (1, 2):
                assert np.isnan(found[unit, concept])
            else:
                expected = np.corrcoef(a[unit], x.astype(float) @ c[unit, concept])[0, 1]
                assert found[unit, concept] == pytest.approx(expected, abs=1e-9)
                similarity = x.astype(float) @ c[unit, [0, concept]].T
                assert with_first[unit, concept] == pytest.approx(np.corrcoef(similarity.T)[0, 1], abs=1e-9)


@pytest.mark.parametrize("kind", list(skewed()))
def test_p_is_the_share_of_20000_shuffles_and_fishers_is_not(kind):
    a, s = skewed()[kind]
    rng = np.random.default_rng(1)
    shuffled = np.stack([rng.permutation(s) for _ in range(20_000)])
    repeated = np.repeat(a[None], 20_000, 0)
    p, p_fisher = permutation_p(repeated, shuffled), fisher(paired(repeated, shuffled), len(a))[2]
    off, off_fisher = (
        [abs(np.log(max((x < level).mean(), 1 / 20_000) / level)) for level in LEVELS] for x in (p, p_fisher)
    )
    assert np.all(np.array(off) < (0.1, 0.1, 0.2, 0.4)), off  # of 20,000, 40 are below the last level, give or take 6
    assert off_fisher[-1] > 0.9
    assert max(off_fisher) > 3 * max(off)


@pytest.mark.parametrize("active", [1, 2, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_p_of_units_that_few_images_excite_is_never_far_below_the_share_of_all_placements(active, sign):
    """Similarities of strong skewness to the right or left, names that are among the best twentieth by chance. Alone,
    the distribution's end made it 0."""
    count, least = 40 if active < 3 else 24, []
    places = np.array(list(permutations(range(count), active)))
    for seed in range(100):
        rng = np.random.default_rng(seed)
        s, strength, a = sign * rng.gamma(0.5, size=count), 0.2 + rng.exponential(size=active), np.zeros(count)
        sums = s[places] @ strength
        own = np.argsort(-sums)[rng.integers(len(sums) // 20)]
        a[places[own]] = strength
        p, exact = permutation_p(a[None], s[None])[0], (sums >= sums[own] - 1e-12).mean()
        assert p >= 1 / len(places) * (1 - 1e-9)
        least.append(p / exact)
    assert min(least) > 0.2
    assert np.median(least) > 0.75


def test_p_of_unskewed_rows_is_the_normal_one():
    rng = np.random.default_rng(2)
    half = np.abs(rng.normal(size=(1, 500)))
    a, s = np.concatenate([half, -half], 1), rng.normal(size=(1, 1000))
    s = s + np.linspace(0, 0.08, 9)[:, None] * a
    a = np.repeat(a, 9, 0)
    np.testing.assert_allclose(np.log(permutation_p(a, s)), np.log(fisher(paired(a, s), 1000)[2]), rtol=0.02)


@settings(max_examples=10)
@given(st.integers(4, 40), st.integers(0, 2**31))
def test_bootstrap_is_what_every_draw_gives(count, seed):
    rng = np.random.default_rng(seed)
    a, s = np.exp(rng.normal(size=(3, count))).astype(np.float32), rng.normal(size=(3, count)).astype(np.float32)
    a[1] = np.arange(count) == 0  # constant in a third of the draws
    times = redrawn(count)
    assert times.sum(0).tolist() == [count] * DRAWS
    lower, upper = bootstrap(a, s, times)
    for unit in range(3):
        found = []
        for draw in range(DRAWS):
            chosen = np.repeat(np.arange(count), times[:, draw].astype(int))
            x, y = a[unit, chosen].astype(float), s[unit, chosen].astype(float)
            constant = len(set(x.tolist())) == 1 or len(set(y.tolist())) == 1
            found.append(0 if constant else np.corrcoef(x, y)[0, 1])
        assert (lower[unit], upper[unit]) == pytest.approx(tuple(np.quantile(found, (0.025, 0.975))), abs=1e-7)


def test_bootstrap_covers_where_fishers_interval_does_not():
    """The spread of the similarity grows with the activation: Fisher's transform knows nothing of that."""
    rng = np.random.default_rng(3)
    a = rng.standard_t(5, size=(1500, 200))
    s = 0.3 * a + a * rng.normal(size=a.shape)
    truth = 0.3 / np.sqrt(0.09 + 1)
    lower, upper = bootstrap(a, s, redrawn(200))
    low, high, _ = fisher(paired(a, s), 200)
    assert np.mean((lower <= truth) & (truth <= upper)) > 0.87
    assert np.mean((low <= truth) & (truth <= high)) < 0.75


def test_bootstrap_does_not_depend_on_the_other_units():
    rng = np.random.default_rng(4)
    a, s, times = rng.gamma(0.3, size=(37, 60)), rng.normal(size=(37, 60)), redrawn(60)
    whole = np.stack(bootstrap(a, s, times))
    parts = [np.stack(bootstrap(a[i : i + 5], s[i : i + 5], times)) for i in range(0, 37, 5)]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-9)


def test_float64_products_of_float16_vectors_are_exact():
    """Against whole numbers: every float16 below 1 is a multiple of 2^-24. So they do not depend on blocks or order."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(9, 512)), rng.normal(size=(512, 70))
    x, y = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16), (y / 30).astype(np.float16)
    whole = (x.astype(float) * 2**24).astype(np.int64) @ (y.astype(float) * 2**24).astype(np.int64)
    found = product(x.astype(np.float64), y.astype(np.float64))
    assert np.array_equal(found, whole / 2.0**48)
    assert np.array_equal(product(x[3:4].astype(np.float64), y.astype(np.float64)), found[3:4])
