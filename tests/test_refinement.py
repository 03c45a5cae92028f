"""Refinement: which units lack a word, how they are clustered, and when a new name is taken."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.config import compose
from flows.sweep import Sweep
from tasks.clusters import RefineSettings, kmeans
from tasks.correlation import better, correlations, paired
from tasks.tables import matrix
from tests import samples
from tests.test_answers import scripted_server


@given(st.integers(0, 2**31), st.integers(4, 30))
def test_paired_is_the_diagonal(seed, number):
    a, s = np.random.default_rng(seed).normal(size=(2, 5, number))
    a[0] = 1.0
    assert np.allclose(paired(a, s), np.diag(correlations(a, s.T)), equal_nan=True)


def test_better_is_a_standard_normal_where_nothing_is():
    """Two similarities that follow a unit equally well, and each other by 0.5: z beyond 1.645 in 5 % of the draws."""
    rng, count = np.random.default_rng(0), 200
    draws = rng.multivariate_normal(np.zeros(3), [[1, 0.4, 0.4], [0.4, 1, 0.5], [0.4, 0.5, 1]], (4000, count))
    unit, one, other = draws.transpose(2, 0, 1)
    z = better(paired(unit, one), paired(unit, other), paired(one, other), count)
    assert abs(z.mean()) < 0.06
    assert z.std() == pytest.approx(1, abs=0.06)
    assert (z > 1.645).mean() == pytest.approx(0.05, abs=0.015)


def test_better_by_hand():
    """r 0.6 against 0.4, alike by 0.3, 103 images: m 0.26, f 0.473, h = (1 - 0.473 m) / (1 - m) = 1.185."""
    found = better(np.array([0.6, np.nan]), np.array([0.4, 0.4]), np.array([0.3, 0.3]), 103)
    assert found[0] == pytest.approx((0.693147 - 0.423649) * np.sqrt(100 / (2 * 0.7 * 1.185185)), rel=1e-3)
    assert np.isnan(found[1])


@given(st.integers(2, 6), st.integers(0, 2**31))
def test_kmeans_finds_what_lies_apart(number, seed):
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(number), 5))
    x = np.eye(8, dtype=np.float32)[truth] + 0.05 * rng.normal(size=(len(truth), 8)).astype(np.float32)
    kind = kmeans(x / np.linalg.norm(x, axis=1, keepdims=True), number)
    assert len(set(zip(truth.tolist(), kind.tolist(), strict=True))) == number
    assert len(set(kind.tolist())) == number


def test_kmeans_of_nothing():
    assert kmeans(np.zeros((0, 4), np.float32), 0).tolist() == []


@pytest.mark.parametrize("key", ["rounds", "clusters", "sure", "same_name", "least"])
def test_impossible_settings(key):
    with pytest.raises(ValueError, match=rf"refine\.{key}=-1: must be at least"):
        RefineSettings(**{key: -1})


def test_refinement_needs_a_model():
    with pytest.raises(ValueError, match=r"vocabulary\.llm\.model is missing"):
        compose(["refine.rounds=1"])


WORDS = [
    "grey",
    "bright square",
    "left half",
    "thin line",
    "noise of all colours",
    "pale",
    "two squares",
    "red",
    "corner",
]


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    """A sweep with two rounds, whose model is a server that answers every cluster with the same words; any better
    correlation counts, because there are few images."""
    folder = tmp_path_factory.mktemp("refined")
    arguments = samples.sweep_arguments(folder)
    (folder / "words.txt").write_text("circle\ndark\n")
    with scripted_server() as (handler, url):
        handler.other = json.dumps({"concepts": WORDS})
        arguments += ["refine={rounds: 3, sure: 0.0, least: 0.0, same_name: 2}", f"store.root={folder / 'store'}"]
        arguments += ["vocabulary.llm={protocol: openai, model: m, url: '" + url + "'}", "cluster=none"]
        arguments += [f"vocabulary.against={folder / 'words.txt'}"]
        flow = Sweep(compose(arguments))
        flow.run()
        asked = len(handler.seen)
        again = Sweep(compose(arguments))
        again.run()
        assert not again.worked
        assert len(handler.seen) == asked
    return flow


def test_rounds_are_stages_of_their_own(refined):
    stages = refined.manifest.stages
    assert {"scores", "scores/1", "explanations/1", "vocabulary/1", "clusters/1", "answers/1"} <= set(stages)
    assert "scores/2" not in stages, "the second round brought no new concept"
    assert refined.folder("scores").fingerprint == stages["scores/1"]


def test_new_concepts_know_their_round_and_parent(refined):
    before = refined.manifest.folder("vocabulary").read("concepts", 0).to_pylist()
    after = refined.folder("vocabulary").read("concepts", 0).to_pylist()
    assert [row["concept"] for row in after[: len(before)]] == ["circle", "dark"]
    ids = {row["concept_id"] for row in before}
    assert {row["round"] for row in after[len(before) :]} == {1}
    assert {row["parent"] for row in after[len(before) :]} <= ids
    assert {row["concept"] for row in after} | {s for row in after for s in row["synonyms"]} == {
        "circle",
        "dark",
        *WORDS,
    }


def test_a_name_changes_only_where_select_says_so(refined):
    """Every unit's old and new name by a slow look at the select split."""
    run = refined.manifest
    old = run.folder("explanations").read_all("explanations").to_pylist()
    new = refined.folder("explanations").read_all("explanations").to_pylist()
    scores = refined.folder("scores").read_all("scores").to_pylist()
    first = {(row["layer"], row["unit"]): row["concept"] for row in scores if row["rank"] == 0}
    vocabulary = refined.folder("vocabulary")
    texts = matrix(vocabulary.read_all("concept_embeddings")["embedding"]).astype(np.float64)
    vector = dict(zip(vocabulary.read_all("concepts")["concept"].to_pylist(), texts, strict=True))
    images = matrix(run.folder("image_embeddings").read_all("image_embeddings")["embedding"]).astype(np.float64)
    stored = np.flatnonzero(refined.images.stored)
    select = stored[refined.images.split[stored] == "select"]
    assert len(select) > 4
    changed = 0
    for before, after in zip(old, new, strict=True):
        assert (before["round"], before["layer"], before["unit"]) == (0, after["layer"], after["unit"])
        if after["round"] == 0:
            assert after == before
            continue
        changed += 1
        assert after["phrase"] == first[after["layer"], after["unit"]] != before["phrase"]
        activation = pooled(refined, after["layer"], after["unit"])[refined.images.split[stored] == "select"]
        r = [np.corrcoef(activation, images[select] @ vector[row["phrase"]])[0, 1] for row in (before, after)]
        assert r[1] > r[0]
    assert changed


def pooled(flow, layer, unit):
    found = []
    for shard in range(flow.images.num_shards):
        table = flow.folder("activations").read("pooled", shard).to_pylist()
        row = next(r for r in table if (r["layer"], r["unit"]) == (layer, unit))
        found += [value * row["scale"] for value in row["activation"]]
    return np.array(found, np.float64)


def test_coverage_counts_what_the_tables_say(refined):
    rows = refined.folder("coverage").read("coverage", 0).to_pylist()
    neurons = refined.folder("neurons").read_all("neurons").to_pylist()
    named = [n for n in neurons if n["status"] in ("explained", "ambiguous", "unexplained") and n["phrase"]]
    other = refined.lexicon.folder("validation").read_all("validation").to_pylist()
    against = {(row["layer"], row["unit"]): row["correlation"] for row in other}
    for layer in (None, *dict.fromkeys(n["layer"] for n in named)):
        members = [n for n in named if layer in (None, n["layer"])]
        one = {row["what"]: row for row in rows if row["layer"] == layer and row["name"] is None}
        assert one["explained"]["value"] == np.mean([n["status"] == "explained" for n in members])
        assert one["distinct names"]["units"] == len({n["phrase"] for n in members})
        assert one["confidence"]["value"] == pytest.approx(np.mean([n["confidence"] for n in members]))
        gains = [n["confidence"] - against[n["layer"], n["unit"]] for n in members]
        assert one["gain"]["value"] == pytest.approx(np.mean(gains))
    won = {row["name"]: row["units"] for row in rows if row["what"] == "round"}
    first = {row["concept"]: row["round"] for row in refined.folder("vocabulary").read("concepts", 0).to_pylist()}
    assert won == {str(n): sum(first[u["phrase"]] == n for u in named) for n in (0, 1)}
    unused = {row["name"] for row in rows if row["what"] == "never used"}
    assert unused == set(first) - {n["phrase"] for n in named}
