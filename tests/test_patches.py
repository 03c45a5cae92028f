"""Boxes, the crop grid and the token map: against slow references and against models whose answer is known."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from tasks.crops import MAX_CROPS, CropSettings, crop_grid, iou, snap, square
from tasks.layers import LayersSettings
from tasks.patches import PatchesJob, PatchesSettings, PatchesWorker, active_boxes
from tasks.probing import ProbingSettings
from tasks.store import Folder, StoreSettings
from tasks.target import TargetSettings
from tests import samples


@settings(deadline=None, max_examples=60)
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


@settings(deadline=None, max_examples=200)
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


@settings(deadline=None, max_examples=50)
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
        assert iou(boxes[n : n + 1], grid)[0, ids[n] % MAX_CROPS] == iou(boxes[n : n + 1], grid).max()


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
    """Every unit has its exemplars as patches; the red unit's boxes lie on red; crops are distinct and known."""
    folder = samples.draw_folder(tmp_path / "photos", 40)
    images = samples.probe(tmp_path, ProbingSettings(str(folder), shard_size=16, batch_size=8, max_skipped=1))
    target = TargetSettings(
        "factory", "tests/models.py:planted", preprocess={"size": [64, 96], "resize_to": [64, 96], "resize": "squash"}
    )
    job, merged = samples.collect(tmp_path, images, target, LayersSettings(["relu", "logits"]))
    found = patches(tmp_path, job, merged, PatchesSettings(k=4, crops=CropSettings([0.5])))
    assert len(found) == (6 + 3) * 4
    assert len({(r["layer"], r["unit"], r["rank"]) for r in found}) == len(found)
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
