"""Names tested on drawn scenes: the AUC, scenes to order, and planted units whose answer is known."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flows.config import compose
from flows.show import show
from flows.sweep import Sweep
from tasks.drawn import DrawnJob, DrawnSettings, DrawnWorker, draw_tests, exceeds, named_phrases
from tasks.forward import HookedTarget, TargetPass, describe
from tasks.images import ImageList
from tasks.layers import Layer, LayersSettings
from tasks.store import Folder, StoreSettings
from tasks.tables import SCHEMAS, make_table
from tasks.target import TargetSettings
from tasks.world.orders import OWN, pool, showing, wish_for
from tasks.world.truth import NO, PHRASES, phrases_seen
from tests import samples

NUM = 24
TARGET = TargetSettings(
    "factory",
    f"{__file__}:detector",
    preprocess={"size": [64, 64], "resize_to": [64, 64], "mean": [0, 0, 0], "std": [1, 1, 1]},
)


def detector() -> nn.Module:
    """Units 0 red, 1 the same without red, 2 one value always, 3 noise; the head hands their largest values on."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 4, 4)
    weight = torch.cat([torch.tensor([[1, -1.5, 0], [-1, 1.5, 0], [0, 0, 0]]), torch.randn(1, 3)])
    conv.weight.data = weight[:, :, None, None].expand(4, 3, 4, 4).clone() / 16
    conv.bias.data = torch.tensor([0.0, 0.0, 3.0, 0.0])
    head = nn.Linear(4, 4, bias=False)
    head.weight.data = torch.eye(4)
    parts = {"conv": conv, "relu": nn.ReLU(), "pool": nn.AdaptiveMaxPool2d(1), "flat": nn.Flatten(), "head": head}
    return nn.Sequential(OrderedDict(parts))


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4))
def test_auc_is_the_share_of_pairs(seed, shown, absent, values):
    """Few different values, so that most pairs are ties."""
    rng = np.random.default_rng(seed)
    first, second = (rng.integers(0, values, (n, 3)).astype(np.float32) for n in (shown, absent))
    pairs = (first[:, None] > second[None]) + 0.5 * (first[:, None] == second[None])
    np.testing.assert_allclose(exceeds(first, second), pairs.mean((0, 1)))


def test_auc_of_nothing_and_of_nan_is_nan():
    some = np.ones((3, 2), np.float32)
    assert np.isnan(exceeds(some, some[:0])).all()
    assert np.isnan(exceeds(some[:0], some)).all()
    np.testing.assert_array_equal(exceeds(some, np.array([[1, np.nan]], np.float32)), [0.5, np.nan])
    assert exceeds(some[:, :0], some[:, :0]).shape == (0,)


def test_every_phrase_of_the_world_can_be_drawn():
    """Showing it within TRIES draws a scene, and often enough not shown among the random scenes."""
    assert [phrase for phrase in PHRASES if len(showing(phrase, 20)) < 20] == []
    seen = phrases_seen(pool(20), list(PHRASES))
    assert [p for p, count in zip(PHRASES, (seen == NO).sum(0), strict=True) if count < 20] == []


def test_wishes():
    wish = wish_for("red circle")
    assert (wish.colour, wish.kind, wish.pattern) == ("red", "circle", None)
    assert wish_for("cup with zigzag").pattern == "zigzag"
    assert wish_for("nothing red").without == {"red"}
    assert wish_for("object at the bottom left").corner == (0, 1)
    assert OWN["scarlet"] == "red"
    assert set(OWN.values()) == set(PHRASES)
    with pytest.raises(KeyError):
        wish_for("dachshund")


def test_scenes_with_and_without():
    """Those without a phrase come from the shared pool, in its order, and are judged not to show it."""
    phrases = ["nothing red", "red circle", "scarlet"]
    scenes, shown, absent = draw_tests(phrases, 10)
    random = pool(10)
    seen = phrases_seen(random, [OWN[p] for p in phrases])
    for i, phrase in enumerate(phrases):
        np.testing.assert_array_equal(scenes[shown[phrase]], showing(OWN[phrase], 10))
        np.testing.assert_array_equal(scenes[absent[phrase]], random.pixels[seen[:, i] == NO][:10])
    assert len(scenes) < 60, "pool scenes that no phrase needs are not run"
    assert not (scenes[shown["scarlet"]] != scenes[shown["scarlet"]][:1]).all()


NAMES: dict[tuple[str, int], str | None] = {
    ("relu", 0): "red",
    ("relu", 1): "scarlet",
    ("relu", 2): "red",
    ("relu", 3): "dachshund",
    ("head", 0): "nothing red",
    ("head", 1): None,
    ("head", 2): "red circle",
    ("head", 3): "night sky",
}


def job(root: Path, names: dict, pool: str = "max") -> DrawnJob:
    """A job over a neurons table that says only the names, in parts of four units."""
    store = StoreSettings(str(root))
    neurons, out = Folder(store, "neurons", "x", ("neurons",)), Folder(store, "drawn", "x", ("drawn",))
    for part, start in enumerate(range(0, len(names), 4)):
        rows = list(names.items())[start : start + 4]
        columns = {c: [None] * len(rows) for c in SCHEMAS["neurons"].names}
        columns |= {"layer": [k[0] for k, _ in rows], "unit": [k[1] for k, _ in rows], "phrase": [p for _, p in rows]}
        neurons.write(part, {"neurons": make_table("neurons", columns)})
    images = ImageList(Folder(store, "probing", "x", ("images",)), 32, 16, 100, {})  # only its batch size is used
    layers = describe(TARGET, LayersSettings(["relu", "logits"])).layers
    return DrawnJob(out, TargetPass(images, TARGET, layers, "float32", 1), neurons, pool, DrawnSettings(NUM))


def rows(drawn: Folder) -> dict[tuple[str, int], dict]:
    return {(row["layer"], row["unit"]): row for row in drawn.read_all("drawn").to_pylist()}


def test_planted_units(tmp_path):
    work = job(tmp_path, NAMES)
    report = DrawnWorker(work).run(0)
    found = rows(work.out)
    assert report.skipped == {"phrases_not_of_the_world": 1}
    assert set(found) == {key for key, phrase in NAMES.items() if phrase}
    unknown = found.pop(("relu", 3))
    assert unknown == {"layer": "relu", "unit": 3, "phrase": "dachshund", "auc": None, "shown": 0, "absent": 0}
    assert all((row["shown"], row["absent"]) == (NUM, NUM) for row in found.values())
    assert found["relu", 0]["auc"] > 0.95
    assert found["relu", 1]["phrase"] == "scarlet"
    assert found["relu", 1]["auc"] < 0.6
    assert found["relu", 2]["auc"] == found["head", 2]["auc"] == 0.5, "one value always tells nothing apart"
    assert found["head", 0]["auc"] < 0.05


def test_activations_are_pooled_as_in_the_sweep(tmp_path):
    """Against the model run scene by scene through its own preprocessing; mean pooling, and a layer of vectors."""
    work = job(tmp_path, NAMES, pool="mean")
    worker = DrawnWorker(work)
    worker.run(0)
    target, values = HookedTarget(work.model), {"relu": [], "head": []}

    def see(layer: Layer, output) -> None:
        values[layer.name].append((output.mean((2, 3)) if layer.name == "relu" else output)[0].numpy())

    scenes, shown, absent = draw_tests(["red", "nothing red"], NUM)
    for scene in scenes:
        target.run_arrays(scene[None], see)
    for layer, unit, phrase in (("relu", 0, "red"), ("head", 0, "nothing red")):
        v = np.array(values[layer])[:, [unit]]
        expected = float(exceeds(v[shown[phrase]], v[absent[phrase]])[0])
        assert rows(work.out)[layer, unit]["auc"] == pytest.approx(expected)


def test_grouping_and_order_of_the_parts_change_nothing(tmp_path, monkeypatch):
    whole, cut = job(tmp_path / "whole", NAMES), job(tmp_path / "cut", NAMES)
    DrawnWorker(whole).run(0)
    monkeypatch.setattr("tasks.drawn.PHRASES_PER_PART", 2)
    count = len(named_phrases(cut.neurons))
    for part in reversed(range(-(-count // 2))):
        DrawnWorker(cut).run(part)
    assert rows(cut.out) == rows(whole.out)


def test_nothing_named_is_an_empty_part(tmp_path):
    work = job(tmp_path, {("relu", 0): None})
    DrawnWorker(work).run(0)
    assert work.out.read_all("drawn").num_rows == 0


def test_settings_name_their_key():
    with pytest.raises(ValueError, match=r"^drawn\.num=0: must be at least 1"):
        DrawnSettings(0)


def test_sweep_over_the_drawn_world(tmp_path):
    """The stage runs where all images are drawn ones, and its numbers are on the pages and in the terminal."""
    arguments = [a for a in samples.sweep_arguments(tmp_path) if not a.startswith("probing.uri=")]
    arguments += ["probing.uri=world://test/64", f"store.root={tmp_path}/store", "cluster=none", f"drawn.num={NUM}"]
    sweep = Sweep(compose(arguments))
    sweep.run()
    found = {key: row for key, row in rows(sweep.folder("drawn")).items() if row["auc"] is not None}
    assert found
    pages = "".join(path.read_text() for path in (tmp_path / "store" / "report").rglob("*.html"))
    assert pages.count("redrawn AUC <b>") == len(found)
    assert "<dt>median redrawn AUC</dt>" in pages
    (layer, unit), row = next(iter(found.items()))
    assert f"redrawn AUC {row['auc']:.2f} on {NUM} drawn scenes" in show(sweep.manifest, layer, unit)
