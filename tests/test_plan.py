"""The plan of a sweep against the sweep itself, its counts against counts by hand; nothing is loaded for it."""

import math
import socket
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flows import plan
from flows.config import CONF, compose
from flows.sweep import Sweep
from tasks.clip import load_clip_model
from tasks.forward import describe
from tasks.layers import LayersSettings
from tasks.plan import Rates, distinct
from tasks.plan_models import sketch_clip, sketch_target
from tasks.plan_stages import Planner
from tasks.store import Folder
from tasks.target import TargetSettings

SMALL = """
from torch import nn

def load():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(8 * 56 * 56, 10)
    )
"""


def test_operations_of_a_small_net_by_hand(tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    found = sketch_target(TargetSettings("factory", f"{tmp_path}/small.py:load"), LayersSettings(["1", "logits"]))
    conv, linear = 2 * 8 * 224 * 224 * 3 * 3 * 3, 2 * 8 * 56 * 56 * 10
    assert found.cost.flops == conv + linear
    bias = 8 * 224 * 224  # of the convolution, the ReLU and the pooling, each number once
    assert found.cost.values == pytest.approx(2 * bias + 8 * 56 * 56 * 2 + 10, rel=0.01)
    assert found.cost.parameters == 8 * 27 + 8 + 8 * 56 * 56 * 10 + 10
    assert [(x.name, x.num_units, x.grid) for x in found.layers] == [("1", 8, (224, 224)), ("4", 10, (1, 1))]
    assert found.lowest == ["never", "free"]


@pytest.mark.parametrize(
    ("source", "name", "tokens", "width", "depth", "patches"),
    [("timm", "vit_tiny_patch16_224", 197, 192, 12, 196), ("torchvision", "vit_b_16", 197, 768, 12, 196)],
)
def test_operations_of_a_vit_by_hand(source, name, tokens, width, depth, patches):
    """Also where attention would run as one fused kernel, which no counter sees into."""
    linear = 2 * tokens * width * (3 * width + width + 2 * 4 * width)
    attention = 2 * 2 * tokens * tokens * width
    ends = 2 * patches * 3 * 16 * 16 * width + 2 * width * 1000
    found = sketch_target(TargetSettings(source, name), LayersSettings(["mlp"]))
    assert found.cost.flops == depth * (linear + attention) + ends
    assert (len(found.layers), set(found.lowest)) == (depth, {"bounded"})


@pytest.mark.parametrize("name", ["world_resnet", "world_vit_registers"])
def test_layers_are_those_of_the_model_with_its_weights(name):
    config = compose([f"target={name}", "layers.names=[residual,mlp,conv,logits]"])
    if name == "world_resnet":
        config = compose([f"target={name}", "layers.names=[residual,conv,logits]"])
    real, found = describe(config.target, config.layers), sketch_target(config.target, config.layers)
    assert found.layers == real.layers
    assert (found.class_names, found.num_classes) == (real.class_names, real.num_classes)
    kinds = {layer.name: kind for layer, kind in zip(found.layers, found.lowest, strict=True)}
    expected = {"world_resnet": ("layer1.0", "never"), "world_vit_registers": ("blocks.0.mlp.act", "bounded")}[name]
    assert kinds[expected[0]] == expected[1]
    assert kinds[found.layers[-1].name] == "free"


def test_a_clip_folder_is_sketched_as_it_is(tmp_path):
    settings = compose([]).clip
    found = sketch_clip(settings)
    with torch.inference_mode():
        real = load_clip_model(settings)
        vectors = real.model.encode_image(torch.zeros(1, 3, *real.preprocess.size))
    assert found.width == vectors.shape[1]
    assert found.image.parameters == sum(p.numel() for p in real.model.visual.parameters())


def test_nothing_is_loaded_downloaded_or_written(tmp_path, monkeypatch, capsys):
    """ViT-L over ImageNet with weights that are not there, on a machine without network or data."""

    def refuse(*_):
        raise AssertionError("the plan asked for a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    arguments = ["experiment=vitl_imagenet", "target.checkpoint=nowhere.safetensors", "images=50000", "gpu_hour=2.5"]
    assert plan.main([*arguments, f"store.root={tmp_path}/store", f"out={tmp_path}/plan.parquet"]) == 0
    said = capsys.readouterr().out
    assert "50,000 images, 98,304 units of 24 layers" in said
    assert "money: " in said
    assert [p.name for p in tmp_path.iterdir()] == ["plan.parquet"]
    rows = {row["stage"]: row for row in pq.read_table(tmp_path / "plan.parquet").to_pylist()}
    assert rows["activations"]["passes"] == 50_048  # whole batches of 128
    assert rows["activations"]["gpu"]
    assert dict(zip(rows["patches"]["tables"], rows["patches"]["table_rows"], strict=True))["patches"] == 98_304 * 20
    assert dict(zip(rows["neurons"]["tables"], rows["neurons"]["table_rows"], strict=True)) == {"neurons": 98_304}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("images=-1", "images=-1: must be at least 0"),
        ("images=many", "images=many: expected a int"),
        ("measure=yes", "measure=yes: allowed are true, false"),
        ("cpu_gflops=0", "cpu_gflops=0: must be above 0"),
        ("cpu_gflops=inf", "cpu_gflops=inf: must be above 0, and finite"),
        ("gpu_hour=nan", "gpu_hour=nan: must be at least 0, and finite"),
        ("world=nowhere", "world=nowhere: no such folder"),
        ("vocabulary.against=nowhere.txt", "vocabulary.against=nowhere.txt: "),
        ("out=nowhere/plan.parquet", "out=nowhere/plan.parquet: cannot be written"),
        ("out=.", "out=.: cannot be written"),
        (
            "probing.uri=nowhere",
            "probing.uri=nowhere: no images of format folder: nothing there; a plan without",
        ),
        ("targt=resnet50", "targt: unknown key (did you mean target?)"),
    ],
)
def test_mistakes_are_one_clear_line(argument, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        plan.main([argument])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_what_the_ablation_refuses_is_refused():
    with pytest.raises(ValueError, match=r"^ablation\.positions=prefix: no chosen layer has prefix tokens"):
        plan.look(compose(["ablation.pairs=4", "ablation.positions=prefix"]))


@given(st.floats(1, 1e8), st.floats(1, 1e8), st.floats(0.05, 50))
def test_distinct_is_possible_and_grows(draws, cells, even):
    found = distinct(draws, cells, even)
    assert 0 < found <= min(draws, cells) * (1 + 1e-9)
    assert found <= distinct(2 * draws, cells, even)
    assert found <= distinct(draws, cells, 2 * even) * (1 + 1e-9)
    assert distinct(draws, cells, 1e12) == pytest.approx(cells * -math.expm1(-draws / cells), rel=1e-3)


@pytest.mark.parametrize("even", [0.2, 2.0])
def test_distinct_is_the_mean_of_drawing(even):
    rng, cells, draws = np.random.default_rng(0), 2000, 3000
    found = []
    for _ in range(20):
        weights = rng.gamma(even, size=cells)
        found.append(len(np.unique(rng.choice(cells, draws, p=weights / weights.sum()))))
    assert distinct(draws, cells, even) == pytest.approx(np.mean(found), rel=0.02)


CHOSEN = {"crops", "embeddings"}
"""Tables whose rows hang on which images excite the units, which no config tells."""
HEADERS = 4096
"""Bytes that a table of a few rows may be off: mostly what Parquet says about its columns."""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A small real sweep with a twin, and its plan."""
    root = tmp_path_factory.mktemp("swept")
    small = ["probing.uri=world://plan/256", "probing.shard_size=128", "activations.k=20", "drawn.num=2"]
    twin = ["neurons.twin=true", "neurons.twin_nets=3", "cluster=none"]
    arguments = ["target=world_vit", "layers.names=[blocks.1.mlp.act,blocks.5.mlp.act,logits]", *small, *twin]
    sweep = Sweep(compose([*arguments, f"store.root={root}", "run=small"]))
    sweep.run()
    facts = plan.look(sweep.config)
    return sweep, {e.stage: e for e in Planner(sweep.config, facts, Rates()).estimates()}


def stored(folder: Folder, table: str) -> tuple[int, int]:
    """Rows and bytes of a table."""
    place = Path(folder.store.path(f"{folder.name}/{table}"))
    files = list(place.glob("part-*.parquet"))
    return sum(pq.ParquetFile(f).metadata.num_rows for f in files), sum(f.stat().st_size for f in files)


def test_the_plan_and_what_happened(swept):
    """Rows and bytes of every table, within a tenth; a quarter for the twin, whose units are alike to a degree that
    only its numbers tell; half where images choose the rows."""
    sweep, planned = swept
    off = []
    for run, prefix, close in ((sweep, "", 0.1), (sweep.twin, "twin ", 0.25)):
        for key in run.manifest.stages:
            folder, estimate = run.manifest.folder(key), planned.get(prefix + key)
            if estimate is None:
                assert prefix, f"the plan knows no {key}"  # the twin shares what comes before the activations
                continue
            assert estimate.parts == run.manifest.parts[key] or key == "drawn"
            for table in folder.tables:
                rows, size = stored(folder, table)
                near = 0.5 if table in CHOSEN else close
                if abs(estimate.rows[table] - rows) > max(near * rows, 30 if key == "coverage" else 1):
                    off.append(f"{prefix}{table}: {estimate.rows[table]:.0f} rows planned, {rows} written")
                if table != "pages" and abs(estimate.bytes[table] - size) > max(near * size, HEADERS):
                    off.append(f"{prefix}{table}: {estimate.bytes[table]:.0f} bytes planned, {size} written")
    assert not off, "\n".join(off)


def test_every_experiment_can_be_planned(capsys):
    for path in (CONF / "experiment").glob("*.yaml"):
        assert plan.main([f"experiment={path.stem}", "images=1000"]) == 0
        assert f"plan of run {compose([f'experiment={path.stem}']).run}" in capsys.readouterr().out


def test_gpus_are_paid_by_their_share_and_cpus_decode_beside_them(tmp_path):
    rows = {}
    for cpus in (2, 16):
        out = tmp_path / f"{cpus}.parquet"
        sizes = ["experiment=vitl_imagenet", "images=20000", f"cpus={cpus}", "start=0", "gpu_hour=3600", f"out={out}"]
        assert plan.main(sizes) == 0
        rows[cpus] = {row["stage"]: row for row in pq.read_table(out).to_pylist()}
    few, many = rows[2], rows[16]
    assert many["activations"]["money"] == pytest.approx(many["activations"]["seconds"])
    assert many["scores"]["money"] == pytest.approx(many["scores"]["seconds"] / 4)
    assert many["scores"]["wall"] == pytest.approx(many["scores"]["seconds"] / 4)
    assert few["image_embeddings"]["seconds"] == pytest.approx(8 * many["image_embeddings"]["seconds"], rel=0.1)
    assert few["exemplars"]["wall"] == pytest.approx(8 * many["exemplars"]["wall"])
