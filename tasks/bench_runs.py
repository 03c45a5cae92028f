"""What `axonym bench` runs: our stages and the bare models, each in a form that can be timed.

In: BenchSettings. Out: chains of stages over drawn files, functions that report seconds, processes of their own.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.activations import ActivationsJob, ActivationsWorker
from tasks.bench_data import Chain, Decoded, Tower, draw_files
from tasks.bench_figures import in_turn, timed
from tasks.bench_settings import BenchSettings
from tasks.embeddings import EmbeddingsWorker
from tasks.forward import describe
from tasks.image_embeddings import ImageEmbeddingsWorker
from tasks.layers import LayersSettings
from tasks.probing import ProbingSettings
from tasks.target import TargetSettings

MODELS = {"vit_b": "vit_base_patch16_224", "vit_l": "vit_large_patch16_224"}
KEPT = 16
"""Batches that the bare model is given, again and again: more would not fit every device."""


def environment(device: str, cpu: int | None) -> None:
    """In a fresh process, before CUDA is looked for and threads are started."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if cpu is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cpu})


def fresh(device: str, cpu: int | None = None) -> ProcessPoolExecutor:
    """A process of its own that sees the GPU or does not; with all its threads on one CPU where one is named."""
    return ProcessPoolExecutor(1, get_context("spawn"), environment, (device, cpu))


def cpus() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def chain(settings: BenchSettings, folder: Path, count: int, model: str, clip: str, layers: list[str]) -> Chain:
    """Files drawn, listed and probed; the model described."""
    size, target = settings.batch, target_settings(model)
    files = draw_files(folder / "files", count, settings.side, settings.seed)
    shard = -(-min(settings.shard, count) // size) * size
    probing = ProbingSettings(str(files), seed=settings.seed, shard_size=shard, batch_size=size)
    found = describe(target, LayersSettings(layers)).layers
    tower = Tower(clip, dtype=settings.dtype)
    made = Chain(str(folder), probing, target, found, tower, settings.dtype, settings.threads)
    made.probe()
    made.random_embeddings()
    return made


def collect(worker: ActivationsWorker, images: Any = None) -> dict[str, float]:
    """Seconds of all parts: of the pass over the images, and with reading and writing."""
    worker.images = worker.target.images = images or worker.job.model.images
    start = time.perf_counter()
    reports = [worker.run(part) for part in range(worker.images.num_shards)]
    return {"pass": sum(r.seconds["compute"] for r in reports), "all": time.perf_counter() - start}


def bare_target(worker: ActivationsWorker, images: Decoded) -> Callable[[], None]:
    """Forward passes over as many batches as the images have; their input is made beforehand."""
    target, count = worker.target, -(-len(images) // images.batch_size)
    groups = [batch for part in range(images.num_shards) for batch in images.shard_batches(part)]
    worker.images = target.images = images
    inputs = [x for _, x in target.inputs(groups[:KEPT])]

    @torch.inference_mode()
    def run() -> None:
        for number in range(count):
            target.model(inputs[number % len(inputs)])

    return run


def bare_clip(worker: EmbeddingsWorker | ImageEmbeddingsWorker, count: int) -> Callable[[], None]:
    """encode_image of `count` images or crops, in whole batches."""
    clip, size = worker.clip, worker.images.batch_size
    pixels = torch.randint(0, 256, (size, *clip.preprocess.size, 3), dtype=torch.uint8).to(clip.device)
    x = clip.preprocess.normalise(pixels)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(-(-count // size)):
            clip.encode(x)

    return run


def run_all(worker: Any, parts: int) -> float:
    """Seconds of all parts; the worker has started."""
    start = time.perf_counter()
    for part in range(parts):
        worker.run(part)
    return time.perf_counter() - start


def target_settings(name: str) -> TargetSettings:
    return TargetSettings("timm", MODELS.get(name, name), pretrained=False)


def mlp_layers(name: str) -> list[str]:
    return [layer.name for layer in describe(target_settings(name), LayersSettings(["mlp"])).layers]


HERE: list[ActivationsWorker] = []
"""The worker that this process keeps, so that it starts once."""
BARE: list[Callable[[], None]] = []
"""The same of its bare model."""


def collect_here(job: ActivationsJob) -> None:
    if not HERE:
        HERE.append(ActivationsWorker(job))
    collect(HERE[0])


def bare_here(job: ActivationsJob) -> None:
    if not BARE:
        worker = ActivationsWorker(job)
        BARE.append(bare_target(worker, Decoded.of(job.model.images, worker.target.preprocess)))
    BARE[0]()


def at_once(
    s: BenchSettings, folder: Path, counts: list[int], runs: dict[str, Callable[[ActivationsJob], None]]
) -> dict[str, np.ndarray]:
    """Seconds in which that many processes, each held to a CPU of its own, do the same to as many images each."""
    one, own = replace(s, threads=1), cpus()
    jobs = [
        chain(one, folder / str(i), s.small_images, s.small, s.clip, ["mlp"]).activations for i in range(counts[-1])
    ]
    with ExitStack() as stack:
        processes = [stack.enter_context(fresh(s.device, own[i % len(own)])) for i in range(counts[-1])]

        def run(name: str, count: int) -> None:
            pairs = zip(processes[:count], jobs[:count], strict=True)
            for waiting in [process.submit(runs[name], job) for process, job in pairs]:
                waiting.result()

        return in_turn([timed(f"{name}{n}", partial(run, name, n)) for name in runs for n in counts], s.pairs)
