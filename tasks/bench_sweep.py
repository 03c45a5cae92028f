"""Rows of `axonym bench` that run the stages of a sweep: the sweep itself, and what it costs as it grows.

In: BenchSettings and an empty folder. Out: Figures.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tasks.activations import ActivationsWorker
from tasks.bench_data import Decoded
from tasks.bench_figures import Figure, figure, in_turn, named, timed
from tasks.bench_llm import answer_here, answers_job, generate_here, start_engine
from tasks.bench_runs import (
    at_once,
    bare_clip,
    bare_target,
    chain,
    collect,
    collect_here,
    cpus,
    fresh,
    mlp_layers,
    run_all,
)
from tasks.bench_settings import BenchSettings
from tasks.embeddings import EmbeddingsWorker
from tasks.scores import ScoresWorker

GROWTH = 1, 2, 4, 8
"""Points of a cost curve, as multiples of the first."""
CONCEPTS = 1024
"""At the first point of the curve over concepts."""


def sweep(s: BenchSettings, folder: Path) -> Iterator[Figure]:
    made = chain(s, folder, s.small_images, s.small, s.small_clip, mlp_layers(s.small)[-1:])
    made.vocabulary()
    left_out = {} if find_spec("scipy") else {"validation": "scipy", "neurons": "scipy"}

    def ours() -> dict[str, float]:
        return {stage: run_all(worker, parts) for stage, worker, parts in made.workers() if stage not in left_out}

    ours()
    crops = made.embeddings.patches.read_all("crops", columns=["level"])["level"].to_numpy()
    encoded = len(made.images) + int((crops > 0).sum())
    worker = ActivationsWorker(made.activations)
    target = bare_target(worker, Decoded.of(made.images, worker.target.preprocess))
    clip = bare_clip(EmbeddingsWorker(made.embeddings), encoded)
    runs = [ours, timed("target", target), timed("clip", clip)]
    job = answers_job(made.folder("answers"), s.device)
    with fresh(s.device) as process:
        if process.submit(start_engine, job, s.device).result():
            runs.append(lambda: {"answers": process.submit(answer_here).result()})
            runs.append(lambda: {"llm": process.submit(generate_here).result()})
        else:
            left_out["answers"] = "vLLM"
        t = in_turn(runs, s.pairs, warm=1)
    bare = [t[name] for name in ("target", "clip", "llm") if name in t]
    stages = np.sum([seconds for name, seconds in t.items() if name not in ("target", "clip", "llm")], 0)
    what = f"one target pass, {encoded:,} encodes" + f", {len(job.prompts)} answers" * ("llm" in t)
    what += f" / all stages; {s.small_images:,} images, {sum(map(len, made.blocks)):,} units"
    what += "".join(f"; without {stage}: no {library}" for stage, library in left_out.items())
    yield figure(s.device, "sweep", np.sum(bare, 0), stages, f"{s.small} + {s.small_clip}", what)
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
