"""The whole sweep: complete, repeatable to the byte, resumable after every kill, the same on Ray and on S3.

One reference sweep in this process; everything else is compared with its tables.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import ray

from flows.config import compose
from flows.resources import ClusterSettings
from flows.run import TABLES, load_run
from flows.stage import StageFailed, Work, run_stage, start_ray
from flows.sweep import Sweep
from tasks.store import Folder, StoreSettings
from tests import killing, samples

OTHERS = (
    "answers", "clusters", "precision", "drawn", "truth", "chance", "screen", "pairs", "ablation", "causes", "world",
    "benchmark",
)  # fmt: skip
STAGES = [stage for stage in TABLES if stage not in OTHERS]  # of a sweep on a CPU, over photos, with a word list


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Overrides of the drawn sweep."""
    return samples.sweep_arguments(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def reference(drawn, tmp_path_factory):
    """Root of a store with a finished sweep, made in this process."""
    root = tmp_path_factory.mktemp("reference")
    sweep(drawn, root, "cluster=none")
    return root


def sweep(arguments, root, *more):
    flow = Sweep(compose([*arguments, f"store.root={root}", *more]))
    flow.run()
    return flow


def assert_same_tables(reference, other):
    expected, found = samples.stored_tables(reference), samples.stored_tables(other)
    assert set(found) == set(expected)
    assert [name for name in expected if expected[name] != found[name]] == []


def test_every_unit_has_exactly_one_row(reference):
    run = load_run(compose(["probing.uri=x", f"store.root={reference}"]).store, "drawn")
    assert list(run.stages) == STAGES
    neurons = run.folder("neurons").read_all("neurons").to_pylist()
    assert Counter((n["layer"], n["unit"]) for n in neurons) == Counter(
        [("relu", u) for u in range(6)] + [("head", u) for u in range(3)]
    )
    by_unit = {(n["layer"], n["unit"]): n for n in neurons}
    assert by_unit["relu", 2]["status"] == "dead"
    assert by_unit["relu", 4]["status"] == "dead"
    assert by_unit["relu", 2]["phrase"] is None
    assert by_unit["relu", 3]["status"] == "dead"  # the same value whatever the image
    assert all(n["phrase"] in [*samples.WORDS, "red circle"] for n in neurons if n["status"] != "dead")
    assert all(abs(sum(n["weights"]) - 1) < 1e-5 for n in neurons)
    assert {n["negative"] for n in neurons} == {None}, "no layer of this net goes below zero"
    kept = run.folder("scores").read_all("scores").to_pylist()
    adds = {(s["layer"], s["unit"]): s for s in kept if s["adds"]}
    assert 0 < len(adds) == sum(s["adds"] for s in kept) <= len(neurons)
    assert all(s["rank"] > 0 and by_unit[key]["concepts"][1] == s["concept"] for key, s in adds.items())
    images = run.folder("probing").read_all("images").to_pylist()
    assert Counter(i["status"] for i in images) == {"ok": 46, "not_an_image": 1}
    copies = [i for i in images if i["image_id"] in ("red/copy.png", "red/0000.png")]
    assert len({i["split"] for i in copies}) == 1


def test_second_run_does_nothing_and_says_so(drawn, reference, capsys):
    before = {p: p.stat().st_mtime_ns for p in reference.rglob("*.parquet")}
    assert not sweep(drawn, reference, "cluster=local").worked
    assert "everything was done already" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in reference.rglob("*.parquet")}


def test_a_finished_run_stays_finished_when_its_second_time_is_broken_off(drawn, reference, tmp_path):
    """Until something differs; from there on the manifest lists what the new settings need."""
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    manifest = (tmp_path / "runs/drawn/run.json").read_bytes()
    run_until_activations(Sweep(compose([*drawn, f"store.root={tmp_path}", "cluster=none"])))
    assert (tmp_path / "runs/drawn/run.json").read_bytes() == manifest
    other = Sweep(compose([*drawn, f"store.root={tmp_path}", "cluster=none", "vocabulary.merge=0.9"]))
    run_until_activations(other)
    listed = load_run(other.config.store, "drawn").stages
    assert [stage for stage, found in json.loads(manifest)["stages"].items() if listed.get(stage) == found] == STAGES[
        :5
    ]
    assert list(listed) == list(other.manifest.stages)
    assert len(listed) < len(STAGES)


def test_missing_part_alone_is_made_again(drawn, reference, tmp_path, capsys):
    sweep(drawn, tmp_path, "cluster=none")
    lost = sorted(tmp_path.glob("activations/*/candidates/part-*.parquet"))[1]
    lost.unlink()
    capsys.readouterr()
    assert sweep(drawn, tmp_path, "cluster=none").worked
    out = capsys.readouterr().out
    assert next(line for line in out.splitlines() if line.startswith("activations")).split()[1:3] == ["1", "parts"]
    assert out.count("done already") == len(STAGES) - 2  # all but the listing, which is silent, and activations
    assert_same_tables(reference, tmp_path)


def test_runs_share_common_stages(drawn, reference, tmp_path):
    """A second vocabulary collects no activations again; other settings never mix."""
    sweep(drawn, tmp_path, "cluster=none")
    words = tmp_path / "more.txt"
    words.write_text("red\nblue\npurple\nsky")
    sweep(drawn, tmp_path, "cluster=none", f"vocabulary.path={words}", "run=second")
    folders = {stage: len(list((tmp_path / stage).iterdir())) for stage in STAGES}
    assert {stage for stage, n in folders.items() if n == 2} == {
        "phrases", "phrase_embeddings", "vocabulary", "scores", "explanations", "validation", "neurons", "traits",
        "coverage", "report",
    }  # fmt: skip
    sweep(drawn, tmp_path, "cluster=none", "patches.k=3")
    run = load_run(compose(["probing.uri=x", f"store.root={tmp_path}"]).store, "drawn")
    assert run.changes["patches"] == "k (4 -> 3)"
    assert "patches" in run.changes["embeddings"]
    assert "activations" not in run.changes
    assert len(list((tmp_path / "activations").iterdir())) == 1
    assert len(list((tmp_path / "patches").iterdir())) == 2


def test_ray_gives_the_same_bytes(drawn, reference, tmp_path):
    sweep(drawn, tmp_path, "cluster=local", "cluster.num_cpus=2")
    assert_same_tables(reference, tmp_path)


STRANGER = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR'); print('joined')"


def test_a_stranger_cannot_use_the_ray_of_a_sweep():
    start_ray(ClusterSettings(num_cpus=2))
    address = ray.get_runtime_context().gcs_address
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for environment, said in ((known, ""), (dict(os.environ), "joined\n")):
        command = [sys.executable, "-c", STRANGER, address]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.stdout == said, done.stderr


def test_s3_gives_the_same_bytes(drawn, reference, s3, tmp_path):
    flow = sweep(drawn, f"{s3}/axonym", "cluster=none", "store=s3")
    store = flow.folder("neurons").store
    names = [path[len(store.root) + 1 :] for path in store.fs.find(store.root) if path.endswith(".parquet")]
    expected = samples.stored_tables(reference)
    assert set(names) == set(expected)
    assert [name for name in names if store.get(name) != expected[name]] == []
    assert not sweep(drawn, f"{s3}/axonym", "cluster=none", "store=s3").worked


@pytest.mark.parametrize("shard_size", [8, 64])
def test_other_shard_sizes_give_the_same_names(drawn, reference, tmp_path, shard_size):
    """Same rows, ids, names and status; floats within 1e-5."""
    flow = sweep(drawn, tmp_path, "cluster=none", f"probing.shard_size={shard_size}", f"unit_block={shard_size // 8}")
    run = load_run(compose(["probing.uri=x", f"store.root={reference}"]).store, "drawn")
    for stage, table, keys in [
        ("exemplars", "exemplars", ("layer", "unit", "tail", "rank")),
        ("patches", "patches", ("layer", "unit", "tail", "rank")),
        ("scores", "scores", ("layer", "unit", "rank")),
        ("validation", "validation", ("layer", "unit")),
        ("neurons", "neurons", ("layer", "unit")),
        ("traits", "traits", ("layer", "unit")),
        ("traits", "census", ("layer",)),
    ]:
        expected = sorted(run.folder(stage).read_all(table).to_pylist(), key=lambda r: [r[k] for k in keys])
        found = sorted(flow.folder(stage).read_all(table).to_pylist(), key=lambda r: [r[k] for k in keys])
        assert len(expected) == len(found)
        for a, b in zip(expected, found, strict=True):
            assert_close(a, b)


def assert_close(a, b):
    if isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    elif isinstance(a, float):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-5)
    else:
        assert a == b


def test_sigkill_in_each_stage_then_the_same_tables(drawn, reference, tmp_path):
    """The process kills itself at the first put of each stage in turn, before or after it; the last run finishes."""
    arguments = [*drawn, f"store.root={tmp_path}", "cluster=none"]
    context = multiprocessing.get_context("forkserver")  # libraries are imported once for all of them
    context.set_forkserver_preload(["tests.killing", *(f"tasks.{stage}" for stage in STAGES[1:]), "open_clip", "timm"])
    for number, stage in enumerate(STAGES):
        process = context.Process(target=killing.run, args=(stage, number % 2 == 1, arguments))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, stage
    sweep(drawn, tmp_path, "cluster=none")
    assert_same_tables(reference, tmp_path)


def test_killed_ray_workers_are_replaced(drawn, reference, tmp_path, monkeypatch):
    """A worker that dies once is replaced and its part made again."""
    marker = tmp_path / "died"
    monkeypatch.setenv("AXONYM_TEST_MARKER", str(marker))
    store = tmp_path / "store"
    flow = Sweep(compose([*drawn, f"store.root={store}", "cluster=local", "cluster.num_cpus=2"]))
    run_until_activations(flow)
    flow._stage = dying(flow._stage, "tests.test_sweep:DiesOnce")
    flow.activations()
    assert marker.exists()
    sweep(drawn, store, "cluster=local", "cluster.num_cpus=2")
    assert_same_tables(reference, store)


def test_worker_that_always_dies_is_reported(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("AXONYM_TEST_MARKER", str(tmp_path / "never/there"))
    more = ["cluster=local", "cluster.num_cpus=2", "cluster.default.retries=1"]
    flow = Sweep(compose([*drawn, f"store.root={tmp_path}", *more]))
    run_until_activations(flow)
    flow._stage = dying(flow._stage, "tests.test_sweep:AlwaysDies")
    with pytest.raises(StageFailed, match=r"part 1: its worker died 2 times"):
        flow.activations()
    assert flow.folder("activations").done() == {0, 2}


def test_worker_that_no_node_can_hold_is_reported(drawn, tmp_path):
    more = ["cluster=local", "cluster.num_cpus=2", "cluster.default.num_cpus=1000"]
    flow = Sweep(compose([*drawn, f"store.root={tmp_path}", *more]))
    with pytest.raises(ValueError, match="probing: one worker needs 1000 CPUs and 0 GPUs; the nodes there are"):
        flow.run()


def test_part_that_always_fails_is_reported(drawn, tmp_path):
    flow = Sweep(compose([*drawn, f"store.root={tmp_path}", "cluster=local", "cluster.num_cpus=2"]))
    run_until_activations(flow)
    flow._stage = dying(flow._stage, "tests.test_sweep:FailsOnPartOne")
    with pytest.raises(StageFailed, match=r"1 of 3 parts failed; run the same command again\n  part 1: OSError: no"):
        flow.activations()
    assert flow.folder("activations").done() == {0, 2}


@pytest.mark.parametrize(("worker", "kind"), [("Refuses", ValueError), ("RefusesOrFails", StageFailed)])
def test_what_the_user_can_mend_is_one_line_wherever_it_is_found(tmp_path, caplog, worker, kind):
    """No traceback and no advice to try again; but a part that failed otherwise may be mended by that."""
    job = SimpleNamespace(out=Folder(StoreSettings(str(tmp_path)), "causes", "x", TABLES["causes"]))
    work = Work(job.out, f"tests.test_sweep:{worker}", job, 2, 2, "part")
    with pytest.raises(kind) as error:
        run_stage(work, ClusterSettings(ray=False))
    assert ("run the same command again" in str(error.value)) == bool(caplog.records) == (kind is StageFailed)
    if kind is ValueError:
        assert str(error.value) == "key=0: must be above 0"


class Refuses:
    def __init__(self, job):
        pass

    def run(self, part):
        raise ValueError("key=0: must\nbe above 0")


class RefusesOrFails(Refuses):
    def run(self, part):
        if part:
            raise OSError("no disk")
        super().run(part)


def run_until_activations(flow):
    for stage in ("probing", "phrases", "image_embeddings", "phrase_embeddings", "vocabulary", "precision"):
        getattr(flow, stage)()


def dying(stage, worker):
    """`_stage` with another worker class in place of the real one."""

    def run(job, items, unit):
        job.marker = os.environ.get("AXONYM_TEST_MARKER")
        parts = stage.__self__.manifest.parts[job.out.stage]
        return run_stage(Work(job.out, worker, job, parts, items, unit), stage.__self__.config.cluster)

    return run


class DiesOnce:
    """The real worker, killed by SIGKILL before its first part anywhere."""

    def __init__(self, job):
        from tasks.activations import ActivationsWorker

        self.marker, self.worker = job.marker, ActivationsWorker(job)

    def run(self, part):
        if part == 1 and not os.path.exists(self.marker):
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.worker.run(part)


class AlwaysDies(DiesOnce):
    def run(self, part):
        if part == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.worker.run(part)


class FailsOnPartOne(DiesOnce):
    def run(self, part):
        if part == 1:
            raise OSError("no\ndisk")
        return self.worker.run(part)


def test_same_table_bytes_are_valid_parquet(reference):
    for path in reference.rglob("*.parquet"):
        pq.ParquetFile(path)


def test_a_model_of_which_nothing_is_finite_is_one_clear_error(drawn, tmp_path):
    with pytest.raises(ValueError, match=r"^target\.dtype=float32: no activation of any unit is finite"):
        sweep([x.replace("models.py:planted", "models.py:not_finite") for x in drawn], tmp_path, "cluster=none")
