"""axonym bench: the arithmetic on known durations, and a small one end to end where nothing but torch is installed."""

import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from flows.bench import line, parsed
from tasks.bench_figures import figure, in_turn
from tasks.tables import SCHEMAS

ROOT = Path(__file__).parents[1]
NOT_HERE = ("ray", "hydra", "omegaconf", "open_clip", "vllm", "transformers", "s3fs", "jinja2")


def test_runs_take_turns_after_one_that_does_not_count():
    warm, told, seconds = iter([1, 2]), [], {"bare": iter([100, 1, 2, 3]), "ours": iter([100, 2, 8, 4])}

    def run(name):
        told.append(name)
        return {name: float(next(seconds[name]))}

    found = in_turn([lambda: run("bare"), lambda: run("ours")], 3)
    assert told == ["bare", "ours", "bare", "ours", "ours", "bare", "bare", "ours"]
    assert {name: values.tolist() for name, values in found.items()} == {"bare": [1, 2, 3], "ours": [2, 8, 4]}
    ratio = figure("cpu", "collection", found["bare"], found["ours"], "m", "w")
    assert (ratio.value, ratio.low, ratio.high) == (0.5, 0.25, 0.75)  # of 1/2, 2/8, 3/4: pair by pair
    assert (ratio.base, ratio.ours, ratio.pairs) == (2, 4, 3)
    assert list(in_turn([lambda: {"a": next(warm)}], 2, warm=1)["a"]) == [1, 2]


@pytest.mark.parametrize(
    ("name", "over", "scale", "met"),
    [
        ("collection", 0.95, 1, True),
        ("collection", 0.94, 1, False),
        ("workers", 0.9, 2, True),
        ("workers", 0.89, 2, False),
        ("memory", 1.05, 1, True),
        ("memory", 1.06, 1, False),
        ("collection, files", 0.1, 1, None),  # a target for GPUs alone
        ("sweep, probing", 0.1, 1, None),
    ],
)
def test_targets(name, over, scale, met):
    found = figure("cpu", name, np.array([over]), np.array([1.0]), "m", "w", scale)
    assert found.met is met
    assert found.value == pytest.approx(over * scale)
    assert ("missed" in line(found)) == (met is False)


def test_sizes_follow_the_device_unless_given():
    settings = parsed(["what=memory,sweep", "batch=8", "out=x.parquet"])
    assert (settings.what, settings.out) == (["memory", "sweep"], "x.parquet")
    assert (settings.on("cpu").batch, settings.on("cuda").batch) == (8, 8)
    assert settings.on("cuda").images > settings.on("cpu").images > 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("what=speed", "what=speed: allowed are collection, embedding"),
        ("images=many", "images=many: expected a int"),
        ("pairs=0", "pairs=0: must be at least 1"),
        ("colour=red", "colour=red: expected key=value; allowed keys are what, device"),
        ("dtype=int8", "dtype=int8: allowed are auto, float32"),
    ],
)
def test_wrong_arguments(argument, message):
    with pytest.raises(ValueError, match=message):
        parsed([argument])


def test_everything_is_measured_where_only_torch_is_installed(tmp_path):
    for name in NOT_HERE:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    script = "import sys; sys.modules['scipy'] = None; from flows.bench import main; sys.exit(main(sys.argv[1:]))"
    sizes = ["images=8", "small_images=8", "batch=4", "side=64", "pairs=1", "device=cpu", f"out={tmp_path}/b.parquet"]
    models = [f"{key}=test_vit" for key in ("model", "small", "clip", "small_clip")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *sizes, *models]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = pq.read_table(tmp_path / "b.parquet")
    assert table.schema.equals(SCHEMAS["bench"])
    rows = {row["name"]: row for row in table.to_pylist()}
    assert [name for name in rows if not name.startswith(("sweep, ", "curve, "))] == [
        "collection", "collection, files", "collection, tables", "bytes", "embedding", "memory", "time, images",
        "time, units", "workers", "workers, bare", "sweep",
    ]  # fmt: skip
    for name, row in rows.items():
        scale = row["size"] if name.endswith(" workers") else 2 if name in ("workers", "workers, bare") else 1
        assert row["value"] == pytest.approx(scale * row["base"] / row["ours"])
        assert 0 < row["low"] <= row["value"] <= row["high"]
        assert name in done.stdout
    shares = {name.removeprefix("sweep, "): row["value"] for name, row in rows.items() if name.startswith("sweep, ")}
    assert rows["sweep"]["value"] == pytest.approx(shares.pop("target") + shares.pop("clip"))  # and no language model
    assert list(shares) == [
        "probing", "image_embeddings", "activations", "exemplars", "patches", "embeddings", "scores", "explanations",
    ]  # fmt: skip
    assert sum(shares.values()) == pytest.approx(1)
    for left_out in ("validation: no scipy", "neurons: no scipy", "answers: no vLLM"):
        assert f"; without {left_out}" in rows["sweep"]["what"]
    assert rows["bytes"]["base"] > 0
    curves = {name: row["size"] for name, row in rows.items() if row["size"] is not None}
    assert list(curves)[:3] == ["curve, 8 images", "curve, 16 images", "curve, 32 images"]
    assert {name.split()[-1] for name in curves} == {"images", "units", "concepts", "workers"}
    assert all(rows[name]["value"] == 1 for name in ("curve, 8 images", "curve, 1,024 concepts", "curve, 1 workers"))
    points = xml.fromstring((tmp_path / "b.svg").read_text()).iter("{http://www.w3.org/2000/svg}circle")
    assert len(list(points)) == len(curves)
    assert "torch 2" in rows["sweep"]["versions"]
