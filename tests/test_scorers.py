"""Every scorer equals a slow reference written from its formula; the stage's marginal is the same for any sharding."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.correlation import correlations, fisher, followed
from tasks.evidence import Evidence, Sample
from tasks.explanations import explain
from tasks.layers import Block
from tasks.meanings import adding, meaning_shares, share, unexplained
from tasks.neurons import NeuronsSettings, benjamini_hochberg, decide, unit_state
from tasks.scorers import SCORERS, ScorerSettings, log_mean_exp, peak_or_whole, ranks, share_asked
from tasks.tables import make_table
from tasks.validation import best_rival


def unit_norm(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def evidence(seed, units=5, patches=4, exemplars=7, concepts=11, width=6, images=83):
    """Random evidence; unit 1 has fewer patches and exemplars, unit 2 has none (dead), unit 3 is always negative, unit
    4 has ties (mostly zero)."""
    rng = np.random.default_rng(seed)
    has_patch, has_exemplar = np.ones((units, patches), bool), np.ones((units, exemplars), bool)
    has_patch[1, 2:] = has_exemplar[1, 3:] = False
    has_patch[2] = has_exemplar[2] = False
    arrays = {
        "concepts_CD": unit_norm(rng, concepts, width),
        "patches_UPD": unit_norm(rng, units, patches, width) * has_patch[..., None],
        "has_patch_UP": has_patch,
        "levels_UP": rng.integers(0, 3, (units, patches)),
        "exemplars_UKD": unit_norm(rng, units, exemplars, width) * has_exemplar[..., None],
        "has_exemplar_UK": has_exemplar,
        "summed_UD": rng.normal(size=(units, width)).astype(np.float32) * 100,
        "weighted_UD": rng.normal(size=(units, width)).astype(np.float32) * 100,
        "null_mean_LC": rng.normal(size=(3, concepts)).astype(np.float32) / 10,
        "null_std_LC": (0.05 + rng.random((3, concepts))).astype(np.float32),
    }
    vectors, a = unit_norm(rng, images, width), rng.normal(size=(units, images)).astype(np.float32)
    a[2:3], a[3:4], a[4:] = 0, -1 - np.abs(a[3:4]), a[4:].clip(0.5) - 0.5
    tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in (arrays | {"activations_US": a}).items()}
    mean = vectors.mean(0)
    sample = Sample(torch.from_numpy(vectors - mean), torch.from_numpy(mean), tensors["concepts_CD"])
    found = Evidence(**tensors, sample=sample)
    return found, {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in arrays.items()} | {
        "similarity": vectors.astype(np.float64) @ arrays["concepts_CD"].T.astype(np.float64),
        "activations": a.astype(np.float64),
    }


def slow(name, a, unit, concept):
    c = a["concepts_CD"][concept].astype(np.float64)
    patches = [
        (p, level)
        for p, level, has in zip(a["patches_UPD"][unit], a["levels_UP"][unit], a["has_patch_UP"][unit], strict=True)
        if has
    ]
    if name == "mean_cosine":
        return sum(float(p @ c) for p, _ in patches) / max(len(patches), 1)
    if name == "contrastive":
        above = sum(float(p @ c) - a["null_mean_LC"][level, concept] for p, level in patches)
        return above / max(np.sqrt(sum(a["null_std_LC"][level, concept] ** 2 for _, level in patches)), 1e-6)
    if name == "weighted_mean":
        w = a["weighted_UD"][unit].astype(np.float64)
        return w @ c / np.linalg.norm(w) / a["null_std_LC"][0, concept]
    if name in ("soft_wpmi", "wpmi", "joint"):
        return slow_pmi(name, a, unit, concept)
    return slow_dense(name, a["activations"][unit], a["similarity"], concept)


def slow_pmi(name, a, unit, concept):
    total = 0.0
    for rank, (x, has) in enumerate(zip(a["exemplars_UKD"][unit], a["has_exemplar_UK"][unit], strict=True)):
        if has:
            likely = np.exp({"soft_wpmi": 10, "wpmi": 2, "joint": 100}[name] * a["concepts_CD"] @ x)
            likely = likely[concept] / likely.sum()
            inside = 0.998 - rank / (10 if name == "joint" else 100) * (0.998 - 0.97)
            total += np.log((likely if name == "wpmi" else 1 + inside * (likely - 1)) + 1e-7)
    return total


def slow_dense(name, a, similarity, concept):
    s = similarity[:, concept]
    if name == "correlation":
        return np.corrcoef(a, s)[0, 1] if a.std() else 0.0
    if name == "cos_cubed":
        q, p = (a - a.mean()) ** 3, (s - s.mean()) ** 3
        return q @ p / np.linalg.norm(q) / np.linalg.norm(p) if q.any() else 0.0
    if name == "auc":
        of = np.isin(np.arange(len(s)), np.argsort(-s)[: round(len(s) * 0.05)])
        return np.mean([(x > y) + (x == y) / 2 for x in a[of] for y in a[~of]])
    if name == "linear":
        return slow_linear(a, similarity)[concept]
    assert name == "rank_reorder"
    top = sorted(range(len(a)), key=lambda i: -a[i])[: int(len(a) * 0.05)]
    by_similarity = sorted(range(len(top)), key=lambda i: -s[top[i]])
    error = sum(abs(a[top[place]] - a[top[rank]]) ** 3 for rank, place in enumerate(by_similarity)) / len(top)
    random = np.mean([abs(a[i] - a[j]) ** 3 for i in top for j in top])
    return -error / max(random, 1e-12) / max(np.mean(s[top]), 1e-3) ** 0.5


def slow_linear(a, similarity):
    """Greedy regression on standardised columns, refitted after each choice."""
    x, y, chosen = (similarity - similarity.mean(0)) / similarity.std(0), a - a.mean(), []
    rest, weights = y, np.zeros(0)
    deviation = max(a.std(), 1e-12)
    for _ in range(5):
        follow = x.T @ rest
        follow[chosen] = -np.inf
        chosen.append(int(follow.argmax()))
        picked = x[:, chosen]
        weights = np.linalg.solve(picked.T @ picked / len(y) + 1e-4 * np.eye(len(chosen)), picked.T @ y / len(y))
        rest = y - picked @ weights
    scores = np.minimum(x.T @ rest / len(y), weights.min())
    scores[chosen] = weights
    return scores / deviation


@pytest.mark.parametrize("name", list(SCORERS))
@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_scorers_equal_their_formulas(name, seed):
    found, arrays = evidence(seed)
    scores = SCORERS[name].score(found)
    assert scores.shape == (5, 11)
    expected = [[slow(name, arrays, u, c) for c in range(11)] for u in range(5)]
    near = 2e-3 if name == "linear" else 2e-4  # its equations may be nearly singular: 4 of 1,001 seeds need more
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-4, atol=near)


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_peak_or_whole_by_hand(seed):
    found, arrays = evidence(seed)
    pmi = np.random.default_rng(seed).normal(size=(5, 11)) * 5
    scores = peak_or_whole(found, torch.from_numpy(pmi.astype(np.float32))).numpy()
    for unit in (0, 1, 3, 4):
        r = [slow_dense("correlation", arrays["activations"][unit], arrays["similarity"], c) for c in range(11)]
        for c in range(11):
            relative = max(r[c] / max(r), 0.001)
            likely = np.exp(pmi[unit, c]) / np.exp(pmi[unit]).sum()
            expected = np.log(relative * 11 * likely / 120 + relative**20)
            np.testing.assert_allclose(scores[unit, c], expected, rtol=1e-3, atol=1e-3)
    assert np.isfinite(scores).all()  # a dead unit too


def test_a_clear_peak_names_the_unit_and_an_unclear_one_does_not():
    """The concept that follows a unit second best wins only where the strongest images leave no doubt."""
    found, _ = evidence(0, units=3, concepts=1000, images=200)
    r = SCORERS["correlation"].score(found)
    whole, near = r.argsort(descending=True)[0, :2].tolist()
    assert r[0, near] > 0.5 * r[0, whole]
    for clear, name in ((9.0, near), (3.0, whole)):
        pmi = torch.zeros(3, 1000)
        pmi[0, near] = clear
        assert peak_or_whole(found, pmi)[0].argmax().item() == name


@given(st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=4))
def test_ranks_share_ties(rows):
    expected = [[sum(y < x for y in row) + (sum(y == x for y in row) + 1) / 2 for x in row] for row in rows]
    assert ranks(torch.tensor(rows, dtype=torch.float32)).tolist() == expected


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_shares_of_patches_by_hand(seed):
    found, a = evidence(seed)
    rng = np.random.default_rng(seed)
    index = torch.from_numpy(np.stack([rng.permutation(11)[:2] for _ in range(5)]))
    adds = index[:, 1:].clone()
    adds[4] = -1
    shares, meanings = share(found, index).numpy(), meaning_shares(found, index[:, :1], adds).numpy()
    for unit in range(5):
        z = [
            [
                (p @ a["concepts_CD"][c] - a["null_mean_LC"][level, c]) / a["null_std_LC"][level, c]
                for c in index[unit].tolist()
            ]
            for p, level, has in zip(a["patches_UPD"][unit], a["levels_UP"][unit], a["has_patch_UP"][unit], strict=True)
            if has
        ]
        count = max(len(z), 1)
        np.testing.assert_allclose(shares[unit], [sum(row[i] > 1.645 for row in z) / count for i in (0, 1)], rtol=1e-6)
        other = sum(second > first for first, second in z) / count if unit != 4 else 0
        other *= other >= 0.2
        np.testing.assert_allclose(meanings[unit], [1 - other, other], rtol=1e-6)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20)
def test_unexplained_is_what_a_regression_leaves(seed):
    rng = np.random.default_rng(seed)
    images, activation = rng.normal(size=(50, 6)), rng.random((3, 50)) ** 3
    concept, centred = rng.normal(size=(3, 6)), images - images.mean(0)
    found = unexplained(
        torch.from_numpy(activation @ centred), torch.from_numpy(concept), torch.from_numpy(np.cov(images.T, ddof=0))
    ).numpy()
    for unit in range(3):
        slope, start = np.polyfit(images @ concept[unit], activation[unit], 1)
        rest = activation[unit] - slope * (images @ concept[unit]) - start
        np.testing.assert_allclose(found[unit], rest @ images, atol=1e-8)
        np.testing.assert_allclose(found[unit] @ concept[unit], 0, atol=1e-8)  # nothing of the concept is left


@pytest.mark.parametrize(
    ("adds", "expected"), [(1, "abcde"), (3, "adbce"), (6, "agbcd"), (7, "abcde")], ids=["next", "inside", "last", "-"]
)
def test_what_adds_comes_second(adds, expected):
    score = np.arange(7, 0, -1, dtype=np.float32)
    columns = {"concept": list("abcdefg"), "score": score, "lead": score - 2, "adds": np.arange(7) == adds}
    columns |= {"negative": ["n"] * 7, "share": np.linspace(0.5, 0, 7)}
    columns["meaning"] = np.where(columns["adds"], 0.25, np.where(np.arange(7) == 0, 0.75, np.nan))
    exemplars = {"unit": [0], "tail": ["top"], "rank": [0], "image_id": ["x"]}
    row = explain(Block("layer", 0, 1), pa.table(columns), pa.table(exemplars)).to_pylist()[0]
    assert "".join(row["concepts"]) == expected
    assert row["phrase"] == "a"
    assert row["margin"] == 1
    assert row["negative"] == "n"
    assert row["match"] == 0.5
    assert row["meanings"] == ["a", *"abcdefg"[adds : adds + 1]]
    assert row["shares"] == [0.75, 0.25][: len(row["meanings"])]
    leads = np.array([max(score["abcdefg".index(c)] - 2, 0) for c in expected])
    np.testing.assert_allclose(row["weights"], leads / leads.sum(), rtol=1e-6)


@pytest.mark.parametrize("name", [name for name, s in SCORERS.items() if s.marginal])
def test_images_of_one_kind_say_the_same_however_many_a_unit_has(name):
    """Per image and beside the marginal: unit 0 has all of what it is asked for, unit 1 three, unit 2 none."""
    found, chosen = evidence(0)[0], ScorerSettings(name, {"top_k": 5})
    found.exemplars_UKD[:2] = found.exemplars_UKD[0, 0] * found.has_exemplar_UK[:2, :, None]
    asked = share_asked(found, chosen)
    assert asked[:, 0].tolist() == pytest.approx([1, 0.6, 0, 1, 1])
    flat = {} if name == "wpmi" else {"a": 0.01}  # by its rank an image then weighs 3 % less at most
    scores = SCORERS[name].score(found, **chosen.params, **flat)
    torch.testing.assert_close(scores[1] / asked[1], scores[0], rtol=0.03, atol=0)
    assert (scores[2] == 0).all()
    assert share_asked(found, ScorerSettings("correlation")).tolist() == [[1]] * 5


def test_marginal_of_parts_is_the_marginal_of_the_whole():
    marginals = {name: s.marginal for name, s in SCORERS.items() if s.marginal}
    assert marginals == {"soft_wpmi": 1.0, "wpmi": 0.6, "joint": 1.0}
    scores = SCORERS["soft_wpmi"].score(evidence(0)[0]).double()
    halves = torch.stack([scores[:2].logsumexp(0), scores[2:].logsumexp(0)]).logsumexp(0)
    expected = torch.log(torch.exp(scores).mean(0))
    torch.testing.assert_close(log_mean_exp(halves, 5), expected)


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(4, 40))
def test_correlations_are_pearsons(seed, count):
    rng = np.random.default_rng(seed)
    a, s = rng.normal(size=(3, count)), rng.normal(size=(count, 4))
    a[2] = 7  # constant
    found = correlations(a, s)
    for u in range(2):
        for c in range(4):
            assert found[u, c] == pytest.approx(np.corrcoef(a[u], s[:, c])[0, 1], abs=1e-9)
    assert np.isnan(found[2]).all()
    assert np.isnan(correlations(a[:, :3], s[:3])).all()


THREADED = """
import sys, numpy as np, torch
from tasks.correlation import correlations
torch.set_num_threads(1)
rng = np.random.default_rng(0)
sys.stdout.buffer.write(correlations(rng.normal(size=(57, 512)), rng.normal(size=(512, 700))).tobytes())
"""


def test_correlations_do_not_depend_on_the_environment():
    """Ray sets OMP_NUM_THREADS=1, a plain process does not; the bytes must be the same."""
    found = []
    for threads in ("1", "2"):
        env = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        run = subprocess.run([sys.executable, "-c", THREADED], env=env, capture_output=True, check=True)
        found.append(run.stdout)
    assert len(found[0]) == 57 * 700 * 8
    assert found[0] == found[1]


def test_fisher_interval_covers_and_p_is_uniform():
    """On normal pairs of known correlation: about 95 % coverage; p below 0.05 for 5 % of independent pairs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 50))
    y = 0.4 * x + np.sqrt(1 - 0.16) * rng.normal(size=x.shape)
    r = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)])
    lower, upper, _ = fisher(r, 50)
    assert np.mean((lower <= 0.4) & (upper >= 0.4)) == pytest.approx(0.95, abs=0.015)
    r = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(x, rng.normal(size=x.shape), strict=True)])
    assert np.mean(fisher(r, 50)[2] < 0.05) == pytest.approx(0.05, abs=0.015)


def test_benjamini_hochberg_is_the_textbook_step_up():
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.random(200), rng.random(50) / 1000, [np.nan]])
    q = benjamini_hochberg(p)
    assert np.isnan(q[-1])
    ordered = np.sort(p[:-1])
    for level in (0.01, 0.05, 0.2):
        passing = np.flatnonzero(ordered <= level * np.arange(1, 251) / 250)
        limit = ordered[passing[-1]] if len(passing) else -1
        assert np.array_equal(q[:-1] <= level + 1e-12, p[:-1] <= limit)


def test_rivals_are_other_meanings_only():
    r = np.array([[0.3, 0.6, 0.5]])
    vectors = np.array([[[1.0, 0], [1.0, 0], [0.0, 1.0]]])
    between = np.array([[1, 0.99, 0.4]])
    index, gain = best_rival(r, between, vectors, 103)
    assert index[0] == 2  # the second concept is a synonym of the first
    m = (0.5**2 + 0.3**2) / 2
    h = (1 - 0.6 / (2 * (1 - m)) * m) / (1 - m)
    assert gain[0] == pytest.approx((np.arctanh(0.5) - np.arctanh(0.3)) * np.sqrt(100 / (2 * 0.6 * h)))
    index, gain = best_rival(r[:, :1], between[:, :1], vectors[:, :1], 103)
    assert (index[0], np.isnan(gain[0])) == (-1, True)
    index, gain = best_rival(np.array([[np.nan, 0.6, 0.5]]), between, vectors, 103)
    assert (index[0], np.isnan(gain[0])) == (-1, True)


def test_a_rivals_gain_is_a_standard_normal_where_it_is_no_better():
    """A unit that follows two concepts equally well, whose similarities go together by 0.8: beyond 2 in 2.3 % of the
    draws. As if the two had been measured on images of their own, the deviation would be 0.6."""
    rng, gains = np.random.default_rng(0), []
    concepts = np.array([[[1, 0.0], [0.8, 0.6]]])
    for images in rng.normal(size=(2000, 100, 2)):
        unit = images @ concepts[0].sum(0) + 4 * rng.normal(size=100)
        gains.append(best_rival(*followed(unit[None], images, concepts), concepts, 100)[1][0])
    assert abs(np.mean(gains)) < 0.08
    assert np.std(gains) == pytest.approx(1, abs=0.06)
    assert np.mean(np.array(gains) > 2) == pytest.approx(0.023, abs=0.012)


def stats(**columns):
    base = {"maximum": [1.0], "minimum": [0.0], "prefix_maximum": [None]} | columns
    names = make_table.__globals__["SCHEMAS"]["unit_stats"].names
    zero = {"layer": ["x"], "unit": [0], "histogram": [[0]], "embedding_sum": [[0]], "embedding_sum_cubed": [[0]]}
    return make_table("unit_stats", {n: base.get(n, zero.get(n, [0])) for n in names})


@pytest.mark.parametrize(
    ("columns", "rectified", "state"),
    [
        ({}, True, ""),
        ({"maximum": [0.0], "minimum": [0.0]}, True, "dead"),
        ({"maximum": [-0.01], "minimum": [-0.17]}, True, "dead"),
        ({"maximum": [-0.01], "minimum": [-5.0]}, False, ""),
        ({"maximum": [3.0], "minimum": [3.0]}, False, "dead"),
        ({"maximum": [3.0], "minimum": [2.0], "low": [1.5]}, True, "always_on"),
        ({"maximum": [3.0], "minimum": [2.0], "low": [0.0]}, True, ""),
        ({"maximum": [3.0], "minimum": [1.0], "low": [1.0]}, True, ""),
        ({"maximum": [0.1], "minimum": [0.0], "prefix_maximum": [9.0]}, True, "special_token_only"),
        ({"maximum": [0.0], "minimum": [0.0], "prefix_maximum": [9.0]}, True, "special_token_only"),
        ({"maximum": [-0.1], "minimum": [-0.1], "prefix_maximum": [-0.1]}, True, "dead"),
        ({"maximum": [2.0], "minimum": [0.0], "prefix_maximum": [9.0]}, True, ""),
    ],
)
def test_unit_states(columns, rectified, state):
    assert unit_state(stats(**columns), rectified).tolist() == [state]


def test_status_needs_evidence():
    rows = {"lower": [0.2, 0.2, 0.01, 0.2, None], "rival_gain": [0.0, 3.0, 0.0, 0.0, None]}
    names = make_table.__globals__["SCHEMAS"]["validation"].names
    table = make_table("validation", {n: rows.get(n, [None] * 5) for n in names})
    q = np.array([0.01, 0.01, 0.01, 0.2, np.nan])
    off = np.array(["", "", "", "", ""])
    assert decide(off, table, q, np.full(5, 0.05), NeuronsSettings()).tolist() == [
        "explained", "ambiguous", "unexplained", "unexplained", "unexplained",
    ]  # fmt: skip
    assert decide(np.array(["dead"] * 5), table, q, np.full(5, 0.05), NeuronsSettings()).tolist() == ["dead"] * 5


def test_what_adds_must_itself_be_far_above_the_median():
    """A unit that is c0 and c1: c1 adds, unless it adds little, or little of it is seen beside the other concepts."""
    summed = torch.tensor(
        [[2.0, 1.5, 0, 0, 0, 0], [2.0, 0.1, 0, 0, 0, 0], [2.0, 0.5, 0, 0, 0, 0], [2.0, 0.5, 0.45, 0.45, 0.45, 0]]
    )
    given = replace(
        evidence(0, units=4, concepts=5, width=6)[0],
        concepts_CD=torch.eye(6)[:5],
        summed_UD=summed,
        null_std_LC=torch.ones(1, 5),
    )
    assert adding(given, torch.zeros(4, 1, dtype=torch.long), torch.eye(6)).tolist() == [[1], [-1], [1], [-1]]
