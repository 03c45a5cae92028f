"""Traits of units as a double loop over pairs of images finds them, whatever the blocks; the census counted by hand."""

import tempfile
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from flows.run import TABLES
from tasks.images import ImageList
from tasks.layers import Layer, unit_blocks
from tasks.store import Folder, StoreSettings
from tasks.tables import SCHEMAS, make_table
from tasks.traits import TraitsJob, TraitsWorker

K = 4
"""Exemplars per unit."""
TRAITS = ("monosemanticity", "clarity", "redundancy")


def table(name: str, rows: list[dict]) -> pa.Table:
    """Null where a row does not say."""
    return make_table(name, {column: [row.get(column) for row in rows] for column in SCHEMAS[name].names})


def measure(layers, vectors, splits, neurons=None, block=3, shard=5, pooled_max=100):
    """Tables traits and census of the stage; `layers` holds activations [U, N] by name, `neurons` rows by unit."""
    with tempfile.TemporaryDirectory() as root:
        of = {stage: Folder(StoreSettings(root), stage, "x", TABLES[stage]) for stage in TABLES}
        columns = {"split": splits, "status": ["ok"] * len(splits), "content": [f"c{i}" for i in range(len(splits))]}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        of["probing"].write(0, {"images": table("images", [row | {"image": i} for i, row in enumerate(rows)])})
        images = ImageList(of["probing"], shard, shard, pooled_max, {})
        blocks = unit_blocks([Layer(name, len(a), "vector") for name, a in layers.items()], block)
        for part in range(images.num_shards):
            write_shard(of, part, images, blocks, layers, vectors)
        for part, b in enumerate(blocks):
            write_block(of, part, b, images, layers[b.layer], (neurons or {}).get(b.layer))
        concepts = [{"concept": "red", "family": "colour"}, {"concept": "dog", "family": "animal"}]
        words = {"concepts": table("concepts", concepts), "concept_embeddings": table("concept_embeddings", [])}
        of["vocabulary"].write(0, words)
        read = ("activations", "exemplars", "image_embeddings", "neurons", "vocabulary")
        worker = TraitsWorker(TraitsJob(of["traits"], images, **{s: of[s] for s in read}, blocks=blocks, threads=1))
        for part in range(len(layers)):
            worker.run(part)
        return [of["traits"].read_all(name).to_pylist() for name in TABLES["traits"]]


def write_shard(of, part, images, blocks, layers, vectors):
    here = np.array(images.shard(part))
    embeddings = [{"image": i, "embedding": vectors[i]} for i in here]
    of["image_embeddings"].write(part, {"image_embeddings": table("image_embeddings", embeddings)})
    kept = here[images.stored[here]]
    pooled = [
        {
            "layer": b.layer,
            "unit": unit,
            "scale": 0.5,
            "activation": (2 * layers[b.layer][unit, kept]).astype(np.float16),
        }
        for b in blocks
        for unit in range(b.start, b.stop)
    ]
    tables = {"candidates": table("candidates", []), "stats": table("stats", []), "pooled": table("pooled", pooled)}
    of["activations"].write(part, tables, {"pooled": [len(b) for b in blocks]})


def write_block(of, part, block, images, a_UN, neurons):
    keys = [{"layer": block.layer, "unit": unit} for unit in range(block.start, block.stop)]
    exemplars = []
    for key in keys:
        a_N = a_UN[key["unit"]]
        exemplars += [key | {"tail": "top", "image": i} for i in exemplars_of(a_N, images.explain)]
        exemplars.append(key | {"tail": "bottom", "image": 0})  # not to be looked at
    written = {"exemplars": table("exemplars", exemplars), "unit_stats": table("unit_stats", [])}
    of["exemplars"].write(part, written)
    alive = {"status": "unexplained"}
    rows = [key | (neurons[key["unit"]] if neurons else alive) for key in keys]
    of["neurons"].write(part, {"neurons": table("neurons", rows)})


def exemplars_of(a_N, explain):
    members = np.flatnonzero(explain & (a_N > a_N.min()))
    return members[np.argsort(-a_N[members], kind="stable")[:K]].tolist()


def slow(a_UN, vectors, explain, sample, dead):
    """Rows of the traits of one layer, from the formulas."""
    e = [v.astype(np.float64) / np.linalg.norm(v.astype(np.float64)) for v in vectors]
    e = [v - np.mean([e[i] for i in sample], axis=0) for v in e]
    e = [v / max(np.linalg.norm(v), 1e-6) for v in e]
    weights = [[(a[i] - min(a[sample])) / max(max(a[sample]) - min(a[sample]), 1e-9) for i in sample] for a in a_UN]
    tops = [exemplars_of(a, explain) for a in a_UN]
    common = np.mean([e[i] for i in sample], axis=0)
    directions = [sum(w * (e[i] - common) for w, i in zip(ws, sample, strict=True)) for ws in weights]
    cosines = [[cosine(x, y) for y in directions] for x in directions]
    rows = []
    for unit, alive in enumerate(~dead):
        others = [cosines[unit][v] for v in range(len(a_UN)) if v != unit and not dead[v]]
        known = [c for c in others if c is not None]
        rows.append(
            {
                "monosemanticity": pairs([e[i] for i in sample], weights[unit]) if alive else None,
                "clarity": pairs([e[i] for i in tops[unit]], [1] * len(tops[unit])) if alive else None,
                "redundancy": max(known) if alive and known else None,
                "cosines": cosines[unit],
            }
        )
    return rows


def pairs(e, a):
    both = [(a[i] * a[j], e[i] @ e[j]) for i, j in combinations(range(len(e)), 2)]
    total = sum(weight for weight, _ in both)
    return sum(weight * cos for weight, cos in both) / total if total > 0 else None


def cosine(x, y):
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    return x @ y / norms if norms > 0 else None


def unit_vectors(rng, number, width=4):
    """float16, all of one half space, as CLIP's are."""
    x = rng.normal(size=(number, width)) + 2 * np.eye(width)[0]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


@settings(max_examples=60)
@given(st.data())
def test_traits_are_what_a_double_loop_over_pairs_finds(data):
    number, units = data.draw(st.integers(6, 20)), data.draw(st.integers(1, 7))
    few = st.sampled_from([-3, 0, 0, 1, 5])  # with ties, and units that only a few images excite
    a_UN = data.draw(arrays.arrays(np.float32, (units, number), elements=few))
    splits = data.draw(st.lists(st.sampled_from(["explain", "validate"]), min_size=number, max_size=number))
    splits[:2] = ["explain", "explain"]
    dead = np.array(data.draw(st.lists(st.sampled_from([False, False, True]), min_size=units, max_size=units)))
    vectors = unit_vectors(np.random.default_rng(data.draw(st.integers(0, 99))), number)
    neurons = {"a": [{"status": "dead" if d else "unexplained"} for d in dead]}
    block, shard, rows = (data.draw(st.integers(1, 8)) for _ in range(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.traits.ROWS", rows)
        patch.setattr("tasks.traits.UNITS", rows)
        found, _ = measure({"a": a_UN}, vectors, splits, neurons, block, shard)
    explain = np.array(splits) == "explain"
    expected = slow(a_UN, vectors, explain, np.flatnonzero(explain), dead)
    for unit, (row, want) in enumerate(zip(found, expected, strict=True)):
        assert row["unit"] == unit
        assert {t: row[t] for t in TRAITS} == {t: pytest.approx(want[t], abs=1e-5) for t in TRAITS}
        assert (row["alike"] is None) == (row["redundancy"] is None)
        if row["alike"] is not None:
            assert want["cosines"][row["alike"]] == pytest.approx(want["redundancy"], abs=1e-5)
            assert row["alike"] != unit
            assert not dead[row["alike"]]


def random_layer(units=5, number=24, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 9, (units, number)).astype(np.float32), unit_vectors(rng, number), ["explain"] * number


def test_scale_and_offset_of_a_unit_leave_no_trace():
    """All-negative units too: only how the images compare counts."""
    a_UN, vectors, splits = random_layer()
    found, _ = measure({"a": a_UN}, vectors, splits)
    moved, _ = measure({"a": a_UN * 4 - 100}, vectors, splits)
    assert [row["alike"] for row in moved] == [row["alike"] for row in found]
    for row, other in zip(found, moved, strict=True):
        assert [other[t] for t in TRAITS] == pytest.approx([row[t] for t in TRAITS], abs=1e-6)
        assert all(np.isfinite(row[t]) for t in TRAITS)


def test_one_kind_of_image_is_one_and_random_images_are_none():
    """A unit on copies of one image, and one on images at random among many."""
    rng = np.random.default_rng(0)
    vectors = unit_vectors(rng, 400, width=16)
    vectors[:K] = vectors[0]
    of_one_kind = np.array([1.0] * K + [0] * (400 - K), np.float32)
    at_random = rng.integers(0, 9, 400).astype(np.float32)
    found, _ = measure({"a": np.stack([of_one_kind, at_random])}, vectors, ["explain"] * 400, pooled_max=400)
    assert [found[0][t] for t in TRAITS[:2]] == pytest.approx([1, 1], abs=1e-6)
    assert found[1]["monosemanticity"] == pytest.approx(0, abs=0.01)


def test_a_single_image_makes_no_pair():
    a_UN, vectors, splits = random_layer()
    found, _ = measure({"a": a_UN}, vectors, splits, pooled_max=1)
    assert {(row["monosemanticity"], row["redundancy"], row["alike"]) for row in found} == {(None, None, None)}
    a_UN[0], a_UN[0, 7] = -1, 3  # of many images only one excites unit 0
    found, _ = measure({"a": a_UN}, vectors, splits)
    assert (found[0]["monosemanticity"], found[0]["clarity"]) == (None, None)
    assert found[0]["redundancy"] is not None


def test_no_sample_no_traits():
    a_UN, vectors, splits = random_layer()
    found, census = measure({"a": a_UN}, vectors, splits, pooled_max=0)
    assert {row[name] for row in found for name in (*TRAITS, "alike")} == {None}
    assert {census[0][t] for t in TRAITS} == {None}


def test_dead_units_have_no_traits_and_are_nobodys_twin():
    a_UN, vectors, splits = random_layer()
    a_UN[3] = a_UN[1]
    status = ["unexplained", "unexplained", "unexplained", "dead", "unexplained"]
    found, _ = measure({"a": a_UN}, vectors, splits, {"a": [{"status": s} for s in status]})
    assert [found[3][name] for name in (*TRAITS, "alike")] == [None] * 4
    assert 3 not in [row["alike"] for row in found]
    alone, _ = measure({"a": a_UN[:1]}, vectors, splits)
    assert alone[0]["redundancy"] is None


def test_the_first_of_equal_units_is_the_one_that_is_alike():
    a_UN, vectors, splits = random_layer(units=7)
    a_UN[[2, 4, 6]] = a_UN[2], 2 * a_UN[2], a_UN[2] - 3
    for block in (1, 2, 7):
        found, _ = measure({"a": a_UN}, vectors, splits, block=block)
        assert [found[unit]["alike"] for unit in (2, 4, 6)] == [4, 2, 2]
        assert [found[unit]["redundancy"] for unit in (2, 4, 6)] == pytest.approx([1, 1, 1], abs=1e-6)


def test_census_is_what_counting_by_hand_gives():
    a_UN, vectors, splits = random_layer()
    a_UN[4] = 0
    names = {
        "early": [
            {"status": "explained", "phrase": "red", "confidence": 0.5},
            {"status": "explained", "phrase": "red", "confidence": 0.25},
            {"status": "explained", "phrase": "dog", "confidence": 0.75},
            {"status": "unexplained", "phrase": "dog", "confidence": None},
            {"status": "dead", "phrase": None, "confidence": None},
        ],
        "deep": [{"status": "dead", "phrase": None, "confidence": None}],
    }
    found, census = measure({"early": a_UN, "deep": a_UN[4:]}, vectors, splits, names, block=2)
    early, deep = census
    assert (early["layer"], early["units"], deep["layer"], deep["units"]) == ("early", 5, "deep", 1)
    assert early["statuses"] == ["explained", "dead", "unexplained"]
    assert early["status_shares"] == pytest.approx([0.6, 0.2, 0.2])
    assert early["families"] == ["colour", "animal"]
    assert early["family_shares"] == pytest.approx([2 / 3, 1 / 3])
    assert early["names"] == 0.5  # red and dog for four units
    assert early["confidence"] == 0.5
    for trait in TRAITS:
        assert early[trait] == pytest.approx(np.mean([row[trait] for row in found[:4]]))
    assert (deep["statuses"], deep["status_shares"], deep["families"], deep["family_shares"]) == (["dead"], [1], [], [])
    assert {deep[name] for name in ("names", "confidence", *TRAITS)} == {None}
