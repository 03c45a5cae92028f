"""What runs on a GPU, on one that is not there (tests/device.py): same tables as on a CPU, and no waiting."""

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flows.config import compose
from flows.resources import ClusterSettings
from flows.run import load_run
from flows.stage import start_ray
from flows.sweep import Sweep
from tasks.decoding import from_processes, processes
from tasks.forward import worker_device
from tasks.layers import LayersSettings
from tasks.precision import PrecisionJob, PrecisionWorker
from tasks.probing import ProbingSettings
from tasks.store import Folder, StoreSettings
from tasks.target import TargetSettings
from tests import samples
from tests.device import OnGpu, no_gpu, simulated
from tests.local import running
from tests.test_decoding import counted
from tests.test_sae import random_sae

ROOT = Path(__file__).parents[1]


def sweep(arguments, root, inside):
    with inside as simulation:
        Sweep(compose([*arguments, f"store.root={root}", "cluster=none"])).run()
    return simulation


@pytest.fixture
def own_sums():
    """On a CPU too the sums of attention and of layers are torch's plain ones, whose bits can be compared."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.mha.set_fastpath_enabled(fast)


def test_tensors_of_two_devices_do_not_meet():
    before = torch.cuda.is_available()
    with simulated() as simulation:
        there, here = torch.arange(4.0, device="cuda"), torch.ones(4)
        assert isinstance(there, OnGpu)
        assert there.device == torch.device("cuda", 0)
        with pytest.raises(AssertionError, match="two devices"):
            there + here
        with pytest.raises(RuntimeError, match="not supported"):
            there.numpy()
        there[1:] += here.pin_memory()[1:].to("cuda", non_blocking=True)
        assert simulation.waits == []
        there[:1] += here[:1].to("cuda", non_blocking=True)  # not from pinned memory
        there[:1] -= 1
        assert len(simulation.waits) == 1
        assert float(there.sum()) == 9
        assert there[there > 1].cpu().tolist() == [2, 3, 4]
    assert len(simulation.waits) == 4
    assert all(line.startswith("test_device.py:") for line in simulation.waits)
    assert torch.cuda.is_available() == before


@pytest.mark.parametrize("target", ["convolutions", "tokens"])
def test_a_sweep_on_a_gpu_writes_the_same_tables(target, tmp_path, own_sums):
    """All stages, all bytes: decoded in processes, reduced, cut and resized on the device, scored there."""
    arguments = [*samples.sweep_arguments(tmp_path), "patches.tails=[top,bottom]"]
    if target == "tokens":
        sae = random_sae(tmp_path / "sae.safetensors", 64, 24)
        arguments = [a for a in arguments if not a.startswith(("target", "layers"))]
        arguments += ["target=timm", "target.name=test_vit", "target.pretrained=false", "layers.sae.centred=true"]
        arguments += [f"layers.saes={{blocks.2: {sae}}}", "layers.names=[heads,residual,sae]", "unit_block=50"]
        arguments += ["neurons.twin=true", "neurons.twin_nets=3"]
    sweep(arguments, tmp_path / "cpu", no_gpu())
    sweep(arguments, tmp_path / "gpu", simulated())
    expected, found = samples.stored_tables(tmp_path / "cpu"), samples.stored_tables(tmp_path / "gpu")
    assert set(found) == set(expected)
    assert [name for name in expected if expected[name] != found[name]] == []
    assert len(expected) > 50


def test_nothing_waits_for_a_gpu_in_every_batch(tmp_path):
    """One batch or twelve, the host waits at the same places as often: once a shard, once a block of units."""
    folder = samples.sweep_arguments(tmp_path)
    counts = []
    for size in (4, 48):
        arguments = [*folder, "probing.shard_size=48", f"probing.batch_size={size}"]
        waits = sweep(arguments, tmp_path / str(size), simulated()).waits
        texts = ("tokenizer", "encode_text")  # in batches too, once a vocabulary
        counts.append(Counter(line for line in waits if not any(call in line for call in texts)))
    assert counts[0] == counts[1]
    assert {line.split(":")[0] for line in counts[0]} >= {"activations.py", "patches.py", "embeddings.py", "scores.py"}


def test_half_precision_on_a_gpu(tmp_path):
    """The stage that chooses a format runs the model in all three; CLIP under autocast stays close to float32."""
    arguments = [*samples.sweep_arguments(tmp_path), "cluster=none"]
    for dtype in ("float32", "float16"):
        flow = Sweep(compose([*arguments, f"clip.dtype={dtype}", f"run={dtype}", f"store.root={tmp_path}/store"]))
        with simulated():
            flow.probing()
            flow.image_embeddings()
    store = compose(["probing.uri=x", f"store.root={tmp_path}/store"]).store
    full, half = (load_run(store, run).folder("image_embeddings") for run in ("float32", "float16"))
    vectors = [np.stack(f.read_all("image_embeddings")["embedding"].to_pylist()) for f in (full, half)]
    assert not np.array_equal(*vectors)
    first, second = (v[v.any(1)] / np.linalg.norm(v[v.any(1)], axis=1, keepdims=True) for v in vectors)
    assert (first * second).sum(1).min() > 0.9999

    settings = ProbingSettings(str(tmp_path / "photos"), shard_size=48, batch_size=8, max_skipped=1)
    images = samples.probe(tmp_path / "probed", settings)
    target = TargetSettings(
        "factory", "tests/models.py:random_cnn", preprocess={"size": [32, 32], "resize_to": [32, 32]}
    )
    collected, _ = samples.collect(tmp_path / "collected", images, target, LayersSettings(["conv"]))
    out = Folder(StoreSettings(str(tmp_path)), "precision", "x", ("precision",))
    with simulated():
        PrecisionWorker(PrecisionJob(out, collected.model)).run(0)
    kept = dict(zip(*out.read("precision", 0).to_pydict().values(), strict=True))
    assert kept["float32"] == 1
    assert 0.8 < kept["bfloat16"] < kept["float16"] <= 1


def test_a_gpu_that_torch_cannot_use_is_not_a_cpu(monkeypatch):
    with no_gpu():
        assert worker_device(1) == torch.device("cpu")
        for hidden in ("", "-1"):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
            assert worker_device(1) == torch.device("cpu")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        with pytest.raises(ValueError, match=r"^CUDA_VISIBLE_DEVICES=1: torch .* use CPUs: cluster=local$"):
            worker_device(1)


class Decoder:
    """As a worker beside a GPU."""

    def run(self):
        found = [array.shape for array in from_processes(counted, range(5), 50)]
        return found, [process.pid for process in processes()._processes.values()]


def test_processes_that_decode_end_with_their_ray_worker():
    start_ray(ClusterSettings())
    actor = ray.remote(Decoder).options(runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}).remote()
    found, pids = ray.get(actor.run.remote())
    assert found == [(number, 2) for number in range(5)]
    assert pids
    assert all(running(pid) for pid in pids)
    ray.kill(actor)
    deadline = time.monotonic() + 60
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline, "they outlive the worker"
        time.sleep(0.5)
