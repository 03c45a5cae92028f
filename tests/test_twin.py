"""The randomly initialised twin: it sets the bars, it shares all that the target has no part in."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import t as student_t

from flows.config import compose
from flows.run import load_run
from flows.sweep import Sweep
from tasks.correlation import read_pooled
from tasks.images import ImageReader
from tasks.layers import Block
from tasks.neurons import NeuronsJob, NeuronsSettings, NeuronsWorker
from tasks.store import Folder, StoreSettings
from tasks.tables import SCHEMAS, make_table, matrix
from tasks.target import TargetSettings, load_target
from tests import samples

SHARED = {"listing", "probing", "phrases", "phrase_embeddings", "vocabulary", "image_embeddings"}


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
        "neurons.twin_nets=4",
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
    assert {stage for stage in twin.stages if twin.stages[stage] == run.stages.get(stage)} == SHARED
    assert set(run.stages) - set(twin.stages) == {"traits", "coverage", "report"}
    assert "goldfish" in run.folder("vocabulary").read_all("concepts")["concept"].to_pylist()
    changed = {key for key in run.config if run.config[key] != twin.config[key]}
    assert changed == {"run", "target", "neurons"}
    assert twin.config["target"]["checkpoint"] is None
    assert twin.config["neurons"]["twin"] is False


def test_bar_is_what_chance_reaches_with_the_same_name(reference):
    """Every bar by a slow look at the twin's pooled activations and names."""
    run, twin = runs(reference)
    concepts = run.folder("vocabulary").read_all("concepts")["concept"].to_pylist()
    texts = matrix(run.folder("vocabulary").read_all("concept_embeddings")["embedding"]).astype(np.float64)
    vectors = matrix(run.folder("image_embeddings").read_all("image_embeddings")["embedding"]).astype(np.float64)
    images = run.folder("probing").read_all("images")
    validate = np.flatnonzero((images["split"].to_numpy() == "validate") & (images["status"].to_numpy() == "ok"))
    assert len(validate) > 4
    stored = np.flatnonzero(images["status"].to_numpy() == "ok")  # few images: all are stored
    neurons = run.folder("neurons").read_all("neurons").to_pylist()
    named = twin.folder("explanations").read_all("explanations").to_pylist()
    chance, ratios = {}, []
    for layer in ("layer1.0", "layer4.0"):
        parts = [part for part, rows in enumerate(_layers(twin)) if rows == layer]
        shards = range(run.parts["activations"])
        pooled = np.concatenate(
            [np.concatenate([read_pooled(twin.folder("activations"), s, part) for s in shards], 1) for part in parts]
        )
        pooled = pooled[:, np.isin(stored, validate)].astype(np.float64)
        similarity = vectors[validate] @ texts.T
        r = np.array([[pearson(a, s) for s in similarity.T] for a in pooled])
        nets = [twin.folder("chance").read("chance", n, filters=[("layer", "==", layer)]) for n in range(4)]
        assert all(net["concept"].to_pylist() == concepts for net in nets)
        first = np.nanquantile(r[np.isfinite(r).any(1)], 0.98, axis=0)
        np.testing.assert_allclose(nets[0]["correlation"].to_numpy(), first, atol=1e-3)  # pooled ones are float16
        z = np.arctanh([net["correlation"].to_numpy().astype(np.float64) for net in nets])
        chance[layer] = {c: max(0.05, interval_end(column)) for c, column in zip(concepts, z.T, strict=True)}
        others = {c: max(0.05, interval_end(column[1:])) for c, column in zip(concepts, z.T, strict=True)}
        rows = {
            row["unit"]: row
            for row in twin.folder("validation").read_all("validation").to_pylist()
            if row["layer"] == layer
        }
        ratios += [
            np.arctanh(rows[n["unit"]]["correlation"]) / np.arctanh(others[n["phrase"]])
            for n in named
            if n["layer"] == layer and rows[n["unit"]]["correlation"] is not None
        ]
    times = max(1, np.quantile(ratios, 0.98))
    for neuron in neurons:
        if neuron["phrase"]:
            least = chance[neuron["layer"]][neuron["phrase"]]
            assert neuron["bar"] == pytest.approx(np.tanh(np.arctanh(least) * times), rel=1e-3)
    assert len({neuron["bar"] for neuron in neurons}) > 2
    assert all(n["lower"] > n["bar"] for n in neurons if n["status"] in ("explained", "ambiguous"))


def interval_end(z):
    """Of a one-sided prediction interval of 99 %, back as a correlation."""
    n = len(z)
    return float(np.tanh(z.mean() + student_t.ppf(0.99, n - 1) * z.std(ddof=1) * np.sqrt(1 + 1 / n)))


def _layers(run):
    """Layer of each unit block."""
    parts = range(run.parts["neurons"])
    return [run.folder("neurons").read("neurons", part)["layer"][0].as_py() for part in parts]


def pearson(a, s):
    a, s = a - a.mean(), s - s.mean()
    norm = np.sqrt((a @ a) * (s @ s))
    return a @ s / norm if norm > 0 else np.nan


def test_of_the_twin_itself_few_are_explained(reference):
    status = runs(reference)[1].folder("neurons").read_all("neurons")["status"].to_pylist()
    assert status.count("explained") + status.count("ambiguous") <= 0.03 * len(status) + 2


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
    assert {s for s, f in both.manifest.stages.items() if f != first.manifest.stages[s]} == {
        "neurons",
        "traits",
        "coverage",
        "report",
    }


def test_target_with_fixed_weights_is_refused_and_nothing_written(tmp_path):
    fixed = [*samples.sweep_arguments(tmp_path), "neurons.twin=true", f"store.root={tmp_path}/store"]
    with pytest.raises(ValueError, match=r"^neurons.twin=true: target.name=.*models.py:planted: its weights or layers"):
        Sweep(compose(fixed))
    assert not (tmp_path / "store").exists()


def test_without_validate_images_nothing_is_known_of_chance(arguments, tmp_path):
    split = ["probing.select=0.5", "probing.validate=0", "neurons.twin_nets=3"]
    flow = Sweep(compose([*arguments, f"store.root={tmp_path}", *split]))
    flow.run()
    assert runs(tmp_path)[1].folder("chance").read_all("chance").num_rows == 0
    found = flow.folder("neurons").read_all("neurons").to_pylist()
    assert [neuron["bar"] for neuron in found] == pytest.approx([0.05] * len(found))
    assert "explained" not in {neuron["status"] for neuron in found}


def test_second_random_net_by_hand(arguments, reference):
    """Its weights are of the next seed, and every image is looked at once."""
    _, twin = runs(reference)
    sweep = Sweep(compose([*arguments, f"store.root={reference}", "run=by_hand"]))
    sweep.probing()
    images, settings = sweep.images, sweep.twin.config.target
    assert settings.seed == 1
    target, numbers = load_target(replace(settings, seed=2)), np.flatnonzero(images.split == "validate")
    seen = []
    target.model.layer4[0].register_forward_hook(lambda _, __, output: seen.append(output.amax((2, 3))))
    reader = ImageReader({})
    for number in numbers:
        pixels = torch.from_numpy(target.preprocess.pixels(images.open(number, reader)))[None]
        target.model(target.preprocess.normalise(pixels))
    pooled = torch.cat(seen).T.double().numpy()
    texts = matrix(twin.folder("vocabulary").read_all("concept_embeddings")["embedding"]).astype(np.float64)
    vectors = matrix(twin.folder("image_embeddings").read_all("image_embeddings")["embedding"]).astype(np.float64)
    r = np.array([[pearson(a, s) for s in (vectors[numbers] @ texts.T).T[:20]] for a in pooled])
    expected = np.nanquantile(r[np.isfinite(r).any(1)], 0.98, axis=0)
    found = twin.folder("chance").read("chance", 1, filters=[("layer", "==", "layer4.0")])["correlation"].to_numpy()
    np.testing.assert_allclose(found[:20], expected, atol=1e-4)


LOWER = [0.04, 0.06, 0.24, 0.26, None, 0.9]
Q = [0.001, 0.001, 0.001, 0.001, None, 0.5]


@pytest.mark.parametrize(
    ("reached", "chance", "settings", "bar", "explained"),
    [
        (None, None, {}, 0.05, [1, 2, 3]),  # no twin
        # two and a half times the chance of 0.1
        ([0.1, 0.2, 0.3, None], [0.1] * 4, {"twin_quantile": 0.75}, 0.25, [3]),
        ([0.1, 0.2, 0.3, None], [0.1] * 4, {"twin_quantile": 0.0}, 0.1, [2, 3]),
        # the twin stays below the others
        ([0.1, 0.1, 0.1, None], [0.2] * 4, {}, 0.2, [2, 3]),
        # the mean of four on Fisher's scale, times what the twin reaches beyond the other three
        ([0.1, 0.1, 0.1, None], [0.9, 0.05, 0.05, 0.05], {"twin_quantile": 0.0, "twin_confidence": 0.5}, 0.6712, []),
        # the layer is dead in one net, and three say little
        ([0.02, 0.02, 0.02, None], [0, 0.1, 0.2, None], {}, 0.7241, []),
        ([-0.3, -0.2, 0.01, None], [0.1] * 4, {"min_correlation": 0.25}, 0.25, [3]),
        ([-0.3, -0.2, 0.01, None], [-0.1] * 4, {}, 0.05, [1, 2, 3]),
        ([None, None, None, None], [None] * 4, {}, 0.05, [1, 2, 3]),  # a twin whose layer is dead
    ],
)
def test_names_must_clear_their_bar(tmp_path, reached, chance, settings, bar, explained):
    """Hand-made tables: six units named x, whose chance is given; the twin's are named x too."""
    p = [None if q is None else q * (1 + number) / 6 for number, q in enumerate(Q)]
    named = {"phrase": ["x"] * 6}
    folders = {
        "validation": folder(tmp_path, "validation", validation={"lower": LOWER, "p": p, "correlation": LOWER}),
        "exemplars": folder(tmp_path, "exemplars", unit_stats={"maximum": [1] * 6, "minimum": [0] * 6, "low": [0] * 6}),
        "explanations": folder(tmp_path, "explanations", explanations=named),
        "twin": None,
        "twin_names": None,
    }
    if reached:
        folders["twin"] = folder(tmp_path, "twin", validation={"correlation": reached})
        folders["chance"] = Folder(StoreSettings(str(tmp_path)), "chance", "x", ("chance",))
        for net, value in enumerate(chance):
            rows = {"layer": ["only"], "concept": ["x"], "correlation": [value]}
            folders["chance"].write(net, {"chance": make_table("chance", rows)})
        folders["twin_names"] = folder(tmp_path, "twin_names", explanations={"phrase": ["x"] * len(reached)})
    out = Folder(StoreSettings(str(tmp_path)), "neurons", "x", ("neurons",))
    job = NeuronsJob(out, **folders, blocks=[Block("only", 0, 6)], settings=NeuronsSettings(**settings))
    NeuronsWorker(job).run(0)
    found = out.read("neurons", 0).to_pydict()
    assert found["bar"] == [pytest.approx(bar, abs=1e-3)] * 6
    assert [unit for unit, status in enumerate(found["status"]) if status == "explained"] == explained


def folder(root, name, **tables):
    """A stage of one layer; a column not given is null."""
    made = Folder(StoreSettings(str(root)), name, "x", tuple(tables))
    found = {}
    for table, columns in tables.items():
        count = len(next(iter(columns.values())))
        rows = {c: [None] * count for c in SCHEMAS[table].names} | {"layer": ["only"] * count} | columns
        found[table] = make_table(table, rows | ({"unit": range(count)} if "unit" in rows else {}))
    made.write(0, found)
    return made


def test_bars_of_the_twin_itself_know_nothing_of_what_they_judge(tmp_path):
    """Hand-made: the first net, which it is, says 0.9, the others 0.1; names of even units reach three times that on
    Fisher's scale, of odd ones twice. So odd units must exceed three times it, and even ones twice."""
    chance = Folder(StoreSettings(str(tmp_path)), "chance", "x", ("chance",))
    for net, value in enumerate([0.9, 0.1, 0.1, 0.1]):
        rows = {"layer": ["only"], "concept": ["x"], "correlation": [value]}
        chance.write(net, {"chance": make_table("chance", rows)})
    z = np.arctanh(0.1)
    units = {
        "validation": {"correlation": np.tanh(z * np.array([3, 2, 3, 1, 1, 2]))},
        "explanations": {"phrase": ["x"] * 6},
    }
    found = {name: folder(tmp_path, name, **{name: columns}) for name, columns in units.items()}
    settings = NeuronsSettings(twin_quantile=1.0)
    job = NeuronsJob(chance, chance, found["explanations"], found["validation"], [], settings)
    job.chance, job.twin, job.twin_names = chance, replace(found["validation"]), found["explanations"]
    rows = found["explanations"].read("explanations", 0)
    bars = NeuronsWorker(job).bars(*(rows[c] for c in ("layer", "unit", "phrase")))
    assert bars.tolist() == pytest.approx(np.tanh(z * np.array([2, 3] * 3)).tolist(), rel=1e-4)


@pytest.mark.filterwarnings("error")
def test_a_bar_of_almost_one_is_no_warning(tmp_path):
    """Three nets that follow x nearly perfectly or against it: of a fourth nothing is known, so the bar is as high."""
    chance = Folder(StoreSettings(str(tmp_path)), "chance", "x", ("chance",))
    for net, value in enumerate([0.0, 1.0, -1.0]):
        rows = {"layer": ["only"], "concept": ["x"], "correlation": [value]}
        chance.write(net, {"chance": make_table("chance", rows)})
    units = {"validation": {"correlation": [0.1, 0.2]}, "explanations": {"phrase": ["x"] * 2}}
    found = {name: folder(tmp_path, name, **{name: columns}) for name, columns in units.items()}
    job = NeuronsJob(chance, chance, found["explanations"], found["validation"], [], NeuronsSettings())
    job.chance, job.twin, job.twin_names = chance, found["validation"], found["explanations"]
    rows = found["explanations"].read("explanations", 0)
    bars = NeuronsWorker(job).bars(*(rows[c] for c in ("layer", "unit", "phrase")))
    assert bars.tolist() == pytest.approx([0.999] * 2)
