"""Names against what the scenes of the dataset really show: by hand, scene by scene."""

import numpy as np
import pytest

from tasks.layers import Block
from tasks.metrics import POSITIVE
from tasks.probing import ProbingSettings
from tasks.store import Folder, StoreSettings
from tasks.tables import SCHEMAS, make_table
from tasks.truth import MEASURES, TruthJob, TruthWorker
from tasks.world.orders import OWN
from tasks.world.truth import UNSURE, YES, phrases_seen, stream
from tests import samples

COUNT = 240
NAMES = ["red", "nothing red", "red", "scarlet", "dachshund", None]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Unit 0 is large on scenes with red, unit 1 the same under a wrong name, the others are noise."""
    root = tmp_path_factory.mktemp("truth")
    images = samples.probe(root, ProbingSettings(f"world://truth/{COUNT}", shard_size=64, batch_size=16))
    red = phrases_seen(stream("truth", 0, COUNT), ["red"])[:, 0] == YES
    rng = np.random.default_rng(0)
    values = rng.normal(size=(len(NAMES), COUNT)).astype(np.float16).astype(np.float32)
    values[:2] = np.where(red, 4, 0) + np.round(values[:2])
    store = StoreSettings(str(root))
    activations, neurons = Folder(store, "activations", "x", ("pooled",)), Folder(store, "neurons", "x", ("neurons",))
    keys = {"layer": ["only"] * len(NAMES), "unit": range(len(NAMES))}
    for part in range(images.num_shards):
        shard = np.array(images.shard(part))
        of_shard = values[:, shard[images.stored[shard]]]
        columns = keys | {"scale": [1.0] * len(NAMES), "activation": of_shard, "negative": 0 * of_shard}
        activations.write(part, {"pooled": make_table("pooled", columns)}, {"pooled": [4, 2]})
    blocks = [Block("only", 0, 4), Block("only", 4, 6)]
    for part, block in enumerate(blocks):
        columns = {c: [None] * len(block) for c in SCHEMAS["neurons"].names}
        columns |= {"layer": ["only"] * len(block), "unit": range(block.start, block.stop)}
        columns["phrase"] = NAMES[block.start : block.stop]
        neurons.write(part, {"neurons": make_table("neurons", columns)})
    out = Folder(store, "truth", "x", ("truth",))
    worker = TruthWorker(TruthJob(out, images, activations, neurons, blocks))
    for part in range(len(blocks)):
        worker.run(part)
    return worker.job, values


def test_measures_are_those_of_a_slow_look_at_every_scene(job):
    job, values = job
    rows = job.out.read_all("truth").to_pylist()
    assert [row["phrase"] for row in rows] == NAMES[:4], "the world knows no dachshund"
    validate, explain = (np.flatnonzero(job.images.split == s) for s in ("validate", "explain"))
    for row in rows:
        seen = phrases_seen(stream("truth", 0, COUNT), [OWN[row["phrase"]]])[validate, 0]
        a, shows = values[row["unit"]][validate][seen != UNSURE], seen[seen != UNSURE] == YES
        assert (row["shown"], row["absent"]) == (shows.sum(), (~shows).sum())
        assert row["correlation"] == pytest.approx(np.corrcoef(a, shows)[0, 1], abs=1e-6)
        pairs = [(x > y) + (x == y) / 2 for x in a[shows] for y in a[~shows]]
        assert row["auc"] == pytest.approx(np.mean(pairs), abs=1e-6)
        precision = [(shows & (a >= x)).sum() / (a >= x).sum() for x in a[shows]]
        assert row["auprc"] == pytest.approx(np.mean(precision), abs=1e-6)
        ordered = np.sort(values[row["unit"]][explain])
        fires = a > ordered[int(np.ceil(POSITIVE * len(ordered))) - 1]
        both = (fires & shows).sum()
        assert row["f1"] == pytest.approx(2 * both / (fires.sum() + shows.sum()), abs=1e-6)
        assert row["iou"] == pytest.approx(both / (fires | shows).sum(), abs=1e-6)


def test_right_wrong_and_noise_lie_apart(job):
    red, wrong, noise, _ = job[0].out.read_all("truth").to_pylist()
    assert red["auc"] > 0.95
    assert red["correlation"] > 0.8
    assert wrong["correlation"] < 0
    assert abs(noise["correlation"]) < 0.4
    assert set(MEASURES) < set(red)
