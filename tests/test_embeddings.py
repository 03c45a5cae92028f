"""Crops and their vectors: against one crop at a time, for every cut into shards, and cut by torch as by Pillow."""

import numpy as np
import pytest
import torch

from tasks.clip import ClipSettings
from tasks.crops import MAX_CROPS, CropSettings
from tasks.embeddings import EmbeddingsJob, EmbeddingsWorker
from tasks.images import ImageReader
from tasks.patches import PatchesJob, PatchesSettings, PatchesWorker
from tasks.store import Folder, StoreSettings
from tasks.tables import matrix
from tests import samples
from tests.test_activations import CNN

BATCH = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The patches of a small CNN over 45 drawn images, by shard size, and the settings of a small CLIP."""
    root, found = tmp_path_factory.mktemp("embeddings"), {}
    for size, (job, merged) in samples.collect_by_shard(root, CNN, ["conv", "logits"]).items():
        images = job.model.images
        out = Folder(StoreSettings(str(root / str(size))), "patches", "x", ("patches", "crops"))
        crops = PatchesSettings(k=3, crops=CropSettings([0.5, 0.25]))
        worker = PatchesWorker(PatchesJob(out, job.model, merged.out, job.blocks, crops))
        for part in range(images.num_shards):
            worker.run(part)
        found[size] = images, out
    return found, ClipSettings(str(samples.tiny_clip(root / "clip")), None)


def embedded(made, size, on_device=False):
    (images, patches), settings = made[0][size], made[1]
    out = Folder(patches.settings, f"embeddings{on_device}", "x", ("embeddings",))
    worker = EmbeddingsWorker(EmbeddingsJob(out, images, patches, settings, 1))
    worker.on_device = on_device
    reports = [worker.run(part) for part in range(images.num_shards)]
    return worker, out, reports


def test_every_crop_has_its_own_vector(made):
    """That of the crop cut and encoded alone, for each crop but whole images; the rest of the patches is reported."""
    worker, out, reports = embedded(made, 24)
    images, patches = made[0][24]
    crops = [row for row in patches.read_all("crops").to_pylist() if row["crop_id"] % MAX_CROPS]
    found = out.read_all("embeddings")
    assert found["crop_id"].to_pylist() == [row["crop_id"] for row in crops]
    for part in range(images.num_shards):
        own = out.read("embeddings", part)["crop_id"].to_numpy() // MAX_CROPS
        assert set(own) <= set(images.shard(part))
    reader = ImageReader({})
    for row, vector in zip(crops, matrix(found["embedding"]), strict=True):
        photo = images.open(row["image"], reader).crop([int(row[c]) for c in ("x0", "y0", "x1", "y1")])
        batch = np.zeros((BATCH, *worker.clip.preprocess.size, 3), np.uint8)
        batch[0] = worker.clip.preprocess.pixels(photo)
        np.testing.assert_allclose(vector, worker.clip.images(torch.from_numpy(batch))[0], atol=1e-3)
    encoded = sum(report.rows["embeddings"] for report in reports)
    saved = sum(report.skipped["repeated crops"] for report in reports)
    assert encoded == len(crops) > 3 * BATCH
    assert encoded + saved == patches.read_all("patches").num_rows


def test_shards_leave_no_trace(made):
    tables = [embedded(made, size)[1].read_all("embeddings") for size in made[0]]
    assert tables[0].num_rows > 3 * BATCH
    for table in tables[1:]:
        assert table["crop_id"].equals(tables[0]["crop_id"])
        assert np.array_equal(matrix(table["embedding"]), matrix(tables[0]["embedding"]))


def test_full_batches(made):
    """As many calls as all crops of the run fill, and one more where a shard shares a batch with the one before."""
    (images, patches), settings = made[0][8], made[1]
    out = Folder(patches.settings, "counted", "x", ("embeddings",))
    worker, calls = EmbeddingsWorker(EmbeddingsJob(out, images, patches, settings, 1)), []
    worker.clip.model.visual.register_forward_hook(lambda *_: calls.append(1))
    rows = sum(worker.run(part).rows["embeddings"] for part in range(images.num_shards))
    assert -(-rows // BATCH) <= len(calls) <= -(-rows // BATCH) + images.num_shards - 1


def test_cut_on_the_device_is_the_same_to_the_byte(made):
    """What a GPU does, here on the CPU's tensors."""
    tables = [embedded(made, 24, on_device)[1].read_all("embeddings") for on_device in (False, True)]
    assert tables[0].equals(tables[1])
