"""Validation over real sweeps, with one CLIP and with a second one that judges: every number by a slow look."""

import json

import numpy as np
import pytest
from safetensors.torch import save_file

from flows.config import compose
from flows.run import Run
from flows.sweep import Sweep
from tasks.correlation import DRAWS, SEED
from tasks.store import StoreSettings
from tasks.tables import matrix
from tasks.target import TargetSettings, load_target
from tasks.validation import UNITS
from tests import samples
from tests.test_metrics import slow_auc, slow_auprc, slow_f1, slow_iou, slow_mad

WIDTHS = {"named": 32, "judged": 24}
"""Of the vectors of the CLIP that judges, in either run."""
KEYS = {"image_embeddings/judge", "phrase_embeddings/judge"}


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """Two finished sweeps with their twins in one store: `named` has no judge, in `judged` another CLIP judges."""
    folder = tmp_path_factory.mktemp("judge")
    model = load_target(TargetSettings("timm", "test_resnet", pretrained=False, seed=7)).model
    save_file(model.state_dict(), folder / "weights.safetensors")
    arguments = [
        *samples.sweep_arguments(folder),
        "target.source=timm",
        "target.name=test_resnet",
        f"target.checkpoint={folder}/weights.safetensors",
        "target.preprocess={size: [64, 64], resize_to: [64, 64]}",
        "layers.names=[layer4.0]",
        "probing.explain=0.4",
        "probing.select=0.2",
        "probing.validate=0.4",
        "neurons.twin=true",
        "unit_block=150",
        "cluster=none",
        f"store.root={folder}/store",
    ]
    judge = ["judge=folder", f"judge.name={samples.tiny_clip(folder / 'judge', seed=1, width=WIDTHS['judged'])}"]
    found = {}
    for run, more in (("named", []), ("judged", judge)):
        found[run] = Sweep(compose([*arguments, *more, f"run={run}"]))
        found[run].run()
    again = Sweep(compose([*arguments, *judge, "run=judged"]))
    again.run()
    assert not again.worked
    return found


def test_judge_changes_only_what_comes_after_it(sweeps):
    named, judged = (sweep.manifest.stages for sweep in sweeps.values())
    assert set(judged) - set(named) == KEYS
    changed = {stage for stage in named if named[stage] != judged[stage]}
    assert changed == {"validation", "neurons", "traits", "coverage", "report"}
    assert sweeps["judged"].twin.manifest.stages.keys() >= KEYS
    for key in KEYS:
        assert sweeps["judged"].twin.manifest.stages[key] == judged[key]


def test_fingerprints_hold_the_judge_only_where_one_is_set(sweeps):
    payloads = {}
    for run, sweep in sweeps.items():
        folder = sweep.folder("validation")
        payloads[run] = json.loads(folder.store.get(f"{folder.name}/stage.json"))["settings"]
    assert "judge" not in payloads["named"]
    assert set(payloads["judged"].pop("judge")) == {sweeps["judged"].manifest.stages[key] for key in KEYS}
    assert payloads["named"] == payloads["judged"]


def test_what_a_judge_computes_is_no_round():
    stages = {"image_embeddings": "a", "scores": "b", "scores/1": "c", "image_embeddings/judge": "d", "scores/12": "e"}
    run = Run("x", StoreSettings("."), {}, stages, {key: i for i, key in enumerate(stages)})
    assert run.rounds("image_embeddings") == ["image_embeddings"]
    assert run.last("scores") == "scores/12"
    assert run.rounds("scores") == ["scores", "scores/1", "scores/12"]
    assert run.num_parts(run.folder("image_embeddings/judge")) == 3


def test_judges_concepts_are_the_vocabularys(sweeps):
    judged = sweeps["judged"].manifest
    ids = [judged.folder(key).read_all(table)["concept_id"].to_pylist() for key, table in (
        ("vocabulary", "concepts"), ("phrase_embeddings/judge", "phrase_embeddings"),
    )]  # fmt: skip
    assert ids[0] == ids[1]


def vectors(sweep, run):
    """Vectors of all images and of each concept, float64, by the CLIP that judges."""
    manifest = sweep.manifest
    concepts = manifest.folder("vocabulary").read_all("concepts")["concept"].to_pylist()
    if run == "named":
        images, texts = manifest.folder("image_embeddings"), manifest.folder("vocabulary")
        texts = texts.read_all("concept_embeddings")
    else:
        images = manifest.folder("image_embeddings/judge")
        texts = manifest.folder("phrase_embeddings/judge").read_all("phrase_embeddings")
    images = matrix(images.read_all("image_embeddings")["embedding"]).astype(np.float64)
    texts = matrix(texts["embedding"]).astype(np.float64)
    assert images.shape[1] == texts.shape[1] == WIDTHS[run]
    return images, dict(zip(concepts, texts, strict=True))


def pooled(sweep):
    """Stored activations of each unit of the only layer, by unit."""
    found: dict[int, list[float]] = {}
    for shard in range(sweep.images.num_shards):
        for row in sweep.folder("activations").read("pooled", shard).to_pylist():
            found.setdefault(row["unit"], []).extend(value * row["scale"] for value in row["activation"])
    return {unit: np.array(values, np.float64) for unit, values in found.items()}


def above(values, sample):
    """The slow look at what is positive."""
    return values > min(x for x in sample if (sample <= x).mean() >= 0.95)


@pytest.mark.parametrize("run", WIDTHS)
@pytest.mark.parametrize("of_twin", [False, True])
def test_every_number_of_validation(sweeps, run, of_twin):
    sweep = sweeps[run].twin if of_twin else sweeps[run]
    images, concepts = vectors(sweep, run)
    stored = np.flatnonzero(sweep.images.stored)
    explain, validate = (sweep.images.split[stored] == split for split in ("explain", "validate"))
    assert min(explain.sum(), validate.sum()) > 12
    draws = np.random.default_rng(SEED).multinomial(validate.sum(), np.full(validate.sum(), 1 / validate.sum()), DRAWS)
    names = sweep.folder("explanations").read_all("explanations")["concepts"].to_pylist()
    activations, rows = pooled(sweep), sweep.folder("validation").read_all("validation").to_pylist()
    assert len(rows) == len(activations) > UNITS  # so that they are measured in slices
    alive = 0
    for row, (name, *_) in zip(rows, names, strict=True):
        a, s = activations[row["unit"]], images[stored] @ concepts[name]
        fires, said = above(a[validate], a[explain]), above(s[validate], s[explain])
        a, s = a[validate], s[validate]
        if a.min() == a.max():
            assert row["correlation"] is row["lower"] is row["upper"] is row["p"] is None
            continue
        alive += 1
        assert row["images"] == len(a)
        assert row["correlation"] == pytest.approx(np.corrcoef(a, s)[0, 1], abs=1e-6)
        assert 0 <= row["p"] <= 1
        for column, expected in {
            "auprc": slow_auprc(s, fires),
            "auc": slow_auc(s, fires),
            "f1": slow_f1(fires, said),
            "iou": slow_iou(fires, said),
            "mad": slow_mad(a, said),
        }.items():
            assert (np.nan if row[column] is None else row[column]) == pytest.approx(expected, rel=1e-5, nan_ok=True)
        if row["unit"] % 20 == 0:
            r = [correlation(np.repeat(a, times), np.repeat(s, times)) for times in draws]
            assert (row["lower"], row["upper"]) == pytest.approx(tuple(np.quantile(r, (0.025, 0.975))), abs=1e-5)
    assert alive > len(rows) / 2


def correlation(a, s):
    return 0 if len(set(a.tolist())) == 1 or len(set(s.tolist())) == 1 else np.corrcoef(a, s)[0, 1]


def test_small_p_where_shuffles_seldom_do_better(sweeps):
    """The stored p values against 2,000 shuffles of the similarities of each unit's name."""
    sweep = sweeps["judged"]
    images, concepts = vectors(sweep, "judged")
    stored = np.flatnonzero(sweep.images.stored)
    validate = sweep.images.split[stored] == "validate"
    names = sweep.folder("explanations").read_all("explanations")["phrase"].to_pylist()
    rng, activations, off = np.random.default_rng(0), pooled(sweep), []
    for row, name in zip(sweep.folder("validation").read_all("validation").to_pylist(), names, strict=True):
        if row["p"] is not None and name is not None:
            a, s = activations[row["unit"]][validate], (images[stored] @ concepts[name])[validate]
            shuffled = np.array([rng.permutation(s) for _ in range(2000)]) @ (a - a.mean())
            off.append(row["p"] - np.mean(shuffled >= s @ (a - a.mean()) - 1e-12))
    assert len(off) > 50
    assert np.abs(off).mean() < 0.02


def test_rivals_stay_with_the_clip_that_named(sweeps):
    named, judged = (s.folder("validation").read_all("validation").to_pydict() for s in sweeps.values())
    assert named["rival"] == judged["rival"]
    assert named["rival_gain"] == judged["rival_gain"]
    assert named["correlation"] != judged["correlation"]


@pytest.mark.parametrize("run", WIDTHS)
def test_chance_is_the_judges_too(sweeps, run):
    sweep = sweeps[run].twin
    images, concepts = vectors(sweep, run)
    stored = np.flatnonzero(sweep.images.stored)
    validate = sweep.images.split[stored] == "validate"
    chance = {row["concept"]: row["correlation"] for row in sweep.folder("chance").read("chance", 0).to_pylist()}
    assert set(chance) == set(concepts)
    first = [a[validate] for unit, a in pooled(sweep).items() if unit < 150 and len(set(a[validate].tolist())) > 1]
    for name, vector in concepts.items():
        s = (images[stored] @ vector)[validate]
        assert chance[name] == pytest.approx(np.quantile([np.corrcoef(a, s)[0, 1] for a in first], 0.98), abs=1e-3)


def test_report_names_the_judge(sweeps):
    for run, sweep in sweeps.items():
        folder = sweep.folder("report")
        page = folder.store.get(f"{folder.name}/index.html").decode()
        assert ("<dt>judge</dt>" in page) == (run == "judged")
