"""What units say below zero: planted mixtures get both names, and every number is what a slow look finds."""

from dataclasses import replace

import numpy as np
import pytest

from flows.run import TABLES
from tasks.explanations import ExplanationsJob, ExplanationsWorker
from tasks.images import ImageList
from tasks.layers import Layer, unit_blocks
from tasks.neurons import NeuronsJob, NeuronsSettings, NeuronsWorker
from tasks.scorers import ScorerSettings
from tasks.scores import ScoresJob, ScoresWorker
from tasks.store import Folder, StoreSettings
from tasks.validation import Judge, ValidationJob, ValidationWorker
from tests.test_traits import table

N, WIDTH, K = 500, 16, 10
WORDS = [f"word {number}" for number in range(20)]
SPLITS = [("explain", "explain", "select", "validate")[i % 4] for i in range(N)]
STORED = 90
"""Images of each split whose activations are stored: fewer than there are."""


def unit_norm(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float16)


def planted_layers(s_NC):
    """By layer the highest and the lowest activation of each unit on each image, float16 [U, N].

    one value: word 3 less word 7; word 5, never below zero; a constant; word 2, of which all is below zero.
    map: word 1 at one position and minus word 9 at another, of which the highest value knows nothing.
    gelu: word 4, and a little below zero the more of word 8 there is.
    """
    rng = np.random.default_rng(1)
    z = ((s_NC - s_NC.mean(0)) / s_NC.std(0) + 0.3 * rng.normal(size=s_NC.shape)).T
    one = np.stack([z[3] - z[7], z[5].clip(0), np.full(N, 2.0), z[2] - z[2].max() - 1])
    layers = {
        "one value": (one, one),
        "map": (z[1:2].clip(0), -z[9:10].clip(0)),
        "gelu": (z[4:5].clip(0), -0.05 * z[8:9].clip(0, 6)),
    }
    return {name: [x.astype(np.float16) for x in found] for name, found in layers.items()}


IMAGES, VECTORS = (unit_norm(np.random.default_rng(seed), n, WIDTH) for seed, n in ((2, N), (3, len(WORDS))))
LAYERS = planted_layers(IMAGES.astype(float) @ VECTORS.T.astype(float))


def write_shard(of, part, images, blocks):
    """Patches are the whole images of the K largest explain images; activations those that are stored."""
    here = np.array(images.shard(part))
    embeddings = [{"image": i, "embedding": IMAGES[i]} for i in here]
    of["image_embeddings"].write(part, {"image_embeddings": table("image_embeddings", embeddings)})
    kept, pooled, patches, sizes = here[images.stored[here]], [], [], []
    for b in blocks:
        before = len(patches)
        for unit in range(b.start, b.stop):
            top, low = (x[unit] for x in LAYERS[b.layer])
            key = {"layer": b.layer, "unit": unit}
            pooled.append(key | {"scale": 0.5, "activation": 2 * top[kept], "negative": (-2 * low[kept]).clip(0)})
            first = [(rank, i) for rank, i in enumerate(strongest(top, images).tolist()) if i in here]
            patches += [key | {"tail": "top", "rank": rank, "image": i, "crop_id": 64 * i} for rank, i in first]
        sizes.append(len(patches) - before)
    written = {"candidates": table("candidates", []), "stats": table("stats", []), "pooled": table("pooled", pooled)}
    of["activations"].write(part, written, {"pooled": [len(b) for b in blocks]})
    crops = sorted({row["crop_id"] for row in patches})
    written = {"crops": table("crops", [{"crop_id": i, "image": i // 64, "level": 0} for i in crops])}
    of["patches"].write(part, written | {"patches": table("patches", patches)}, {"patches": sizes})
    of["embeddings"].write(part, {"embeddings": table("embeddings", [])})


def strongest(a_N, images):
    members = np.flatnonzero(images.explain & (a_N > a_N.min()))
    return members[np.argsort(-a_N[members], kind="stable")[:K]]


def write_block(of, part, block, images):
    exemplars, stats = [], []
    for unit in range(block.start, block.stop):
        key, (top, low) = {"layer": block.layer, "unit": unit}, (x[unit].astype(float) for x in LAYERS[block.layer])
        best = enumerate(strongest(top, images).tolist())
        exemplars += [key | {"tail": "top", "rank": r, "image": i, "image_id": f"{i}"} for r, i in best]
        cubed = top[images.explain] ** 3
        vectors, plain = IMAGES[images.explain].astype(float), np.cbrt(cubed)
        sums = {"sum": plain.sum(), "embedding_sum": plain @ vectors}
        sums |= {"sum_cubed": cubed.sum(), "embedding_sum_cubed": cubed @ vectors}
        stats.append(key | sums | {"minimum": top.min(), "maximum": top.max(), "low": low.min()})
    of["exemplars"].write(part, {"exemplars": table("exemplars", exemplars), "unit_stats": table("unit_stats", stats)})


def named(root, block=3, shard=128, judge=None, scorer="joint"):
    """(negative, negative_confidence) by unit as the table neurons has it, the same after validation, and the images.

    `judge` has other vectors of the images and of the words."""
    of = {stage: Folder(StoreSettings(str(root)), stage, "x", tables) for stage, tables in TABLES.items()}
    rows = [{"image": i, "status": "ok", "content": f"c{i}", "split": SPLITS[i], "image_id": f"{i}"} for i in range(N)]
    of["probing"].write(0, {"images": table("images", rows)})
    images = ImageList(of["probing"], shard, shard, STORED, {})
    blocks = unit_blocks([Layer(name, len(top), "vector") for name, (top, _) in LAYERS.items()], block)
    for part in range(images.num_shards):
        write_shard(of, part, images, blocks)
    for part, b in enumerate(blocks):
        write_block(of, part, b, images)
    concepts = [{"concept": word, "family": "word", "concept_id": word} for word in WORDS]
    written = {"concepts": table("concepts", concepts)}
    written["concept_embeddings"] = table("concept_embeddings", [{"embedding": v} for v in VECTORS])
    of["vocabulary"].write(0, written)
    if judge is not None:
        names = ("image_embeddings", "phrase_embeddings")
        folders = [Folder(StoreSettings(str(root)), name, "judge", (name,)) for name in names]
        for name, folder, vectors in zip(names, folders, judge, strict=True):
            folder.write(0, {name: table(name, [{"embedding": v} for v in vectors])})
        judge = Judge(*folders)
    common = {stage: of[stage] for stage in ("activations", "image_embeddings", "vocabulary")}
    evidence = {stage: of[stage] for stage in ("exemplars", "patches", "embeddings")}
    settings = {"settings": ScorerSettings(scorer, keep=5), "k": K, "num_patches": K, "threads": 1}
    checked = {"explanations": of["explanations"], "blocks": blocks, "threads": 1, "judge": judge}
    read = {stage: of[stage] for stage in ("exemplars", "explanations", "validation")}
    workers = (
        ScoresWorker(ScoresJob(of["scores"], images, **common, **evidence, blocks=blocks, **settings)),
        ExplanationsWorker(ExplanationsJob(of["explanations"], of["scores"], of["exemplars"], blocks, 1)),
        ValidationWorker(ValidationJob(of["validation"], images, **common, **checked)),
        NeuronsWorker(NeuronsJob(of["neurons"], **read, blocks=blocks, settings=NeuronsSettings())),
    )
    for worker in workers:
        for part in range(len(blocks)):
            worker.run(part)
    found = {}
    for row in of["neurons"].read_all("neurons").to_pylist():
        found[row["layer"], row["unit"]] = row
    tables = [of[stage].read_all(stage) for stage in ("explanations", "validation")]
    said = list(zip(tables[0]["negative"].to_pylist(), tables[1]["negative_confidence"].to_pylist(), strict=True))
    return found, dict(zip(found, said, strict=True)), images


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return named(tmp_path_factory.mktemp("reference"))


def test_both_sides_of_a_planted_mixture_are_named(reference):
    found, _, _ = reference
    names = {unit: (row["phrase"], row["negative"], row["status"]) for unit, row in found.items()}
    assert names == {
        ("one value", 0): ("word 3", "word 7", "explained"),
        ("one value", 1): ("word 5", None, "explained"),
        ("one value", 2): (None, None, "dead"),
        ("one value", 3): ("word 2", names["one value", 3][1], "explained"),
        ("map", 0): ("word 1", "word 9", "explained"),
        ("gelu", 0): ("word 4", None, "explained"),
    }
    assert names["one value", 3][1] is not None, "its negative side is the absence of its name, which no word here says"
    for unit in (("one value", 0), ("map", 0)):
        assert found[unit]["negative_confidence"] > 0.4


def slow(unit, of_split, images, vectors):
    """[words], correlation over the stored images of a split of the negative side with each word, by NumPy's own."""
    layer, number = unit
    chosen = [i for i in range(N) if images.stored[i] and SPLITS[i] == of_split]
    negative = [max(0.0, -float(LAYERS[layer][1][number, i])) for i in chosen]
    return [np.corrcoef(negative, [float(vectors[0][i] @ word) for i in chosen])[0, 1] for word in vectors[1]]


@pytest.mark.parametrize("unit", [("one value", 0), ("one value", 3), ("map", 0)])
def test_name_and_confidence_by_a_slow_look(reference, unit):
    found, _, images = reference
    vectors = [x.astype(float) for x in (IMAGES, VECTORS)]
    best = int(np.argmax(slow(unit, "explain", images, vectors)))
    assert found[unit]["negative"] == WORDS[best]
    expected = slow(unit, "validate", images, vectors)[best]
    assert found[unit]["negative_confidence"] == pytest.approx(expected, abs=1e-6)


def test_null_where_nothing_is_meant(reference):
    """In the tables before as well; those know of no dead units, so the constant one is not asked about."""
    found, before, _ = reference
    for unit in (("one value", 1), ("gelu", 0)):
        assert before[unit] == (found[unit]["negative"], found[unit]["negative_confidence"]) == (None, None)
    for unit in (("one value", 0), ("one value", 3), ("map", 0)):
        assert before[unit] == (found[unit]["negative"], found[unit]["negative_confidence"])


def test_blocks_and_shards_change_nothing(reference, tmp_path):
    again, _, _ = named(tmp_path, block=1, shard=500)
    for unit, row in reference[0].items():
        assert again[unit]["negative"] == row["negative"]
        assert again[unit]["negative_confidence"] == pytest.approx(row["negative_confidence"], abs=1e-5)


def test_scores_know_nothing_of_images_that_are_not_of_explain(reference, tmp_path, monkeypatch):
    """Patches here are whole images, so what random crops are like is told by images too."""
    _, _, images = reference
    others = unit_norm(np.random.default_rng(6), N, WIDTH)
    monkeypatch.setattr("tests.test_negative.IMAGES", np.where(images.explain[:, None], IMAGES, others))
    named(tmp_path)
    stores = (images.folder.settings, StoreSettings(str(tmp_path)))
    expected, found = (Folder(store, "scores", "x", ("scores",)).read_all("scores") for store in stores)
    assert found.equals(expected)


@pytest.mark.parametrize("scorer", ["joint", "soft_wpmi", "wpmi"])
def test_units_without_exemplars_change_no_other_ones_scores(tmp_path, monkeypatch, scorer):
    """A score is a sum over exemplars, so those of none would be the marginal of the whole layer; nothing is known of
    what they mean, even where images that made no name vary: the last is above zero on validate alone."""
    some = [x[[0, 1, 3]] for x in LAYERS["one value"]]
    more = [np.concatenate([x, np.full((4, N), 1, np.float16)]) for x in some]
    validate = np.array(SPLITS) == "validate"
    for x in more:
        x[6, validate] = 1 + np.arange(validate.sum()) / 64
    scores = []
    for units in (some, more):
        monkeypatch.setitem(LAYERS, "one value", units)
        found, _, images = named(tmp_path / str(len(units[0])), scorer=scorer)
        rows = replace(images.folder, stage="scores", tables=("scores",)).read_all("scores").to_pylist()
        scores.append([row for row in rows if row["layer"] != "one value" or row["unit"] < 3])
    assert [row["concept"] for row in scores[0]] == [row["concept"] for row in scores[1]]
    for column in ("score", "null_z", "share", "lead"):
        assert [row[column] for row in scores[0]] == pytest.approx([row[column] for row in scores[1]], abs=1e-4), column
    silent = found["one value", 6]
    assert [silent[c] for c in ("status", "phrase", "exemplars", "confidence", "q", "probability")] == [
        "unexplained", None, [], None, None, None,
    ]  # fmt: skip


def test_a_judge_measures_the_negative_side_too(reference, tmp_path):
    vectors = [unit_norm(np.random.default_rng(seed), n, 8) for seed, n in ((4, N), (5, len(WORDS)))]
    found, _, images = named(tmp_path, judge=vectors)
    for unit, row in found.items():
        assert row["negative"] == reference[0][unit]["negative"], "names come from the first CLIP"
        if row["negative"] is not None:
            expected = slow(unit, "validate", images, [x.astype(float) for x in vectors])
            assert row["negative_confidence"] == pytest.approx(expected[WORDS.index(row["negative"])], abs=1e-6)
