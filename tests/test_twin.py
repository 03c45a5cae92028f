"""The randomly initialised twin: its layers set the bars, it shares all that the target has no part in."""

import shutil

import numpy as np
import pytest
from safetensors.torch import save_file

from flows.config import compose
from flows.run import load_run
from flows.show import show
from flows.sweep import Sweep
from tasks.layers import Block
from tasks.neurons import NeuronsJob, NeuronsSettings, NeuronsWorker
from tasks.store import Folder, StoreSettings
from tasks.tables import SCHEMAS, make_table
from tasks.target import TargetSettings, load_target
from tests import samples

SHARED = {"listing", "probing", "vocabulary", "image_embeddings", "concept_embeddings"}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A sweep of a small ResNet whose weights lie in a file and whose 1,000 class names are the vocabulary."""
    folder = tmp_path_factory.mktemp("drawn")
    model = load_target(TargetSettings("timm", "test_resnet", pretrained=False, seed=7)).model
    save_file(model.state_dict(), folder / "weights.safetensors")
    return [
        *samples.sweep_arguments(folder),
        "target.source=timm",
        "target.name=test_resnet",
        f"target.checkpoint={folder}/weights.safetensors",
        "target.preprocess={size: [64, 64], resize_to: [64, 64]}",
        "layers.names=[layer1.0,layer4.0]",
        "vocabulary.source=class_names",
        "vocabulary.path=null",
        "neurons.twin=true",
        "unit_block=50",
        "cluster=none",
    ]


@pytest.fixture(scope="module")
def reference(arguments, tmp_path_factory):
    """Root of a store with a finished sweep and its twin."""
    root = tmp_path_factory.mktemp("reference")
    Sweep(compose([*arguments, f"store.root={root}"])).run()
    return root


def runs(root):
    return [load_run(StoreSettings(str(root)), name) for name in ("drawn", "drawn-twin")]


def test_twin_shares_what_the_target_has_no_part_in(reference):
    run, twin = runs(reference)
    assert {stage for stage in twin.stages if twin.stages[stage] == run.stages[stage]} == SHARED
    assert set(run.stages) - set(twin.stages) == {"report"}
    assert "goldfish" in run.folder("vocabulary").read_all("concepts")["concept"].to_pylist()
    changed = {key for key in run.config if run.config[key] != twin.config[key]}
    assert changed == {"run", "target", "neurons"}
    assert twin.config["target"]["checkpoint"] is None
    assert twin.config["neurons"]["twin"] is False


def test_bar_is_the_quantile_of_the_twins_confidence_in_the_layer(reference):
    run, twin = runs(reference)
    reached = twin.folder("validation").read_all("validation").to_pylist()
    neurons = run.folder("neurons").read_all("neurons").to_pylist()
    bars = {}
    for layer in ("layer1.0", "layer4.0"):
        known = [r["correlation"] for r in reached if r["layer"] == layer and r["correlation"] is not None]
        bars[layer] = np.quantile(np.array(known, np.float32), 0.98)
        assert bars[layer] > 0.05
        np.testing.assert_allclose([n["bar"] for n in neurons if n["layer"] == layer], bars[layer], atol=1e-6)
    assert bars["layer1.0"] != bars["layer4.0"]
    assert all(n["lower"] > n["bar"] for n in neurons if n["status"] in ("explained", "ambiguous"))
    np.testing.assert_allclose(twin.folder("neurons").read_all("neurons")["bar"], 0.05)
    assert "bar         0.05" in show(twin, "layer4.0", 3)
    assert f"bar         {bars['layer4.0']:.2f}" in show(run, "layer4.0", 3)


def test_second_run_computes_nothing(arguments, reference, capsys):
    flow = Sweep(compose([*arguments, f"store.root={reference}"]))
    flow.run()
    assert not flow.worked
    assert "everything was done already" in capsys.readouterr().out


def test_ray_makes_what_is_lost_with_the_same_bytes(arguments, reference, tmp_path):
    store = shutil.copytree(reference, tmp_path / "store")
    shutil.rmtree(store / "validation")  # of both
    shutil.rmtree(store / "neurons")
    flow = Sweep(compose([*arguments, "cluster.ray=true", "cluster.num_cpus=2", f"store.root={store}"]))
    flow.run()
    assert flow.worked
    expected, found = samples.stored_tables(reference), samples.stored_tables(store)
    assert set(found) == set(expected)
    assert [name for name in expected if expected[name] != found[name]] == []


def test_without_a_twin_nothing_depends_on_it(arguments, tmp_path):
    """Also: with a twin, all but the neurons and the report is what it is without one."""
    alone = [*arguments, f"store.root={tmp_path}", "neurons.twin=false"]
    first, other = Sweep(compose(alone)), Sweep(compose([*alone, "neurons.twin_quantile=0.5"]))
    first.run()
    other.run()
    assert not other.worked
    assert first.manifest.stages == other.manifest.stages
    assert not (tmp_path / "runs" / "drawn-twin").exists()
    both = Sweep(compose([*arguments, f"store.root={tmp_path}"]))
    both.run()
    assert {s for s, f in both.manifest.stages.items() if f != first.manifest.stages[s]} == {"neurons", "report"}


def test_target_with_fixed_weights_is_refused_and_nothing_written(tmp_path):
    fixed = [*samples.sweep_arguments(tmp_path), "neurons.twin=true", f"store.root={tmp_path}/store"]
    with pytest.raises(ValueError, match=r"^neurons.twin=true: target.name=.*models.py:planted: its weights or layers"):
        Sweep(compose(fixed))
    assert not (tmp_path / "store").exists()


LOWER = [0.04, 0.06, 0.24, 0.26, None, 0.9]
Q = [0.001, 0.001, 0.001, 0.001, None, 0.5]


@pytest.mark.parametrize(
    ("reached", "settings", "bar", "explained"),
    [
        (None, {}, 0.05, [1, 2, 3]),  # no twin
        ([0.1, 0.2, 0.3, None], {"twin_quantile": 0.75}, 0.25, [3]),
        ([0.1, 0.2, 0.3, None], {"twin_quantile": 0.0}, 0.1, [2, 3]),
        ([-0.3, -0.2, 0.01, None], {}, 0.05, [1, 2, 3]),  # the twin reaches less than min_correlation
        ([-0.3, -0.2, 0.01, None], {"min_correlation": 0.25}, 0.25, [3]),
        ([None, None, None, None], {}, 0.05, [1, 2, 3]),  # a twin whose layer is dead
    ],
)
def test_names_must_clear_the_bar_of_their_layer(tmp_path, reached, settings, bar, explained):
    """Hand-made tables: one layer of six units after one that the twin reaches 0.99 in."""
    p = [None if q is None else q * (1 + number) / 6 for number, q in enumerate(Q)]
    validation = {"lower": LOWER, "p": p, "correlation": LOWER}
    folders = {
        "validation": folder(tmp_path, "validation", "validation", validation),
        "exemplars": folder(
            tmp_path, "exemplars", "unit_stats", {"maximum": [1] * 6, "minimum": [0] * 6, "low": [0] * 6}
        ),
        "explanations": folder(tmp_path, "explanations", "explanations", {"phrase": ["x"] * 6}),
        "twin": reached and folder(tmp_path, "twin", "validation", {"correlation": reached}),
    }
    out, blocks = Folder(StoreSettings(str(tmp_path)), "neurons", "x", ("neurons",)), [Block("first", 0, 6)]
    job = NeuronsJob(out, **folders, blocks=[*blocks, Block("second", 0, 6)], settings=NeuronsSettings(**settings))
    worker = NeuronsWorker(job)
    worker.run(0)
    worker.run(1)
    found = [out.read("neurons", part).to_pydict() for part in (0, 1)]
    assert found[1]["bar"] == [pytest.approx(bar)] * 6
    assert [unit for unit, status in enumerate(found[1]["status"]) if status == "explained"] == explained
    if reached:
        assert found[0]["bar"] == [pytest.approx(0.99)] * 6
        assert "explained" not in found[0]["status"]


def folder(root, name, table, columns):
    """A stage of two layers with the same rows; a column not given is null. The twin reaches 0.99 in the first."""
    made = Folder(StoreSettings(str(root)), name, "x", (table,))
    count = len(next(iter(columns.values())))
    for part, layer in enumerate(("first", "second")):
        rows = {c: [None] * count for c in SCHEMAS[table].names} | columns | {"layer": [layer] * count}
        if name == "twin" and layer == "first":
            rows["correlation"] = [0.99] * count
        made.write(part, {table: make_table(table, rows | {"unit": range(count)})})
    return made
