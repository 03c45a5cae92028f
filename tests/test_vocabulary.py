"""Stage vocabulary: phrases of one meaning merge, concepts are linked to broader ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.cleaning import class_rows, clean
from tasks.store import Folder, StoreSettings
from tasks.tables import make_table, matrix
from tasks.vocabulary import BLOCK, VocabularyJob, VocabularyWorker, synonyms
from tasks.words import Raw


def slow(vectors, is_class, limit):
    """One phrase after another: classes first, then in order; each to the most similar that stayed before it."""
    stays, into = [], np.arange(len(vectors))
    for i in sorted(range(len(vectors)), key=lambda i: (not is_class[i], i)):
        close = [(float(vectors[i] @ vectors[j]), -n, j) for n, j in enumerate(stays)]
        if is_class[i] or not close or max(close)[0] < limit:
            stays.append(i)
        else:
            into[i] = max(close)[2]
    return into


@given(st.integers(0, 40), st.integers(0, 2**31), st.floats(0.05, 0.95), st.sampled_from([3, 7, 1024]))
def test_synonyms_as_a_slow_reference_finds_them(number, seed, limit, block):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (number, 3)).astype(np.float32) + 0.25  # exact in any order of summing
    is_class = rng.random(number) < 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.vocabulary.BLOCK", block)
        assert synonyms(vectors, is_class, 9 * limit).tolist() == slow(vectors, is_class, 9 * limit).tolist()


def test_more_phrases_than_fit_one_block():
    turn = np.linspace(0, np.pi / 2, 3 * BLOCK)
    vectors = np.stack([np.cos(turn), np.sin(turn)], 1).astype(np.float32)
    into = synonyms(vectors, np.zeros(len(turn), bool), float(np.cos(0.1)))
    kept = np.flatnonzero(into == np.arange(len(turn)))
    assert np.allclose(np.diff(turn[kept]), 0.1, atol=2e-3), "each begins where the one before it ends"
    assert (np.abs(turn - turn[into]) <= 0.1 + 1e-3).all()


def stage(root, raw, vectors, merge=0.9):
    """The tables of the stage for these phrases."""
    rows, _ = clean(raw, 6)
    phrases, embeddings, out = (
        Folder(StoreSettings(str(root)), name, "f", tables)
        for name, tables in (
            ("phrases", ("phrases",)),
            ("phrase_embeddings", ("phrase_embeddings",)),
            ("vocabulary", ("concepts", "concept_embeddings")),
        )
    )
    columns = {key: [row[key] for row in rows] for key in rows[0]} | {"llm": [None] * len(rows)}
    phrases.write(0, {"phrases": make_table("phrases", columns)})
    table = {"concept_id": columns["concept_id"], "embedding": np.array(vectors, np.float16)}
    embeddings.write(0, {"phrase_embeddings": make_table("phrase_embeddings", table)})
    report = VocabularyWorker(VocabularyJob(out, phrases, embeddings, merge, 1)).run(0)
    return report, out.read("concepts", 0).to_pylist(), out.read("concept_embeddings", 0)


def test_sources_links_and_vectors_follow_what_is_merged(tmp_path):
    words = ["couch", "sofa", "red sofa", "cup", "brown dog with a hat", "dog"]
    raw = [Raw(word, None, (f"from {word}",)) for word in words]
    vectors = [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0], [0, 0.6, 0.8]]
    report, rows, embeddings = stage(tmp_path, raw, vectors)
    found = {row["concept"]: row for row in rows}
    assert (report.rows, report.skipped) == ({"concepts": 5}, {"synonym": 1})
    assert list(found) == [word for word in words if word != "sofa"]
    assert (found["couch"]["synonyms"], found["couch"]["sources"]) == (["sofa"], ["from couch", "from sofa"])
    assert found["red sofa"]["broader"] == found["couch"]["concept_id"], "by the phrase that was merged"
    assert found["brown dog with a hat"]["broader"] == found["dog"]["concept_id"]
    assert [found[word]["broader"] for word in ("couch", "cup", "dog")] == [None, None, None]
    assert embeddings["concept_id"].to_pylist() == [row["concept_id"] for row in rows]
    assert np.array_equal(matrix(embeddings["embedding"]), np.delete(np.array(vectors, np.float16), 1, 0))


def test_class_names_stay_and_take_others_in(tmp_path):
    raw = [Raw("sofa"), *class_rows(["studio couch", "couch"])]
    _, rows, _ = stage(tmp_path, raw, [[1, 0], [1, 0], [1, 0]])
    assert [(row["concept"], row["synonyms"]) for row in rows] == [("studio couch", ["sofa"]), ("couch", [])]


def test_all_stay_where_merging_is_off(tmp_path):
    _, rows, _ = stage(tmp_path, [Raw("sofa"), Raw("couch")], [[1, 0], [0.99, 0.14]], merge=1)
    assert [row["concept"] for row in rows] == ["sofa", "couch"]
