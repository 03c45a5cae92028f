"""Calibration: probabilities are monotone, right on the whole, and never learned from the world they are tested on."""

import xml.etree.ElementTree as xml
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.calibrate import known, main
from flows.config import compose
from flows.run import Run, load_run
from flows.sweep import Sweep
from tasks.calibration import (
    FEATURES,
    SHIPPED,
    calibration_error,
    error_interval,
    evidence,
    fit,
    held_out,
    load,
    reliability,
    save,
)
from tasks.charts import Axis, Point, chart
from tasks.store import StoreSettings
from tests import samples


def drawn(count, seed, slope=2.0):
    """Evidence, and names that are right with a known probability of its first column."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(count, len(FEATURES)))
    truth = 1 / (1 + np.exp(-slope * found[:, 0]))
    return found, rng.random(count) < truth, truth


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), count=st.integers(5, 80))
def test_probability_is_monotone_and_never_certain(seed, count):
    found, right, _ = drawn(count, seed)
    learned = fit(found, right, "joint", ["a"])
    line = np.linspace(-5, 5, 50)[:, None] * (np.array(learned.weights) * np.array(learned.scale)) + learned.centre
    probability = learned.probability(line)
    assert (np.diff(probability) >= -1e-12).all()
    assert probability.min() > 0
    assert probability.max() < 1


def test_probability_is_the_truth_where_there_are_many_units():
    learned = fit(*drawn(20_000, 1)[:2], "joint", ["a"])
    found, right, truth = drawn(5_000, 2)
    probability = learned.probability(found)
    assert np.abs(probability - truth).mean() < 0.03
    assert calibration_error(probability, right) < 0.03


def test_evidence_that_says_nothing_gives_the_share_that_is_right():
    found, right, _ = drawn(4_000, 3, slope=0.0)
    probability = fit(found, right, "joint", ["a"]).probability(drawn(500, 4)[0])
    assert np.abs(probability - right.mean()).mean() < 0.05  # at the ends few units decide


def test_calibration_error_is_the_mean_distance_over_equal_bins():
    rng = np.random.default_rng(0)
    probability, right = rng.random(103), rng.random(103) < 0.5
    rows = sorted(zip(probability, right, strict=True))
    total, start = 0.0, 0
    for size in [11] * 3 + [10] * 7:
        part = rows[start : start + size]
        total += abs(sum(p for p, _ in part) - sum(r for _, r in part))
        start += size
    assert calibration_error(probability, right) == pytest.approx(total / 103)
    assert [b.units for b in reliability(probability, right)] == [11] * 3 + [10] * 7
    low, high = error_interval(probability, right)
    assert low < high


def test_overconfidence_is_seen():
    right = np.arange(1000) % 2 == 0
    assert calibration_error(np.full(1000, 0.9), right) == pytest.approx(0.4)


def test_a_world_is_judged_by_what_the_others_teach():
    found, right, _ = drawn(300, 5)
    units = {"a": (found, right), "b": (found, ~right)}  # b is the opposite: whoever learned from itself would be right
    probability, truth = held_out(units, "joint")
    assert truth.tolist() == [*right, *~right]
    by_hand = fit(found, ~right, "joint", ["b"]).probability(found)
    assert np.array_equal(probability[:300], by_hand)
    assert calibration_error(probability, truth) > 0.2


def test_evidence_of_tables_and_of_units_without_a_name():
    explanations = pa.table({"margin": pa.array([1.0, 0.0, 2.0]), "match": pa.array([0.5, 0.25, None], pa.float32())})
    validation = pa.table({"correlation": pa.array([0.5, 1.0, None], pa.float32())})
    found = evidence(explanations, validation)
    assert found[0].tolist() == pytest.approx([np.arctanh(0.5), 0.0, 0.5])
    assert np.isfinite(found[1]).all()
    assert np.isnan(fit(*drawn(50, 6)[:2], "joint", []).probability(found)).tolist() == [False, False, True]


def test_file_is_read_as_it_was_written_and_only_for_its_scorer(tmp_path):
    learned, path = fit(*drawn(60, 7)[:2], "joint", ["a", "b"]), str(tmp_path / "calibration.json")
    save(learned, path)
    assert load(path, "joint") == learned
    assert load(path, "auc") is None
    save(replace(learned, scorer="auc"), path)
    assert load(path, "joint") is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"scorer": 1, "more": 2}'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"neurons\.calibration=.*axonym calibrate") as error:
        compose([f"neurons.calibration={path}"])
    assert "\n" not in str(error.value)


def test_shipped_calibration_is_of_the_default_scorer_and_of_other_worlds():
    shipped = load(str(SHIPPED), compose([]).scorer.name)
    assert shipped.units >= 500
    assert "weights" not in shipped.sources  # the shipped world's folder


WORDS = [
    "cat",
    "dog",
    "sun",
    "moon",
    "tree",
    "car",
    "road",
    "sea",
    "sand",
    "snow",
    "fire",
    "rain",
    "hat",
    "cup",
    "door",
    "lamp",
]


def finished(root, run, names, model="test_resnet"):
    """A sweep whose classes and vocabulary are these names."""
    (root / f"{run}.txt").write_text("\n".join(names))
    arguments = [
        *samples.sweep_arguments(root / run),
        *("target.source=timm", f"target.name={model}", "target.pretrained=false", "layers.names=[logits]"),
        *(f"target.kwargs={{num_classes: {len(names)}}}", f"target.class_names={root}/{run}.txt"),
        *("target.preprocess={size: [64, 64], resize_to: [64, 64]}", "vocabulary.source=class_names"),
        *("vocabulary.path=null", f"store.root={root}/store", f"run={run}", "cluster=none"),
    ]
    Sweep(compose(arguments)).run()
    return load_run(compose(arguments).store, run)


def test_a_final_layer_teaches_and_is_judged_by_another_target(tmp_path, capsys):
    """Classes are called what the net was named before where no two units share the name, so some names are right."""
    named = finished(tmp_path, "first", WORDS).folder("neurons").read_all("neurons")["phrase"].to_pylist()
    once = [name if name and named.index(name) == i else None for i, name in enumerate(named)]
    free = iter(word for word in WORDS if word not in once)
    classes = [name or next(free) for name in once]
    run = finished(tmp_path, "second", classes)
    named = run.folder("explanations").read_all("explanations")["phrase"].to_pylist()
    varies = run.folder("validation").read_all("validation")["correlation"].is_valid().to_pylist()
    source, (found, right) = known(run)
    assert source == "test_resnet"
    assert right.tolist() == [n == own for n, own, v in zip(named, classes, varies, strict=True) if n and v]
    assert 0 < right.sum() < len(right)
    assert found.shape == (len(right), len(FEATURES))
    finished(tmp_path, "third", WORDS, "test_vit")
    assert main(["runs=[second,third]", f"out={tmp_path}/made", f"store.root={tmp_path}/store"]) == 0
    assert "of 2 sources" in capsys.readouterr().out
    assert load(str(tmp_path / "made/calibration.json"), "joint").sources == ["test_resnet", "test_vit"]
    assert "circle" in (tmp_path / "made/reliability.svg").read_text()


def test_runs_of_one_source_are_refused(tmp_path):
    finished(tmp_path, "one", WORDS)
    with pytest.raises(ValueError, match=r"^runs=one,one: all of test_resnet; give runs of two worlds or targets"):
        main(["runs=one,one", f"store.root={tmp_path}/store"])


def test_what_is_no_sweep_is_refused(tmp_path):
    Run("world-x", StoreSettings(f"{tmp_path}/store"), {"out": "x"}).save()
    with pytest.raises(ValueError, match=r"^runs=world-x: world-x is not the run of a sweep"):
        main(["runs=world-x", f"store.root={tmp_path}/store"])


def test_chart_names_every_point_once_and_apart():
    points = [Point(0.5, 0.5 + i / 1000, f"point <{i}>", 0.4, 0.6, i == 0) for i in range(12)]
    text = chart("a & b", Axis("x", 0, 1, True), Axis("y", 0, 1), points, diagonal=True)
    texts = xml.fromstring(text).iter("{http://www.w3.org/2000/svg}text")
    names = [e for e in texts if (e.text or "").startswith("point")]
    assert sorted(e.text for e in names) == sorted(p.name for p in points)
    for side in ("start", "end"):  # behind the points, before them
        places = sorted(float(e.get("y")) for e in names if e.get("text-anchor") == side)
        assert len(places) > 1
        assert min(np.diff(places)) >= 12
