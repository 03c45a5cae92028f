"""Every metric equals an obvious loop, ties favour nobody, and spoilt explanations cost what theory says they cost."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.correlation import paired
from tasks.metrics import auc, auprc, cosine, f1, iou, mad, positives

UNITS = ("any", "tied", "constant", "below zero", "never", "always", "once")
"""Of the rows that `units` draws."""


def units(seed: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations and similarities, float32 [U, N], and the units' positives, one row for each of UNITS."""
    rng = np.random.default_rng(seed)
    a, s = rng.standard_t(2, (2, len(UNITS), count)).astype(np.float32)
    a[1], s[1] = a[1].round(), s[1].round()
    a[2], s[2] = 0.1, 0.7
    a[3] = -np.abs(a[3]) - 1
    positive = a > np.median(a, axis=1, keepdims=True)
    positive[2] = rng.random(count) < 0.5
    positive[4], positive[5] = False, True
    positive[6] = np.arange(count) == 0
    return a, s, positive


def slow_auc(score, positive):
    wins = [(x > y) + (x == y) / 2 for x in score[positive] for y in score[~positive]]
    return np.mean(wins) if wins else np.nan


def slow_auprc(score, positive):
    """The area under the steps of precision over recall, one step for each score that there is, best first."""
    if positive.all() or not positive.any():
        return np.nan
    area, recall = 0.0, 0.0
    for limit in sorted(set(score.tolist()), reverse=True):
        chosen = score >= limit
        found = (positive & chosen).sum()
        area += (found / positive.sum() - recall) * found / chosen.sum()
        recall = found / positive.sum()
    return area


def slow_f1(positive, said):
    if not positive.any():
        return np.nan
    true = sum(p and s for p, s in zip(positive, said, strict=True))
    if not true:
        return 0
    precision, recall = true / said.sum(), true / positive.sum()
    return 2 * precision * recall / (precision + recall)


def slow_iou(positive, said):
    one, other = set(np.flatnonzero(positive)), set(np.flatnonzero(said))
    return len(one & other) / len(one | other) if one else np.nan


def slow_mad(a, said):
    others = a[~said].astype(np.float64)
    if said.all() or not said.any() or len(set(others.tolist())) == 1:
        return np.nan
    return (a[said].astype(np.float64).mean() - others.mean()) / others.std()


def slow_cosine(a, s):
    a, s = a.astype(np.float64), s.astype(np.float64)
    return a @ s / np.sqrt((a @ a) * (s @ s)) if a.any() and s.any() else np.nan


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 60))
@example(0, 1)
def test_metrics_equal_a_slow_look_at_each_unit(seed, count):
    a, s, positive = units(seed, count)
    said = positives(s, s)
    for fast, slow, given_ in [
        (auc, slow_auc, (s, positive)),
        (auprc, slow_auprc, (s, positive)),
        (f1, slow_f1, (positive, said)),
        (iou, slow_iou, (positive, said)),
        (mad, slow_mad, (a, positive)),
        (cosine, slow_cosine, (a, s)),
        (cosine, slow_cosine, (positive, said)),
    ]:
        expected = [slow(*rows) for rows in zip(*given_, strict=True)]
        np.testing.assert_allclose(fast(*given_), expected, rtol=1e-9, atol=1e-12, err_msg=fast.__name__)


def test_what_rows_that_tell_nothing_give():
    a, s, positive = units(0, 40)
    never, always, constant = UNITS.index("never"), UNITS.index("always"), UNITS.index("constant")
    for metric in (auc, auprc):
        assert np.flatnonzero(np.isnan(metric(s, positive))).tolist() == [never, always]
    assert auc(s, positive)[constant] == 0.5
    assert auprc(s, positive)[constant] == pytest.approx(positive[constant].mean())
    assert np.flatnonzero(np.isnan(mad(a, positive))).tolist() == [constant, never, always]
    nothing = np.zeros_like(positive)
    for metric in (f1, iou):
        assert np.flatnonzero(np.isnan(metric(positive, positive))).tolist() == [never]
        assert metric(positive, nothing)[constant] == 0
    assert np.isnan(cosine(positive, positive)[never])
    empty = np.zeros((3, 0))
    for metric, first in ((auc, empty), (auprc, empty), (f1, empty > 0), (iou, empty > 0), (mad, empty)):
        assert np.isnan(metric(first, empty > 0)).all()


@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(0, 300))
def test_positives_lie_above_all_but_a_twentieth_of_the_sample(seed, count, sampled):
    rng = np.random.default_rng(seed)
    values, sample = rng.normal(size=(3, count)), rng.normal(size=(3, sampled))
    values[1], sample[1] = values[1].round(), sample[1].round()
    values[2], sample[2] = 3, 3
    found = positives(values, sample)
    if not sampled:
        assert not found.any()
        return
    for row, known, positive in zip(values, sample, found, strict=True):
        threshold = min(x for x in known if (known <= x).mean() >= 0.95 - 1e-12)
        assert positive.tolist() == (row > threshold).tolist()
    assert positives(sample, sample).sum(1).max() <= sampled / 20 + 1e-9


@given(st.integers(0, 2**31), st.integers(2, 60))
def test_only_the_order_of_the_scores_matters(seed, count):
    _, s, positive = units(seed, count)
    order = np.random.default_rng(seed).permutation(count)
    for metric in (auc, auprc):
        found = metric(s, positive)
        np.testing.assert_allclose(metric(np.arctan(s.astype(np.float64)) * 3 - 7, positive), found)
        np.testing.assert_allclose(metric(s[:, order], positive[:, order]), found, rtol=1e-12)
    np.testing.assert_allclose(auc(-s, positive), 1 - auc(s, positive), atol=1e-12)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(2, 40))
def test_ties_are_not_favoured(seed, count):
    """With ties, auc is the mean over the ways to break them; auprc is the same in whatever order the images come."""
    rng = np.random.default_rng(seed)
    score, positive = rng.integers(0, 3, (1, count)).astype(float), rng.random((1, count)) < 0.4
    broken = score + rng.random((2000, count)) / 2
    some = np.repeat(positive, 2000, 0)
    if positive.all() or not positive.any():
        assert np.isnan(auprc(score, positive)).all()
        return
    assert auc(score, positive)[0] == pytest.approx(auc(broken, some).mean(), abs=0.06)
    order = rng.permutation(count)
    np.testing.assert_allclose(auprc(score[:, order], positive[:, order]), auprc(score, positive), rtol=1e-12)
    assert auprc(np.zeros((1, count)), positive)[0] == pytest.approx(positive.mean())


def explained(frequency: float, count: int = 100_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A unit that is its concept, bool [1, N]; what misses half of it, and what says it twice as often."""
    place, many = np.random.default_rng(0).permutation(count)[None], round(frequency * count)
    return place < many, place < many // 2, place < 2 * many


@pytest.mark.parametrize("frequency", [0.1, 0.01, 0.001])
def test_missing_and_extra_labels_cost_what_they_should(frequency):
    """The sanity tests of Oikarinen, Yan and Weng (ICML 2025): every metric here drops when half of the explanation's
    positives go, and when as many wrong ones come."""
    unit, missing, extra = explained(frequency)
    for metric, by in ((f1, -1 / 3), (iou, -1 / 2), (mapped(cosine), -0.1464)):
        perfect = metric(unit, unit)[0]
        assert perfect == pytest.approx(1)
        assert metric(unit, missing)[0] - perfect == pytest.approx(by, abs=5e-4)
        assert metric(unit, extra)[0] - perfect == pytest.approx(by, abs=5e-4)
    g = frequency
    for says, precision in ((missing, 0.5 + 0.5 * g), (extra, 0.5)):
        assert auprc(says.astype(float), unit)[0] == pytest.approx(precision, abs=5e-4)
    r_missing, r_extra = np.sqrt((1 - g) / (2 - g)), np.sqrt((1 - 2 * g) / (2 - 2 * g))
    for says, r in ((missing, r_missing), (extra, r_extra)):
        assert mapped(paired)(unit, says)[0] == pytest.approx((1 + r) / 2, abs=5e-4)
    if g == 0.1:
        assert mapped(paired)(unit, missing)[0] - 1 == pytest.approx(-0.156, abs=5e-4)
        assert mapped(paired)(unit, extra)[0] - 1 == pytest.approx(-0.167, abs=5e-4)


def test_auc_hardly_sees_extra_labels_of_rare_concepts():
    """Why auprc stands beside it: as many wrong images as right ones cost it half of the concept's frequency."""
    unit, missing, extra = explained(0.01)
    assert auc(missing.astype(float), unit)[0] - 1 == pytest.approx(-0.25, abs=5e-4)
    assert auc(extra.astype(float), unit)[0] - 1 == pytest.approx(-0.01 / 0.99 / 2, abs=5e-4)


def mapped(metric):
    """To [0, 1]."""
    return lambda a, s: (metric(a, s) + 1) / 2
