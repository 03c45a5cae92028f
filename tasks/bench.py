"""What `axonym bench` measures: our code beside the bare models, in turn, in one run.

In: BenchSettings. Out: one Figure per row, most of them the bare models' time as a share of ours. Only torch, timm,
torchvision, pyarrow, fsspec, pillow and numpy are needed; where scipy is missing, the sweep leaves validation out.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.activations import ActivationsJob, ActivationsWorker
from tasks.bench_data import Chain, Decoded, Tower, draw_files
from tasks.bench_figures import Figure, figure, has_cuda, in_turn, named, timed
from tasks.clip import DTYPES
from tasks.embeddings import EmbeddingsWorker
from tasks.forward import describe
from tasks.image_embeddings import ImageEmbeddingsWorker
from tasks.layers import LayersSettings
from tasks.probing import ProbingSettings
from tasks.scores import ScoresWorker
from tasks.store import peak_mib
from tasks.target import TargetSettings

MODELS = {"vit_b": "vit_base_patch16_224", "vit_l": "vit_large_patch16_224"}
TIMES = 10
"""Images behind the second peak of memory, as a multiple of those behind the first."""
SHARDS = 4
"""Shards behind the first peak: that of one alone is now and then a third higher or lower."""
WHOLE = 4
"""Images behind the rows of time, as a multiple of small_images: by default as many as a run has in a shard, most of
whose first hundreds are candidates yet."""
GROWTH = 1, 2, 4, 8
"""Points of a cost curve, as multiples of the first."""
CONCEPTS = 1024
"""At the first point of the curve over concepts."""
KEPT = 16
"""Batches that the bare model is given, again and again: more would not fit every device."""
BYTES = 4096, 2, 12
"""A unit's tables of one shard: at most so many bytes, and for each pooled activation and each candidate."""


@dataclass
class BenchSettings:
    what: list[str] = field(default_factory=lambda: list(ROWS))
    """Which measurements; each gives one or more rows."""
    device: str = "all"
    """cpu, cuda, or all that there are."""
    model: str = "vit_b"
    """Target of the rows collection, files and tables: vit_b, vit_l or any name of timm. Its weights are random."""
    small: str = "vit_tiny_patch16_224"
    """Target of the other rows."""
    clip: str = "vit_base_patch32_clip_224"
    """Image tower, by its name in timm, of the row embedding."""
    small_clip: str = "vit_small_patch32_224"
    """The same for the sweep."""
    images: int = 0
    """Images of the rows collection and bytes, on a GPU of embedding too; 0: 256 on a CPU, 8,192 on a GPU."""
    small_images: int = 0
    """The same of the other rows; 0: 256 on a CPU, 512 on a GPU."""
    side: int = 400
    """Longer side of the JPEG files, pixels."""
    crops: int = 2
    """Crops per image of the row embedding."""
    batch: int = 0
    """Images per model call; 0: 16 on a CPU, 128 on a GPU."""
    shard: int = 0
    """Images per shard, at most, whose tables are written together; 0: 1,024 on a CPU, 8,192 on a GPU."""
    pairs: int = 5
    """How often each of two is measured, in turn."""
    threads: int = 1
    """Torch threads on a CPU."""
    dtype: str = "auto"
    """float32, float16, bfloat16; auto: float32 on a CPU, float16 on a GPU."""
    seed: int = 0
    out: str = "bench.parquet"

    def __post_init__(self) -> None:
        unknown = [name for name in self.what if name not in ROWS]
        if unknown or not self.what:
            raise ValueError(f"what={','.join(unknown)}: allowed are {', '.join(ROWS)}")
        if self.device not in ("all", "cpu", "cuda"):
            raise ValueError(f"device={self.device}: allowed are all, cpu, cuda")
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype={self.dtype}: allowed are auto, {', '.join(DTYPES)}")
        least = {"images": 0, "small_images": 0, "batch": 0, "side": 32, "shard": 0, "crops": 1, "pairs": 1}
        for key, smallest in (least | {"threads": 1, "seed": 0}).items():
            if getattr(self, key) < smallest:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least {smallest}")

    @property
    def devices(self) -> list[str]:
        """Raises ValueError where the one that is asked for is not there."""
        there = ["cpu", "cuda"] if has_cuda() else ["cpu"]
        if self.device not in ("all", *there):
            raise ValueError(f"device={self.device}: not there; allowed are all, {', '.join(there)}")
        return there if self.device == "all" else [self.device]

    def on(self, device: str) -> "BenchSettings":
        """With the sizes of this device where none are given."""
        images, small, batch, shard = (8192, 512, 128, 8192) if device == "cuda" else (256, 256, 16, 1024)
        own = {"images": images, "small_images": small, "batch": batch, "shard": shard}
        chosen = {key: getattr(self, key) or value for key, value in own.items()}
        dtype = {"cpu": "float32", "cuda": "float16"}[device] if self.dtype == "auto" else self.dtype
        return replace(self, device=device, dtype=dtype, **chosen)


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


def measure(name: str, settings: BenchSettings) -> list[Figure]:
    """The rows of one measurement, in this process; `settings` are those of its device."""
    with tempfile.TemporaryDirectory(prefix="axonym-bench-") as folder:
        return list(ROWS[name](settings, Path(folder)))


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


def workers(s: BenchSettings, folder: Path) -> Iterator[Figure]:
    if s.device == "cuda":
        return  # two processes on one GPU are no more than one
    t = at_once(s, folder, [1, 2], {"ours": collect_here, "bare": bare_here})
    what = f"images per second of two workers, each on a CPU of its own, / one; {len(cpus())} CPUs"
    yield figure(s.device, "workers", t["ours1"], t["ours2"], s.small, what, scale=2)
    what = "the same of two bare models: what the machine allows"
    yield figure(s.device, "workers, bare", t["bare1"], t["bare2"], s.small, what, scale=2)


def sweep(s: BenchSettings, folder: Path) -> Iterator[Figure]:
    made = chain(s, folder, s.small_images, s.small, s.small_clip, mlp_layers(s.small)[-1:])
    made.vocabulary()
    left_out = [] if find_spec("scipy") else ["validation", "neurons"]

    def ours() -> dict[str, float]:
        return {stage: run_all(worker, parts) for stage, worker, parts in made.workers() if stage not in left_out}

    ours()
    crops = made.embeddings.patches.read_all("crops", columns=["level"])["level"].to_numpy()
    encoded = len(made.images) + int((crops > 0).sum())
    worker = ActivationsWorker(made.activations)
    target = bare_target(worker, Decoded.of(made.images, worker.target.preprocess))
    clip = bare_clip(EmbeddingsWorker(made.embeddings), encoded)
    t = in_turn([ours, timed("target", target), timed("clip", clip)], s.pairs, warm=1)
    stages = np.sum([seconds for name, seconds in t.items() if name not in ("target", "clip")], 0)
    units = sum(map(len, made.blocks))
    what = f"one target pass and {encoded:,} encodes / all stages; {s.small_images:,} images, {units:,} units"
    what += f"; without {', '.join(left_out)}: no scipy" if left_out else ""
    yield figure(s.device, "sweep", t["target"] + t["clip"], stages, f"{s.small} + {s.small_clip}", what)
    for name, seconds in t.items():
        yield figure(s.device, f"sweep, {name}", seconds, stages, s.small, "share of all stages")


def curves(s: BenchSettings, folder: Path) -> Iterator[Figure]:
    """What images, units, concepts and workers cost, each alone: time as a multiple of the first point's."""
    images, every = s.small_images, mlp_layers(s.small)
    found: dict[float, Callable[[], dict[str, float]]] = {}
    for times in GROWTH:
        made = chain(replace(s, shard=images), folder / f"n{times}", times * images, s.small, s.clip, ["mlp"])
        found[times * images] = partial(collect, ActivationsWorker(made.activations))
    yield from curve(s, "images", found, "all", "collection, tables written")

    found = {}
    for times in GROWTH:
        layers = every[:: -GROWTH[-1] // times][::-1]
        made = chain(s, folder / f"u{times}", images, s.small, s.clip, layers)
        found[sum(map(len, made.blocks))] = partial(collect, ActivationsWorker(made.activations))
    yield from curve(s, "units", found, "pass", f"collection from {images:,} images, the last layer among the units'")

    made, found = chain(s, folder / "c", images, s.small, s.small_clip, every[-1:]), {}
    made.vocabulary()
    for stage, worker, parts in made.workers():
        if stage == "scores":
            break
        run_all(worker, parts)
    for times in GROWTH:
        job = made.scores(made.vocabulary(times * CONCEPTS))
        found[times * CONCEPTS] = timed("all", lambda job=job: run_all(ScoresWorker(job), len(job.blocks)))
    yield from curve(s, "concepts", found, "all", f"stage scores, {sum(map(len, made.blocks)):,} units")

    if s.device == "cuda":
        return
    counts = [2**i for i in range(len(cpus()).bit_length())]
    t = at_once(s, folder / "w", counts, {"ours": collect_here})
    for count in counts:
        name, what = f"curve, {count} workers", f"images per second of {count} workers / one"
        point = figure(s.device, name, t["ours1"], t[f"ours{count}"], s.small, what, scale=count)
        yield replace(point, size=count)


def curve(
    s: BenchSettings, kind: str, runs: dict[float, Callable[[], dict[str, float]]], seconds: str, what: str
) -> Iterator[Figure]:
    """One figure for each run, by its size: seconds / those of the first."""
    t = in_turn([partial(named, str(size), run) for size, run in runs.items()], s.pairs)
    first = min(runs)
    for size in runs:
        name, ratio = f"curve, {size:,} {kind}", f"{size:,} {kind} / {first:,}: {what}"
        point = figure(s.device, name, t[f"{size} {seconds}"], t[f"{first} {seconds}"], s.small, ratio)
        yield replace(point, size=size)


ROWS: dict[str, Callable[[BenchSettings, Path], Iterator[Figure]]] = {
    "collection": collection,
    "embedding": embedding,
    "memory": memory,
    "time": growth,
    "workers": workers,
    "sweep": sweep,
    "curves": curves,
}
