"""The benchmark: figures by hand, and a small run on planted units with its controls."""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from flows.benchmark import main as benchmark
from flows.benchmark import tables, tradeoff
from flows.cli import run_flow
from flows.config import compose
from flows.run import load_run
from tasks.benchmark import (
    BenchmarkWorker,
    Named,
    agreement,
    classes,
    collisions,
    described,
    mean,
    read_annotations,
    share,
)
from tasks.images import ImageList
from tasks.probing import split_of
from tasks.store import Folder, StoreSettings
from tasks.tables import matrix

SCORERS = ["weighted_mean", "correlation", "soft_wpmi_top_k_50_a_20"]


def unit(number, phrase, *concepts, **more):
    return {"layer": "a", "unit": number, "phrase": phrase, "concepts": [phrase, *concepts]} | more


VECTORS = {"red": np.array([1.0, 0]), "blue": np.array([0.0, 1]), "pink": np.array([0.8, 0.6])}


def values(figures):
    return {(f.subject, f.measure): f.value for f in figures}


def test_share_and_mean():
    assert share("b", "s", "x", "m", 3, 4)[4:] == pytest.approx((0.75, 0.3006, 0.9544, 4), abs=1e-4)  # Wilson's
    assert math.isnan(share("b", "s", "x", "m", 0, 0).value)
    found = mean("b", "s", "x", "m", [0.0, 1.0, None, math.nan])
    assert found[4:] == pytest.approx((0.5, 0.5 - 1.96 * 0.5 / 2**0.5, 0.5 + 1.96 * 0.5 / 2**0.5, 2))
    assert mean("b", "s", "x", "m", [None]).units == 0


def test_classes():
    rows = [unit(0, "red", "blue"), unit(1, "pink", "blue"), unit(2, "red")]
    found = values(classes("s", rows, ["red", "blue", None], VECTORS))  # the third class is not in the vocabulary
    assert found["classes", "first"] == 0.5
    assert found["classes", "five"] == 1.0
    assert found["classes", "text cosine"] == pytest.approx((1 + 0.6) / 2)


def test_collisions():
    found = values(collisions("s", "hidden", [unit(i, name) for i, name in enumerate(["red", "red", "blue", "pink"])]))
    assert found["hidden", "distinct names per unit"] == 0.75
    assert found["hidden", "largest share"] == 0.5
    assert found["hidden", "entropy"] == 1.5  # bits: 1/2 log 2 + 2/4 log 4


def test_agreement_is_over_units_that_both_name():
    a = [unit(0, "red"), unit(1, "blue", "pink"), unit(2, "red"), unit(9, "red")]
    b = [unit(0, "red"), unit(1, "pink"), unit(2, "blue"), unit(8, "red")]
    found = values(agreement("s", "hidden", a, b, VECTORS))
    assert found["hidden", "first"] == pytest.approx(1 / 3)
    assert found["hidden", "five"] == pytest.approx(2 / 3)
    assert found["hidden", "text cosine"] == pytest.approx((1 + 0.6 + 0) / 3)


def test_descriptions_stand_beside_a_constant_label_and_other_people():
    said = {("a", 0): [VECTORS["red"], VECTORS["pink"]], ("a", 1): [VECTORS["blue"]], ("a", 7): [VECTORS["blue"]]}
    named = {("a", 0): VECTORS["red"], ("a", 1): VECTORS["pink"]}
    found = values(described("s", said, named))
    assert found["described units", "text cosine"] == pytest.approx((0.9 + 0.6) / 2)
    constant = (0.8 * 0.9 + 0.6 * 0.3 + 0.6) / 2  # pink for both is better than red for both
    assert found["described units", "its best constant label"] == pytest.approx(constant)
    assert found["described units", "human and human"] == pytest.approx(0.8)


def test_annotations_file(tmp_path):
    (tmp_path / "good.csv").write_text('layer,unit,description\na,0,"red, mostly"\na,0,pink\n', encoding="utf-8")
    assert read_annotations(str(tmp_path / "good.csv")) == {("a", 0): ["red, mostly", "pink"]}
    (tmp_path / "bad.csv").write_text("layer,neuron\na,0\n", encoding="utf-8")
    for name in ("bad.csv", "none.csv"):
        with pytest.raises(ValueError, match=rf"annotations=.*{name}: expected a CSV with layer, unit, description"):
            read_annotations(str(tmp_path / name))


def test_halves_are_disjoint_and_seeds_differ():
    contents = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(4000)]
    whole = [split_of(c, 0.6, 0.2) for c in contents]
    for c, split in zip(contents, whole, strict=True):
        both = {split_of(c, 0.6, 0.2, half=half) for half in (0, 1)}
        assert both == ({"explain", "unused"} if split == "explain" else {split})
    other = [split_of(c, 0.6, 0.2, seed=1) for c in contents]
    assert np.mean([a == b for a, b in zip(whole, other, strict=True)]) == pytest.approx(0.44, abs=0.03)  # .36+.04+.04


def test_every_readable_image_gets_another_partner():
    columns = {"image": range(5), "image_id": list("abcde"), "content": list("vwxyz")}
    columns |= {"split": ["explain"] * 5, "status": ["ok", "ok", "unreadable", "ok", "ok"]}
    images = ImageList.__new__(ImageList)
    images.__dict__["table"] = pa.table(columns)
    partner = images.partner
    assert partner[2] == 2
    assert sorted(partner) == [0, 1, 2, 3, 4]
    assert all(partner[i] != i for i in (0, 1, 3, 4))


def test_final_units_that_are_all_dead_are_counted_as_none(tmp_path):
    """Of the run, or of one of its halves alone; and of a control the live units count."""
    from tests.test_traits import table

    def neurons(name, *statuses):
        rows = [unit(i, "red") | {"layer": layer, "status": s} for i, (layer, s) in enumerate(statuses)]
        rows = [row | ({"phrase": None} if row["status"] == "dead" else {}) for row in rows]
        made = Folder(StoreSettings(str(tmp_path)), "neurons", name, ("neurons",))
        made.write(0, {"neurons": table("neurons", rows)})
        return made

    dead = neurons("dead", ("a", "explained"), ("a", "unexplained"), ("logits", "dead"))
    live = neurons("live", ("a", "explained"), ("a", "unexplained"), ("logits", "explained"))
    worker = BenchmarkWorker.__new__(BenchmarkWorker)
    worker.job = SimpleNamespace(planted=None, annotations=None)
    vars(worker).update(vectors=VECTORS, final="logits", _class_concepts=["red"] * 3)
    figures = list(worker._judged("s", Named(dead, {"randomly initialised": dead}, [live, dead])))
    found = {(f.benchmark, f.subject, f.measure): f for f in figures}
    assert found["final layer", "classes", "first"].units == 0
    assert found["stability", "final layer", "first"].units == 0
    assert found["stability", "hidden", "first"].value == 1
    assert found["controls", "randomly initialised", "explained"][4::3] == (0.5, 2)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Arguments and printed tables of a benchmark on planted units, over few scenes."""
    root = tmp_path_factory.mktemp("benchmark")
    arguments = [
        f"store.root={root}",
        "probing.uri=world://test/384",
        "target=world_resnet",
        "layers.names=[layer4.0,logits]",
        "run=small",
        "cluster=none",
        "neurons.twin=true",
        "scorers=weighted_mean,correlation,soft_wpmi:top_k=50:a=20",
        "halves=true",
        f"annotations={root}/people.csv",
    ]
    (root / "people.csv").write_text("layer,unit,description\nlayer4.0,3,a star\nlayer4.0,3,stars\n", encoding="utf-8")
    assert run_flow(benchmark, arguments) == 0
    return arguments


def figures(arguments):
    run = load_run(compose(arguments[:1]).store, "small-benchmark")
    rows = run.folder("benchmark").read_all("benchmark").to_pylist()
    return {(r["benchmark"], r["scorer"], r["subject"], r["measure"]): r for r in rows}


def test_benchmark_judges_every_scorer(judged):
    found = figures(judged)
    for scorer in SCORERS:
        assert found["planted", scorer, "logit", "five"]["value"] > 0.5
        assert found["final layer", scorer, "classes", "five"]["value"] > 0.5
        assert found["held-out", scorer, "hidden", "correlation"]["value"] > 0.05
        assert found["controls", scorer, "shuffled", "explained"]["value"] < 0.02
        assert found["controls", scorer, "randomly initialised", "explained"]["value"] < 0.1
        assert 0.1 < found["stability", scorer, "hidden", "five"]["value"] < 1
        assert found["annotations", scorer, "described units", "human and human"]["units"] == 1
    constant = [r for key, r in found.items() if key[1] == "-" and key[2] == "hidden"]
    assert len(constant) == 1
    assert constant[0]["value"] < found["held-out", "correlation", "hidden", "correlation"]["value"]


def test_figures_are_those_of_the_runs(judged):
    """Held-out correlation of one scorer by its neurons table."""
    run = load_run(compose(judged[:1]).store, "small-correlation")
    rows = run.folder("neurons").read_all("neurons").to_pylist()
    live = [r for r in rows if r["layer"] == "layer4.0" and r["status"] in ("explained", "ambiguous", "unexplained")]
    expected = np.mean([r["confidence"] for r in live if r["confidence"] is not None])
    found = figures(judged)["held-out", "correlation", "hidden", "correlation"]
    assert found["value"] == pytest.approx(expected, abs=1e-6)
    assert found["lower"] < found["value"] < found["upper"]


def test_scorers_share_all_that_comes_before(judged):
    store = compose(judged[:1]).store
    runs = [load_run(store, f"small-{scorer}") for scorer in SCORERS]
    different = {stage for stage in runs[0].stages if len({run.stages[stage] for run in runs}) > 1}
    assert different == {"scores", "explanations", "validation", "neurons"}


def test_shuffled_target_sees_other_images(judged):
    """The shuffled control's activations are the original's, of each image's partner."""
    store = compose(judged[:1]).store
    run, shuffled = (load_run(store, name) for name in ("small-correlation", "small-shuffled-correlation"))
    images = ImageList(run.folder("probing"), 1024, 32, 10_000, {})
    a, b = (matrix(r.folder("activations").read("pooled", 0)["activation"]) for r in (run, shuffled))
    assert images.stored.all()
    close = np.isclose(a[:, images.partner].astype(float), b.astype(float), rtol=1e-3, atol=1e-2)
    assert close.mean() > 0.999


def test_same_command_computes_nothing(judged, capsys):
    assert run_flow(benchmark, judged) == 0
    printed = capsys.readouterr().out
    assert "held-out" in printed
    assert "parts done" not in printed


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("scorers=best", "scorer.name=best: allowed are mean_cosine"),
        ("scorers=auc:top=3", "scorer.params.top: unknown for auc; allowed are share"),
        ("scorers=auc:share=few", "scorers=auc:share=few: share=few: expected a number"),
        ("halves=maybe", "allowed are true, false"),
    ],
)
def test_impossible_arguments(argument, expected, capsys):
    assert run_flow(benchmark, [argument]) == 2
    assert expected in capsys.readouterr().err


def test_tradeoff_where_no_final_unit_has_its_class_name():
    row = {"scorer": "auc", "lower": 0, "upper": 0, "units": 1}
    first = row | {"subject": "classes", "measure": "first", "value": 0.0}
    follows = row | {"subject": "hidden", "measure": "correlation", "value": 0.0}
    assert "auc" in str(tradeoff([first, follows]))


def test_tables_have_a_column_per_scorer():
    row = {"benchmark": "b", "subject": "x", "measure": "m", "lower": 0, "upper": 0, "units": 1}
    lines = tables([row | {"scorer": "auc", "value": 0.5}, row | {"scorer": "correlation", "value": 0.25}])
    assert [line.split() for line in lines] == [["b", "auc", "correlation"], ["x:", "m", "0.500", "0.250"], []]
