"""What `axonym bench` measures: our code beside the bare models, in turn, in one run.

In: BenchSettings. Out: one Figure per row, most of them the bare models' time as a share of ours. Only torch, timm,
torchvision, pyarrow, fsspec, pillow and numpy are needed; where scipy or vLLM is missing, the sweep goes without.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tasks.activations import ActivationsJob, ActivationsWorker
from tasks.bench_data import Decoded
from tasks.bench_figures import Figure, figure, has_cuda, in_turn, named, timed
from tasks.bench_runs import (
    at_once,
    bare_clip,
    bare_here,
    bare_target,
    chain,
    collect,
    collect_here,
    cpus,
    fresh,
    mlp_layers,
    run_all,
)
from tasks.bench_settings import ROWS, BenchSettings
from tasks.bench_sweep import curves, sweep
from tasks.embeddings import EmbeddingsWorker
from tasks.store import peak_mib

TIMES = 10
"""Images behind the second peak of memory, as a multiple of those behind the first."""
SHARDS = 4
"""Shards behind the first peak: that of one alone is now and then a third higher or lower."""
WHOLE = 4
"""Images behind the rows of time, as a multiple of small_images: by default as many as a run has in a shard, most of
whose first hundreds are candidates yet."""
BYTES = 4096, 2, 12
"""A unit's tables of one shard: at most so many bytes, and for each pooled activation and each candidate."""


def measure(name: str, settings: BenchSettings) -> list[Figure]:
    """The rows of one measurement, in this process; `settings` are those of its device."""
    with tempfile.TemporaryDirectory(prefix="axonym-bench-") as folder:
        return list(RUNS[name](settings, Path(folder)))


def collection(s: BenchSettings, folder: Path) -> Iterator[Figure]:
    made = chain(s, folder, s.images, s.model, s.clip, ["mlp"])
    worker, images = ActivationsWorker(made.activations), made.images
    decoded = Decoded.of(images, worker.target.preprocess)

    bare = timed("bare", bare_target(worker, decoded))
    t = in_turn(
        [
            bare,
            partial(named, "memory", partial(collect, worker, decoded)),
            partial(named, "files", partial(collect, worker, images)),
        ],
        s.pairs,
        warm=0 if s.device == "cuda" else 3,
    )
    scale = f"{s.images:,} images, {sum(map(len, made.blocks)):,} units"
    what = f"bare forward / pass, decoded images; {scale}"
    yield figure(s.device, "collection", t["bare"], t["memory pass"], s.model, what)
    what = f"bare forward / pass, JPEG files; {scale}"
    yield figure(s.device, "collection, files", t["bare"], t["files pass"], s.model, what)
    what = f"the same, the tables of every {made.probing.shard_size:,} images written too"
    yield figure(s.device, "collection, tables", t["bare"], t["files all"], s.model, what)
    yield table_bytes(s, made.activations)


def table_bytes(s: BenchSettings, job: ActivationsJob) -> Figure:
    """Bytes of the parts that a shard leaves, beside their limit, per unit."""
    units, sizes, limits = sum(map(len, job.blocks)), [], []
    for part in sorted(job.out.done()):
        files = [job.out.store.path(f"{job.out.name}/{t}/part-{part:05d}.parquet") for t in job.out.tables]
        sizes.append(sum(job.out.store.fs.size(file) for file in files) / units)
        stored = int(job.model.images.stored[np.array(job.model.images.shard(part))].sum())
        rows = len(job.out.read("candidates", part)["image"].combine_chunks().flatten())
        limits.append(BYTES[0] + BYTES[1] * stored + BYTES[2] * rows / units)
    what = f"bytes per unit and shard / limit ({BYTES[0]:,} + {BYTES[1]} a pooled image + {BYTES[2]} a candidate row)"
    return figure(s.device, "bytes", np.array(sizes), np.array(limits), s.model, what)


def embedding(s: BenchSettings, folder: Path) -> Iterator[Figure]:
    images = s.images if s.device == "cuda" else s.small_images
    made = chain(s, folder, images, s.small, s.clip, mlp_layers(s.small)[:1])
    count = made.some_crops(s.crops)
    worker = EmbeddingsWorker(made.embeddings)
    t = in_turn([timed("bare", bare_clip(worker, count)), timed("ours", lambda: run_all(worker, made.shards))], s.pairs)
    what = f"bare encode_image / stage embeddings, from JPEG files; {count:,} crops"
    yield figure(s.device, "embedding", t["bare"], t["ours"], s.clip, what)


def peak_of(job: ActivationsJob) -> tuple[float, float]:
    """MiB that the process needed at most, and that it had on the GPU."""
    collect(ActivationsWorker(job))
    return peak_mib(), torch.cuda.max_memory_allocated() / 2**20 if has_cuda() else 0.0


def memory(s: BenchSettings, folder: Path) -> Iterator[Figure]:
    count, peaks = s.small_images, []
    for number, images in enumerate((count, TIMES * count)):
        made = chain(replace(s, shard=-(-count // SHARDS)), folder / str(number), images, s.small, s.clip, ["mlp"])
        with fresh(s.device) as process:
            peaks.append(process.submit(peak_of, made.activations).result())
    what = f"peak MiB of a fresh process with {TIMES * count:,} images / {count:,}"
    few, many = np.array(peaks)
    yield figure(s.device, "memory", many[:1], few[:1], s.small, what)
    if has_cuda():
        yield figure(s.device, "memory, GPU", many[1:], few[1:], s.small, what)


def growth(s: BenchSettings, folder: Path) -> Iterator[Figure]:
    count, found = WHOLE * s.small_images, {}
    every = mlp_layers(s.small)
    half = every[1 - len(every) % 2 :: 2]
    for name, images, layers in (("N", count, every), ("2N", 2 * count, every), ("U", count, half)):
        made = chain(replace(s, shard=count), folder / name, images, s.small, s.clip, layers)
        found[name] = partial(named, name, partial(collect, ActivationsWorker(made.activations)))
    t = in_turn(list(found.values()), s.pairs, warm=3)
    what = f"collection of {2 * count:,} images / {count:,}, tables written"
    yield figure(s.device, "time, images", t["2N all"], t["N all"], s.small, what)
    what = (
        f"pass over {count:,} images: MLP units of all {len(every)} layers / of every second one, the last among them"
    )
    yield figure(s.device, "time, units", t["N pass"], t["U pass"], s.small, what)


def workers(s: BenchSettings, folder: Path) -> Iterator[Figure]:
    if s.device == "cuda":
        return  # two processes on one GPU are no more than one
    t = at_once(s, folder, [1, 2], {"ours": collect_here, "bare": bare_here})
    what = f"images per second of two workers, each on a CPU of its own, / one; {len(cpus())} CPUs"
    yield figure(s.device, "workers", t["ours1"], t["ours2"], s.small, what, scale=2)
    what = "the same of two bare models: what the machine allows"
    yield figure(s.device, "workers, bare", t["bare1"], t["bare2"], s.small, what, scale=2)


RUNS: dict[str, Callable[[BenchSettings, Path], Iterator[Figure]]] = {
    "collection": collection,
    "embedding": embedding,
    "memory": memory,
    "time": growth,
    "workers": workers,
    "sweep": sweep,
    "curves": curves,
}
assert tuple(RUNS) == ROWS
