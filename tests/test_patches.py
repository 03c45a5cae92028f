"""Boxes, the crop grid and the token map: against slow references and against models whose answer is known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from tasks.crops import MAX_CROPS, CropSettings, crop_grid, grids, iou, snap, square
from tasks.images import covering
from tasks.layers import LayersSettings
from tasks.patches import HELD, RINGS, PatchesJob, PatchesSettings, PatchesWorker, active_boxes, connected
from tasks.probing import ProbingSettings
from tasks.store import Folder, StoreSettings
from tasks.target import TargetSettings
from tests import samples
from tests.test_activations import CNN, dense


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 12))
def test_active_boxes_equal_connected_components(seed, height, width):
    """The component around the peak, 8-connected, as scipy labels it; winding ones included."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(20, height, width)).astype(np.float32) + rng.normal(size=(20, 1, 1)).astype(np.float32)
    seeds = maps.reshape(20, -1).argmax(1)
    quantiles = rng.normal(size=20).astype(np.float32)
    boxes, fractions = active_boxes(torch.from_numpy(maps), torch.from_numpy(seeds), torch.from_numpy(quantiles))
    for m in range(20):
        peak = maps[m].max()
        above = maps[m] >= min(max(quantiles[m], 0.5 * peak), peak)
        labels, _ = ndimage.label(above, np.ones((3, 3)))
        rows, columns = np.nonzero(labels == labels.reshape(-1)[seeds[m]])
        expected = [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
        np.testing.assert_allclose(boxes[m], expected, atol=1e-6)
        assert fractions[m] == pytest.approx(above.mean(), abs=1e-6)


def serpent(height, width):
    """A line that goes to and fro through the whole map, with gaps between its turns."""
    mask = np.zeros((height, width), bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    return mask


@pytest.mark.parametrize(("height", "width"), [(1, 40), (15, 9), (31, 3), (24, 24)])
def test_parts_that_need_many_rings(height, width):
    """Whole after as many rings as the line is long; a point and an empty mask beside it are whole at once."""
    point = np.zeros((height, width), bool)
    point[0, 0] = True
    masks = np.stack([serpent(height, width), point, point & False, serpent(height, width)])
    masks[3, height // 2] = False  # cut in two: only the half with the seed
    assert masks[0].sum() > 3 * RINGS
    found = connected(torch.from_numpy(masks), torch.zeros(4, dtype=torch.int64)).numpy()
    for mask, part in zip(masks, found, strict=True):
        labels, _ = ndimage.label(mask, np.ones((3, 3)))
        assert np.array_equal(part, mask & (labels == labels[0, 0]) & mask[0, 0])


@settings(max_examples=200)
@given(st.integers(1, 3000), st.integers(1, 3000), st.lists(st.floats(0.1, 1), max_size=3))
def test_grid_covers_the_image_with_at_most_64_squares(width, height, sizes):
    if max(width, height) > 32 * min(width, height):
        return
    boxes, levels = crop_grid(width, height, sorted(sizes, reverse=True))
    assert len(boxes) <= MAX_CROPS
    assert boxes[0].tolist() == [0, 0, width, height]
    assert (levels == 0).sum() == 1
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= width).all()
    assert (boxes[:, 3] <= height).all()
    sides = boxes[1:, 2:] - boxes[1:, :2]
    assert (sides[:, 0] == sides[:, 1]).all()
    for level in range(1, len(sizes) + 1):
        mine = boxes[levels == level]
        assert mine[:, 0].min() == 0 or len(np.unique(mine[:, 0])) == 1
        assert mine[:, 2].max() == width or len(np.unique(mine[:, 0])) == 1


def test_default_grid_is_half_overlapping_and_seamless():
    boxes, levels = crop_grid(224, 224, [0.5, 0.25])
    assert [int((levels == n).sum()) for n in range(3)] == [1, 9, 49]
    covered = np.zeros((224, 224), int)
    for x0, y0, x1, y1 in boxes[levels == 1]:
        covered[y0:y1, x0:x1] += 1
    assert covered.min() >= 1


@settings(max_examples=50)
@given(st.integers(0, 10_000))
def test_snap_takes_the_best_square(seed):
    rng = np.random.default_rng(seed)
    sizes_N2 = rng.integers(50, 400, (30, 2))
    low = rng.random((30, 2)) * sizes_N2 * 0.8
    boxes = np.concatenate([low, low + 1 + rng.random((30, 2)) * (sizes_N2 - low - 1)], 1)
    images = rng.integers(0, 1000, 30)
    ids = snap(boxes, images, sizes_N2, [0.5, 0.25])
    for n in range(30):
        grid, _ = crop_grid(*map(int, sizes_N2[n]), [0.5, 0.25])
        assert ids[n] // MAX_CROPS == images[n]
        shares = [slow_iou(boxes[n], square) for square in grid]
        assert ids[n] % MAX_CROPS == shares.index(max(shares))
        np.testing.assert_array_equal(iou(boxes[n : n + 1], grid)[0], shares)


def slow_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / max((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter, 1e-9)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(20, 200), st.integers(20, 200)), max_size=12),
    st.sampled_from([[0.5, 0.25], [0.5], [], [1.0, 0.1]]),
)
def test_grids_of_many_images_are_those_of_each(shapes, sizes):
    boxes, levels, shape = grids(np.array(shapes).reshape(-1, 2), sizes)
    assert len(boxes) == len(set(shapes))
    for own, (width, height) in zip(shape, shapes, strict=True):
        grid, level = crop_grid(width, height, sizes)
        assert np.array_equal(boxes[own, : len(grid)], grid)
        assert np.array_equal(levels[own, : len(grid)], level)
        assert not boxes[own, len(grid) :].any()


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 9))
def test_batches_that_hold_a_span(start, length, size):
    """Every number of the span lies in exactly one of them, and each holds one; whoever asks, the cuts are the same."""
    starts = covering(start, start + length, size)
    assert all(first % size == 0 for first in starts)
    assert {i // size * size for i in range(start, start + length)} == set(starts)


def test_square_grows_around_the_centre():
    np.testing.assert_allclose(square(np.array([[10.0, 20, 30, 30]]), 0.5), [[5, 10, 35, 40]])


def marked(folder, row, column, size=(64, 96), cell=8):
    """A grey image with one white cell at (row, column) of the patch grid."""
    pixels = np.full((*size, 3), 90, np.uint8)
    pixels[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 255
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{row:02d}_{column:02d}.png")


CELLS = [(0, 0), (7, 11), (0, 11), (7, 0), (3, 5)]


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("layer", ["proj", "block"])
def test_token_map_is_right_to_the_token(tmp_path, layer, registers):
    """Patch (0,0), the last patch and others on a grid of 8 x 12, behind CLS and registers: box = the white cell."""
    for row, column in CELLS:
        marked(tmp_path / "photos", row, column)
    Image.new("RGB", (96, 64), (90, 90, 90)).save(tmp_path / "photos" / "none.png")  # which all others are above
    target = TargetSettings(
        "factory",
        "tests/models.py:tokens",
        kwargs={"registers": registers},
        preprocess={"size": [64, 96], "resize_to": [64, 96], "mean": [0.4] * 3},
    )
    probing = ProbingSettings(str(tmp_path / "photos"), explain=1, select=0, validate=0, shard_size=4, batch_size=2)
    images = samples.probe(tmp_path, probing)
    job, merged = samples.collect(tmp_path, images, target, LayersSettings([layer]))
    found = patches(tmp_path, job, merged, PatchesSettings(k=5))
    unit_0 = [r for r in found if r["unit"] == 0]
    assert len(unit_0) == len(CELLS)
    for row in unit_0:
        r, c = map(int, row["image_id"].removesuffix(".png").split("_"))
        assert [row[k] for k in ("x0", "y0", "x1", "y1")] == [c * 8, r * 8, c * 8 + 8, r * 8 + 8]
        assert row["active_fraction"] == pytest.approx(1 / 96)


def patches(root, job, merged, settings_):
    out = Folder(StoreSettings(str(root)), "patches", "x", ("patches", "crops"))
    work = PatchesJob(out, job.model, merged.out, job.blocks, settings_)
    worker = PatchesWorker(work)
    for part in range(job.model.images.num_shards):
        worker.run(part)
    return out.read_all("patches").to_pylist()


def test_patches_of_drawn_images(tmp_path):
    """Every live unit has its exemplars as patches; the red unit's boxes lie on red; crops are distinct and known."""
    folder = samples.draw_folder(tmp_path / "photos", 40)
    images = samples.probe(tmp_path, ProbingSettings(str(folder), shard_size=16, batch_size=8, max_skipped=1))
    target = TargetSettings(
        "factory", "tests/models.py:planted", preprocess={"size": [64, 96], "resize_to": [64, 96], "resize": "squash"}
    )
    job, merged = samples.collect(tmp_path, images, target, LayersSettings(["relu", "logits"]))
    found = patches(tmp_path, job, merged, PatchesSettings(k=4, crops=CropSettings([0.5])))
    units = {(r["layer"], r["unit"]) for r in found}
    assert units == {("relu", 0), ("relu", 1), ("relu", 5), ("head", 0), ("head", 1)}
    first = [r for r in merged.out.read_all("exemplars").to_pylist() if r["rank"] < 4 and r["tail"] == "top"]
    key = ("layer", "unit", "rank", "image")
    assert sorted([r[c] for c in key] for r in found) == sorted([r[c] for c in key] for r in first)
    crops = Folder(StoreSettings(str(tmp_path)), "patches", "x", ("patches", "crops")).read_all("crops").to_pylist()
    assert {c["crop_id"] for c in crops} == {r["crop_id"] for r in found}
    assert len(crops) == len({c["crop_id"] for c in crops})
    for row in found:
        if row["layer"] == "head":
            assert row["crop_id"] == row["image"] * MAX_CROPS
        if (row["layer"], row["unit"]) == ("relu", 0):
            pixels = np.asarray(Image.open(folder / row["image_id"]).convert("RGB")).astype(int)
            inside = pixels[int(row["y0"]) : int(np.ceil(row["y1"])), int(row["x0"]) : int(np.ceil(row["x1"]))]
            assert inside[..., 0].mean() > inside[..., 1:].mean() + 40


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    """Collected activations and exemplars of a small CNN with units below zero, by shard size; the same 45 images."""
    return samples.collect_by_shard(tmp_path_factory.mktemp("cnn"), CNN, ["conv", "4", "logits"])


def worker(job, merged, **how):
    store = merged.out.settings
    out = Folder(store, "patches", "x", ("patches", "crops"))
    return PatchesWorker(PatchesJob(out, job.model, merged.out, job.blocks, PatchesSettings(**how)))


def test_boxes_equal_a_slow_reference(cnn):
    """Both tails of all layers, map by map from a pass over all images; and every exemplar of rank below k is there."""
    job, merged = cnn[24]
    worked, images = worker(job, merged, k=3, tails=["bottom", "top"]), job.model.images
    reports = [worked.run(part) for part in range(images.num_shards)]
    rows = worked.job.out.read_all("patches").to_pylist()
    key = ("layer", "unit", "tail", "rank", "image", "image_id")
    exemplars = [row for row in merged.out.read_all("exemplars").to_pylist() if row["rank"] < 3]
    assert {tuple(row[c] for c in key) for row in rows} == {tuple(row[c] for c in key) for row in exemplars}
    assert len(rows) == len(exemplars) == sum(report.rows["patches"] for report in reports)
    assert {row["tail"] for row in rows} == {"top", "bottom"}
    maps, _ = dense(job, images)
    grid = {layer.name: layer.grid for layer in job.model.layers}
    place = {(r["layer"], r["unit"], r["tail"], r["rank"]): r["position"] for r in exemplars}
    limit = {(r["layer"], r["unit"]): r["position_quantile"] for r in merged.out.read_all("unit_stats").to_pylist()}
    for row in rows:
        width, height = (int(images.column(c)[row["image"]]) for c in ("width", "height"))
        seed = place[row["layer"], row["unit"], row["tail"], row["rank"]]
        box, share = np.array([0.0, 0, 1, 1]), 1.0
        if row["layer"] != "7":
            values = maps[row["layer"]][row["image"], row["unit"]].reshape(grid[row["layer"]])
            quantile = limit[row["layer"], row["unit"]] if row["tail"] == "top" else -np.inf
            box, share = slow_box(values if row["tail"] == "top" else -values, seed, quantile)
            box = worked.target.preprocess.to_image(box[None], np.array([width]), np.array([height]))[0]
        else:
            box = np.array([0, 0, width, height])
            assert row["crop_id"] == row["image"] * MAX_CROPS
        np.testing.assert_allclose([row[c] for c in ("x0", "y0", "x1", "y1")], box, rtol=1e-5)
        assert row["active_fraction"] == pytest.approx(share, abs=1e-6)


def slow_box(values, seed, quantile):
    peak = values.reshape(-1)[seed]
    above = values >= min(max(quantile, 0.5 * peak), peak)
    labels, _ = ndimage.label(above, np.ones((3, 3)))
    rows, columns = np.nonzero(labels == labels.reshape(-1)[seed])
    height, width = values.shape
    edges = [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
    return np.array(edges), above.mean()


@pytest.mark.parametrize("held", [1, HELD])
def test_the_model_runs_on_exemplar_images_alone_in_full_batches(cnn, monkeypatch, held):
    """However the images are cut into shards the tables say the same, to the last bit, and no batch runs twice but
    those that two shards share; nor does it matter how many maps wait for their boxes."""
    monkeypatch.setattr("tasks.patches.HELD", held)
    tables = []
    for size, (job, merged) in cnn.items():
        worked, calls = worker(job, merged, k=2), []
        handle = worked.target.model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        for part in range(job.model.images.num_shards):
            worked.run(part)
        handle.remove()
        rows = worked.job.out.read_all("patches").to_pylist()
        mapped = {row["image"] for row in rows if row["layer"] != "7"}
        full = -(-len(mapped) // 8)
        assert full <= len(calls) <= full + job.model.images.num_shards - 1
        assert full < len(range(0, len(job.model.images), 8))
        tables.append(sorted(rows, key=lambda row: (row["layer"], row["unit"], row["rank"])))
        assert [row["image"] // size for row in rows] == sorted(row["image"] // size for row in rows)
    assert tables[0] == tables[1] == tables[2]
