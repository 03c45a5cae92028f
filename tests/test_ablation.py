"""Units switched off: the screen against finite differences, ablations against slow obvious loops; real parts only."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from scipy import stats
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from torchvision.models.resnet import BasicBlock

from flows.config import compose
from flows.run import load_run
from flows.sweep import Sweep
from tasks.ablation import AblationJob, AblationSettings, AblationWorker, _sets, ablated_classes, mean_interval
from tasks.causes import beside
from tasks.classes import Classes, class_of_label
from tasks.discovery import find_layers
from tasks.forward import HookedTarget, TargetPass, describe
from tasks.layers import LayersSettings, hooked, unit_blocks
from tasks.pairs import PairsJob, PairsWorker, best_known, largest
from tasks.pixels import Preprocess
from tasks.probing import ProbingSettings
from tasks.replay import Change, ablated, recorded
from tasks.screen import ScreenJob, ScreenWorker, first_order
from tasks.store import Folder, StoreSettings
from tasks.tables import matrix
from tasks.target import TargetSettings
from tests import samples
from tests.models import planted

CNN = TargetSettings("factory", "tests/models.py:random_cnn", preprocess={"size": [32, 32], "resize_to": [32, 32]})
VIT = TargetSettings(
    "timm",
    "test_vit",
    pretrained=False,
    kwargs={"num_classes": 5, "img_size": 64},
    preprocess={"size": [64, 64], "resize_to": [64, 64]},
)


# --- replay


class Passing(nn.Module):
    """A residual around a module that hands its input on, and one around a module that writes over its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop, self.relu = nn.Conv2d(3, 8, 4, 4), nn.Dropout(), nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = x + 2 * self.drop(x).sin()
        return self.head((x + self.relu(x).cos()).mean((2, 3)))


MODELS = {
    "passing": Passing,
    "resnet": lambda: timm.create_model("test_resnet", num_classes=7),  # writes its residuals over its branches
    "shared relu": lambda: models.resnet.ResNet(BasicBlock, [1, 1, 1, 1], 7),  # one, in place, runs twice a block
    "mobilenet": lambda: models.mobilenet_v3_small(num_classes=7),
    "registers": lambda: timm.create_model("test_vit", num_classes=7, reg_tokens=2, img_size=64),
    "channels last": lambda: timm.create_model("test_convnext", num_classes=7),
    "torchvision vit": lambda: models.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=7),
}


PRESET = {"passing": ["conv", "drop", "relu", "head"]}


def built(name, *entries):
    """Model with noise for what starts at zero or one, some of its layers up to the last, and an input."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = MODELS[name]().eval().requires_grad_(False)
    for tensor in (t for t in model.state_dict().values() if t.is_floating_point()):
        tensor.add_(0.1 * torch.rand_like(tensor))
    layers = find_layers(
        model, Preprocess((64, 64), (64, 64)), LayersSettings(list(entries) or PRESET.get(name, ["all"]))
    )
    return model, [*layers[: -1 : -(-len(layers) // 8)], layers[-1]], torch.randn(3, 3, 64, 64)


def whole(model, x, changes, positions="all"):
    """The model run from its input on, changes made by hooks."""
    by_name = {change.layer.name: change for change in changes}
    with hooked(model, list(by_name), lambda name, out: by_name[name](out, positions)):
        return model(x)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_replay_equals_the_whole_pass(name):
    model, layers, x = built(name)
    with recorded(model, [layer.name for layer in layers]) as recording:
        unchanged = model(x)
    assert torch.equal(unchanged, model(x))
    moved = 0
    for layer in layers:
        change = [Change(layer, [0, layer.num_units - 1], [0.0, 2.5])]
        found = ablated(model, x, recording, change, "all")
        assert torch.equal(found, whole(model, x, change)), layer.name
        moved += not torch.equal(found, unchanged)
    assert moved > len(layers) / 2, "some units are zero already"
    assert torch.equal(unchanged, model(x)), "the model is as it was"
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["resnet", "registers"])
@torch.inference_mode()
def test_units_of_several_layers_together(name):
    """Also of layers inside one another, and only at some positions."""
    model, layers, x = built(name)
    changes = [Change(layer, [1], [0.0]) for layer in layers[:-1]]
    with recorded(model, [layer.name for layer in layers]) as recording:
        model(x)
    for positions in ("all", "patches"):
        found = ablated(model, x, recording, changes, positions)
        assert torch.equal(found, whole(model, x, changes, positions)), positions


@torch.inference_mode()
def test_what_came_before_costs_nothing():
    model, layers, x = built("resnet")
    with recorded(model, [layer.name for layer in layers]) as recording:
        model(x)
    with FlopCounterMode(display=False) as full:
        model(x)
    flops = []
    for layer in layers:
        with FlopCounterMode(display=False) as counter:
            ablated(model, x, recording, [Change(layer, [0], [0.0])], "all")
        flops.append(counter.get_total_flops())
    assert flops[0] < full.get_total_flops()
    assert flops == sorted(flops, reverse=True)
    assert flops[-1] == 0, "after the logits there is nothing to do"


def test_positions():
    model, layers, x = built("registers", "mlp")
    layer, output = layers[0], {}
    with hooked(model, [layer.name], lambda name, out: output.update({name: out.clone()})):
        model(x)
    before = output[layer.name]
    prefix, half = layer.prefix, Change(layer, [4], [7.0])
    assert prefix == 3
    after = half(before, "prefix")
    assert (after[:, :prefix, 4] == 7).all()
    assert torch.equal(after[:, prefix:], before[:, prefix:])
    after = half(before, "patches")
    assert torch.equal(after[:, :prefix], before[:, :prefix])
    assert (after[:, prefix:, 4] == 7).all()
    assert torch.equal(after[:, :, :4], before[:, :, :4])


# --- screen


def test_screen_is_exact_where_all_that_follows_is_linear():
    """Behind relu, Planted takes means and one linear layer."""
    model, x = planted().eval().requires_grad_(False), torch.randn(4, 3, 64, 96)
    layer = find_layers(model, Preprocess((64, 96), (64, 96)), LayersSettings(["relu"]))[0]
    found = first_order(model, [layer], x, np.array([0, 1, 2, 0]), "all")
    for unit in range(layer.num_units):
        drop = model(x) - whole(model, x, [Change(layer, [unit], [0.0])])
        expected = drop[range(4), [0, 1, 2, 0]].double()
        torch.testing.assert_close(found.effect_BU[:, unit], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("resnet", "all"),
        ("shared relu", "all"),
        ("passing", "patches"),
        ("registers", "all"),
        ("registers", "patches"),
        ("registers", "prefix"),
    ],
)
def test_screen_equals_finite_differences(name, positions):
    """A unit made smaller by a little, in float64; the classes are the predicted ones, the logits say nothing."""
    model, layers, x = built(name)
    model, x = model.double(), x.double()
    layers = [layer for layer in layers if positions != "prefix" or layer.prefix]
    found = first_order(model, layers, x.clone(), None, positions)
    logits = model(x)
    own = logits.argmax(1)
    assert found.classes.tolist() == found.predicted.tolist() == own.tolist()
    start, step = 0, 1e-6
    for layer in layers:
        for unit in (0, layer.num_units // 2):

            def smaller(_name, out, layer=layer, unit=unit):
                out = out.clone()
                layer.places(out, positions)[..., unit] *= 1 - step
                return out

            with hooked(model, [layer.name], smaller):
                slope = (logits - model(x))[range(3), own] / step
            expected = torch.zeros(3) if layer.name in ("fc", "head") else slope
            torch.testing.assert_close(found.effect_BU[:, start + unit], expected.double(), rtol=1e-4, atol=1e-6)
        start += layer.num_units


def test_labels_name_classes():
    names = ["tench, Tinca tinca", "crane", "crane", "Red", "tench"]
    found = class_of_label({"tench", "crane", "red", "tench, Tinca tinca", "3", "n01440764"}, names, 5)
    assert found == {"red": 3, "tench": 4, "tench, Tinca tinca": 0}
    assert class_of_label({"n01440764", "n01443537", "dog"}, None, 1000) == {"n01440764": 0, "n01443537": 1}
    assert class_of_label({"n01440764"}, None, 10) == {}
    assert class_of_label(set(), names, 5) == {}


# --- the stages


def probed(root: Path, shard_size: int = 32):
    folder = samples.draw_folder(root / "photos", 160)
    settings = ProbingSettings(str(folder), shard_size=shard_size, batch_size=8, explain=0.2, select=0.4, validate=0.4)
    return samples.probe(root / "store", settings)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return probed(tmp_path_factory.mktemp("drawn"))


INDEX = {"blue": 2, "green": 1, "red": 0}


def chain(root, images, target=CNN, names=("1", "4"), index_of=None, positions="all", **settings):
    """Screen, pairs and ablation in this process."""
    store, about = StoreSettings(str(root)), describe(target, LayersSettings(list(names)))
    chosen = {"pairs": 6, "controls": 3, "classes": 2, "to": "zero"} | settings
    model = TargetPass(images, target, about.layers, "float32", 1)
    blocks = unit_blocks(about.layers, 7)
    screen = ScreenJob(
        Folder(store, "screen", "x", ("screen", "screen_counts", "classes")), model, blocks, positions, index_of or {}
    )
    worker = ScreenWorker(screen)
    for part in range(images.num_shards):
        worker.run(part)
    folder = Folder(store, "pairs", "x", ("pairs",))
    PairsWorker(PairsJob(folder, images, screen.out, blocks, about.num_classes, **chosen)).run(0)
    out = Folder(store, "ablation", "x", ("ablation", "cumulative"))
    job = AblationJob(out, model, screen.out, folder, positions, 10)
    worker = AblationWorker(job)
    for part in range(max(1, len(ablated_classes(folder)))):
        worker.run(part)
    return job


@pytest.fixture(scope="module", params=["labels", "predicted"])
def done(request, images, tmp_path_factory):
    return chain(tmp_path_factory.mktemp("done"), images, index_of=INDEX if request.param == "labels" else None)


def one_by_one(job, image, changes=()):
    """Logits of one image, the model run whole."""
    target = HookedTarget(job.model)
    ((_, x),) = target.inputs([np.array([image])])
    with torch.inference_mode():
        return whole(target.model, x, list(changes), job.positions)[0].numpy()


def test_classes_are_the_labels_or_what_is_predicted(done, images):
    classes = Classes(done.screen, images)
    held_out = np.isin(images.split, ("select", "validate"))
    assert np.array_equal(classes.predicted >= 0, held_out)
    for image in np.flatnonzero(held_out)[:20]:
        assert classes.predicted[image] == one_by_one(done, image).argmax()
    label = np.array([INDEX.get(name, -1) for name in images.column("label")])
    if np.array_equal(classes.own, classes.predicted):
        assert done.screen.read_all("classes")["class_index"].null_count == 0
    else:
        assert np.array_equal(classes.own, np.where(held_out, label, -1))
        assert (classes.own == -1)[held_out].any(), "yellow is no class"


def test_screen_is_a_sum_over_select_images(done, images):
    """Against image by image passes; pairs are the largest means, the rest of the table fits them."""
    classes = Classes(done.screen, images)
    sums, counts = {}, np.zeros(10)
    target = HookedTarget(done.model)
    for image in classes.of("select"):
        ((_, x),) = target.inputs([np.array([image])])
        own = classes.own[image]
        found = first_order(target.model, done.model.layers, x, np.array([own]), "all")
        sums[own] = sums.get(own, 0) + found.effect_BU[0].numpy()
        counts[own] += 1
    start = {"1": 0, "4": 16}
    enough = {own for own in sums if min(counts[own], (classes.own[classes.of("validate")] == own).sum()) >= 4}
    best = sorted(((v / counts[own] for own in enough for v in sums[own])), reverse=True)
    rows = done.pairs.read_all("pairs").to_pylist()
    pairs = [row for row in rows if row["role"] == "pair"]
    np.testing.assert_allclose([row["screen"] for row in pairs], best[:6], rtol=1e-4)
    assert [row["rank"] for row in pairs] == list(range(6))
    for row in rows:
        expected = sums[row["class_index"]][start[row["layer"]] + row["unit"]] / counts[row["class_index"]]
        assert row["screen"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert row["value"] == 0
    for pair in pairs:
        controls = [r for r in rows if r["role"] == "control" and r["rank"] == pair["rank"]]
        units = {(r["layer"], r["unit"], r["class_index"]) for r in controls}
        assert len(units) == 3
        assert {(layer, own) for layer, _, own in units} == {(pair["layer"], pair["class_index"])}
        assert pair["unit"] not in {unit for _, unit, _ in units}


def test_ablation_equals_a_slow_loop(done, images):
    classes, layers = Classes(done.screen, images), {layer.name: layer for layer in done.model.layers}
    table = done.out.read_all("ablation").to_pylist()
    pairs = {(r["layer"], r["unit"], r["class_index"]): r for r in done.pairs.read_all("pairs").to_pylist()}
    assert table
    for row in table[:: max(1, len(table) // 8)]:
        own = row["class_index"]
        validate = sorted(classes.of("validate"), key=lambda i: images.order[i])
        members = [i for i in validate if classes.own[i] == own][:10]
        others = [i for i in validate if classes.own[i] != own][: len(members)]
        change = [Change(layers[row["layer"]], [row["unit"]], [0.0])]
        drops = {}
        for name, chosen in (("", members), ("other_", others)):
            before = np.array([one_by_one(done, i) for i in chosen], np.float64)
            after = np.array([one_by_one(done, i, change) for i in chosen], np.float64)
            at = np.arange(len(chosen)), classes.own[chosen]
            right = [(logits.argmax(1) == classes.own[chosen]).astype(float) for logits in (before, after)]
            drops |= {f"{name}logit": before[at] - after[at], f"{name}accuracy": right[0] - right[1]}
        assert row["images"] == len(members) >= 4
        for name, values in drops.items():
            assert row[f"{name}_drop"] == pytest.approx(values.mean(), abs=2e-6)
        low, high = stats.t.interval(0.95, len(members) - 1, drops["logit"].mean(), stats.sem(drops["logit"]))
        assert [row["logit_lower"], row["logit_upper"]] == pytest.approx([low, high], abs=1e-5)
        assert row["screen"] == pairs[row["layer"], row["unit"], own]["screen"]


def test_cumulative_switches_off_the_best_units_together(done, images):
    classes, layers = Classes(done.screen, images), done.model.layers
    table, rows = done.out.read_all("cumulative").to_pylist(), done.pairs.read_all("pairs").to_pylist()
    known = {row["class_index"] for row in rows if row["role"] == "together"}
    assert len(known) == 2
    assert {row["class_index"] for row in table} == known
    for own in known:
        found = [row for row in table if row["class_index"] == own]
        units = [row for row in rows if row["role"] == "together" and row["class_index"] == own]
        assert [row["screen"] for row in units] == sorted((row["screen"] for row in units), reverse=True)
        numbers = [row["units"] for row in found]
        assert numbers[:3] == [0, 1, 2]
        assert numbers[-1] == len(units)
        validate = sorted(classes.of("validate"), key=lambda i: images.order[i])
        members = [i for i in validate if classes.own[i] == own][:10]
        for row in found[:4]:
            off = units[: row["units"]]
            changes = [Change(x, [u["unit"] for u in off if u["layer"] == x.name], []) for x in layers]
            changes = [replace(change, values=[0.0] * len(change.units)) for change in changes if change.units]
            logits = np.array([one_by_one(done, i, changes) for i in members])
            assert row["logit"] == pytest.approx(logits[:, own].mean(), abs=1e-5)
            assert row["accuracy"] == pytest.approx((logits.argmax(1) == own).mean())


def test_units_together_are_compared_with_controls_of_the_same_layers():
    """Unit 1 has none, because its layer has no other; so there is no comparison from two units on."""
    roles = [("together", 0), ("together_control", 0), ("together", 1), ("together", 2), ("together_control", 2)]
    rows = [{"role": role, "rank": rank} for role, rank in [*roles, ("together", 3), ("together_control", 3)]]
    found = {(role, n): [row["rank"] for row in units] for role, n, units in _sets(rows)}
    assert found == {("together", n): list(range(n)) for n in (1, 2, 4)} | {("together_control", 1): [0]}
    assert _sets([]) == []


def test_mean_ablation(images, tmp_path):
    """Units are set to their mean over select images and positions, and chosen by the first-order estimate of that."""
    job = chain(tmp_path, images, to="mean", controls=0, classes=0)
    target, layers = HookedTarget(job.model), {layer.name: layer for layer in job.model.layers}
    values = {name: [] for name in layers}
    for image in np.flatnonzero(images.split == "select"):
        target.run([np.array([image])], lambda x, out: values[x.name].append(x.maps(out)[0].mean(1)), lambda _: None)
    means = {name: torch.stack(found).mean(0) for name, found in values.items()}
    rows = job.pairs.read_all("pairs").to_pylist()
    assert len(rows) == 6
    classes = Classes(job.screen, images)
    for row in rows:
        mean = means[row["layer"]][row["unit"]].item()
        assert row["value"] == pytest.approx(mean, rel=1e-4, abs=1e-6)
        chosen = [i for i in classes.of("select") if classes.own[i] == row["class_index"]]
        layer, expected = layers[row["layer"]], []
        start = list(layers).index(layer.name) * 16
        for image in chosen:
            ((_, x),) = target.inputs([np.array([image])])
            found = first_order(target.model, list(layers.values()), x, None, "all")
            unit = start + row["unit"]
            expected.append(float(found.effect_BU[0, unit] - mean * found.gradient_BU[0, unit]))
        assert row["screen"] == pytest.approx(np.mean(expected), rel=1e-3, abs=1e-6)


def test_prefix_tokens_of_a_vit(images, tmp_path):
    """Only CLS is touched: the slow loop again, on a net of tokens."""
    job = chain(tmp_path, images, VIT, ["mlp"], positions="prefix", pairs=3, controls=1, classes=0)
    layers = {layer.name: layer for layer in job.model.layers}
    classes = Classes(job.screen, images)
    table = job.out.read_all("ablation").to_pylist()
    assert table
    for row in table[:3]:
        own = row["class_index"]
        validate = sorted(classes.of("validate"), key=lambda i: images.order[i])
        members = [i for i in validate if classes.own[i] == own][:10]
        change = [Change(layers[row["layer"]], [row["unit"]], [0.0])]
        drop = [one_by_one(job, i)[own] - one_by_one(job, i, change)[own] for i in members]
        assert row["logit_drop"] == pytest.approx(np.mean(drop), abs=1e-5)


def test_other_shards_same_numbers(images, tmp_path):
    """Also where a shard has no select images."""
    first = chain(tmp_path / "first", images)
    second = chain(tmp_path / "second", probed(tmp_path / "other", shard_size=8))
    assert 0 in [second.screen.read("screen_counts", part).num_rows for part in second.screen.done()]
    for name, folder in (("pairs", "pairs"), ("ablation", "out"), ("cumulative", "out")):
        one, two = (getattr(job, folder).read_all(name).to_pylist() for job in (first, second))
        for row, other in zip(one, two, strict=True):
            assert row == {key: pytest.approx(value, abs=1e-5) for key, value in other.items()}


def test_nothing_to_test_is_an_empty_part(images, tmp_path):
    """Labels of which no class has enough images."""
    job = chain(tmp_path, images, index_of={"purple": 1})
    assert job.pairs.read_all("pairs").num_rows == 0
    assert job.out.read_all("ablation").num_rows == job.out.read_all("cumulative").num_rows == 0


def test_choosing():
    assert largest(np.array([1.0, 3.0, -1.0, 3.0, 0.0, 2.0]), 3).tolist() == [1, 3, 5]
    assert largest(np.array([1.0, 1.0, 1.0]), 2).tolist() == [0, 1]
    assert largest(np.zeros(4), 2).tolist() == []
    assert best_known(np.array([4, 5, 3, 9]), np.array([5, 5, 3, 9]), np.array([9, 9, 9, 9])) == [3, 1, 0]


def test_intervals_and_controls():
    found = mean_interval(np.array([[1.0, 3.0], [2.0, 2.0]]))
    np.testing.assert_allclose(found[:, 1], 2)
    np.testing.assert_allclose(found[:, 0], [2, *stats.t.interval(0.95, 1, 2, 1)])
    assert np.isnan(mean_interval(np.ones((2, 1)))[1:]).all()
    assert np.isnan(mean_interval(np.ones((2, 0)))).all()
    rows = [{"logit_drop": drop, "accuracy_drop": 0.5} for drop in (0.0, 1.0, 2.0, 3.0)]
    assert beside(rows[2], rows)["control_share"] == (2 + 0.5) / 4
    assert beside(rows[2], [])["control_share"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": -1}, "ablation.pairs=-1: must be at least 0"),
        ({"images": 0}, "ablation.images=0: must be at least 1"),
        ({"to": "one"}, "ablation.to=one: allowed are zero, mean"),
        ({"positions": "cls"}, "ablation.positions=cls: allowed are all, patches, prefix"),
    ],
)
def test_settings_name_their_key(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        AblationSettings(**settings)


# --- the whole sweep


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A sweep whose class folders are classes of the model, and words among which are their names."""
    folder = tmp_path_factory.mktemp("sweep")
    arguments = samples.sweep_arguments(folder)
    samples.draw_folder(folder / "photos", 120)
    (folder / "classes.txt").write_text("red\ngreen\nblue\n")
    splits = ["probing.explain=0.2", "probing.select=0.4", "probing.validate=0.4", "ablation.controls=2"]
    return [*arguments, *splits, f"target.class_names={folder}/classes.txt", "ablation.pairs=4"]


@pytest.fixture(scope="module")
def reference(arguments, tmp_path_factory):
    """Root of a store with a finished sweep, made in this process."""
    root = tmp_path_factory.mktemp("reference")
    Sweep(compose([*arguments, f"store.root={root}", "cluster=none"])).run()
    return root


def test_sweep_with_causes(arguments, reference, capsys):
    sweep = Sweep(compose([*arguments, f"store.root={reference}", "cluster=none"]))
    sweep.run()
    assert not sweep.worked
    printed = capsys.readouterr().out
    assert "Spearman of screen and logit drop, pairs and controls: " in printed
    assert "accuracy of red by units off (random ones): 0: " in printed
    names = {(n["layer"], n["unit"]): n["phrase"] for n in sweep.folder("neurons").read_all("neurons").to_pylist()}
    causes = sweep.folder("causes").read_all("causes").to_pylist()
    assert causes
    texts = dict(
        zip(
            sweep.folder("vocabulary").read_all("concepts")["concept"].to_pylist(),
            matrix(sweep.folder("vocabulary").read_all("concept_embeddings")["embedding"]).astype(np.float64),
            strict=True,
        )
    )
    for row in causes:
        assert row["layer"] == "relu", "a logit's own layer is left out"
        assert row["class"] == ["red", "green", "blue"][row["class_index"]]
        assert row["phrase"] == names[row["layer"], row["unit"]]
        assert row["logit_drop"] == pytest.approx(row["screen"], rel=1), "the net is linear; other images"
        if row["phrase"]:
            assert row["cosine"] == pytest.approx(texts[row["phrase"]] @ texts[row["class"]], abs=1e-6)
            chance = np.mean([texts[row["phrase"]] @ texts[name] for name in ("red", "green", "blue")])
            assert row["cosine_chance"] == pytest.approx(chance, abs=1e-6)


def test_workers_change_no_byte(arguments, reference, tmp_path):
    """In this process, and on Ray with two workers, which take over where all other stages are done."""
    stages = ("screen", "pairs", "ablation", "causes")
    shutil.copytree(reference, tmp_path / "ray", ignore=lambda folder, _: stages if Path(folder) == reference else ())
    Sweep(compose([*arguments, f"store.root={tmp_path}/ray", "cluster=local", "cluster.num_cpus=2"])).run()
    one, two = samples.stored_tables(reference), samples.stored_tables(tmp_path / "ray")
    assert {name.partition("/")[0] for name in one} > set(stages)
    assert {name: data for name, data in one.items() if two.get(name) != data} == {}


def test_names_may_change_without_repeating_an_ablation(arguments, reference, tmp_path):
    """Another scorer makes other names: only what joins them is new."""
    shutil.copytree(reference, tmp_path / "two")
    given = [f"store.root={tmp_path}/two", "cluster=none", "scorer=mean_cosine", "run=two"]
    Sweep(compose([*arguments, *given])).run()
    one, two = (load_run(StoreSettings(str(tmp_path / "two")), name).stages for name in ("drawn", "two"))
    assert [one[stage] == two[stage] for stage in ("screen", "pairs", "ablation", "causes")] == [True] * 3 + [False]


def test_targets_that_cannot_be_tested(arguments):
    """One line that names the key."""
    cut = [a for a in arguments if not a.startswith("target.name")]
    with pytest.raises(ValueError, match=r"^ablation\.pairs=4: target\.name=.*:overflowing has no output of one logit"):
        Sweep(compose([*cut, f"target.name={Path(__file__).parent}/models.py:overflowing", "layers.names=[conv]"]))
    with pytest.raises(ValueError, match=r"^ablation\.positions=prefix: no chosen layer has prefix tokens"):
        Sweep(compose([*arguments, "ablation.positions=prefix"]))


def test_planted_units_are_causes(tmp_path, capsys):
    """In the drawn world the best units of a class are those planted for it: without one of them its images are no
    longer recognised, and no random unit of the layer costs the class as much."""
    split = ["probing.explain=0.2", "probing.select=0.4", "probing.validate=0.4", "probing.shard_size=160"]
    ablation = ["ablation.pairs=6", "ablation.controls=100", "ablation.classes=1", "drawn.num=1"]
    given = ["experiment=world", "probing.uri=world://test/320", *split, *ablation, "cluster=none"]
    sweep = Sweep(compose([*given, f"store.root={tmp_path}"]))
    sweep.run()
    causes = sweep.folder("causes").read_all("causes").to_pylist()
    assert len(causes) == 6
    truth = pq.read_table(f"{sweep.config.world}/planted.parquet", filters=[("net", "==", "resnet")]).to_pylist()
    planted_for = {(row["layer"], row["unit"]): row["concepts"] for row in truth}
    assert [planted_for.get((row["layer"], row["unit"])) for row in causes] == [[row["class"]] for row in causes]
    for row in causes:
        assert row["control_share"] >= 0.99
        assert row["accuracy_drop"] == 1
        assert abs(row["other_logit_drop"]) < 0.1 * row["logit_drop"]
    agreement = {row["what"]: row["value"] for row in sweep.folder("causes").read_all("agreement").to_pylist()}
    assert agreement["Spearman of screen and logit drop, pairs and controls"] > 0.7
    assert agreement["share of pairs above 99% of their controls"] == 1
    neurons = sweep.folder("neurons").read_all("neurons").to_pylist()
    assert {n["layer"] for n in neurons if n["negative"] is not None} == {"fc"}, "all others are rectified"
    (single,) = (n for n in neurons if n["layer"] == "fc" and n["phrase"] == "single object")
    assert single["negative"] in ("three objects", "four objects")
    assert single["negative_confidence"] > 0.8
    together = sweep.folder("ablation").read_all("cumulative").to_pylist()
    assert {row["accuracy"] for row in together if row["units"]} == {0}
    assert min(row["control_accuracy"] for row in together) > 0.5
