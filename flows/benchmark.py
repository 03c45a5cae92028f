"""axonym benchmark: every scorer on the same evidence, judged by what is known.

In: overrides of the config as for a sweep; scorers=auc,soft_wpmi:top_k=10:a=100 (default: all, with their own values),
halves=true (name twice more, from disjoint halves of the images), controls=false (leave out the images shuffled against
the model's, which take another pass), annotations=FILE (CSV: layer, unit, description).
Out: one table per benchmark, printed and as Parquet, and a picture of the trade-off, tradeoff.svg. Each scorer is a run
of its own, <run>-<scorer>; all that comes before the scores is made once.
"""

import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flows.config import compose, flow_arguments
from flows.run import Run
from flows.stage import Work, run_stage
from flows.sweep import Sweep
from tasks.benchmark import NO_SCORER, BenchmarkJob, Named, read_annotations
from tasks.charts import Axis, Point, chart
from tasks.scorers import SCORERS, ScorerSettings
from tasks.store import Folder, Store, fingerprint


def main(arguments: list[str]) -> int:
    own, rest = flow_arguments(
        arguments,
        {"scorers": str, "halves": str, "controls": str, "annotations": str},
        scorers="",
        halves="false",
        controls="true",
        annotations="",
    )
    scorers = own["scorers"].strip("[]").split(",") if own["scorers"] else [*SCORERS]
    for key in ("halves", "controls"):
        if own[key] not in ("true", "false"):
            raise ValueError(f"{key}={own[key]}: allowed are true, false")
    if own["annotations"]:
        read_annotations(own["annotations"])
    chosen = {key: own[key] == "true" for key in ("halves", "controls")}
    benchmark = Benchmark(Sweep(compose(rest)), scorers, **chosen, annotations=own["annotations"] or None)
    print("\n" + "\n".join(benchmark.run()))
    return 0


@dataclass
class Runs:
    """What one scorer named."""

    run: Sweep
    shuffled: list[Sweep]
    """One, or none."""
    halves: list[Sweep]

    def named(self) -> Named:
        found = [("randomly initialised", self.run.twin)] if self.run.twin else []
        found += [("shuffled", sweep) for sweep in self.shuffled]
        controls = {name: sweep.folder("neurons") for name, sweep in found}
        return Named(self.run.folder("neurons"), controls, [half.folder("neurons") for half in self.halves])


class Benchmark:
    """Runs of one sweep that differ in the scorer, their controls, and what is found when they are judged."""

    def __init__(self, sweep: Sweep, scorers: list[str], halves: bool, controls: bool, annotations: str | None) -> None:
        """Raises ValueError for a scorer or a value that there is not."""
        self.sweep, self.annotations = sweep, annotations
        self.scorers = {re.sub("[:=]", "_", spec): scorer_settings(spec, sweep.config.scorer.keep) for spec in scorers}
        config, neurons = sweep.config, replace(sweep.config.neurons, twin=False)
        shuffled = sweep.variant("shuffled", target=replace(config.target, shuffled=True))
        self.shuffled = [shuffled] if controls else []
        probing = [replace(config.probing, half=half) for half in (0, 1)] if halves else []
        self.halves = [
            Sweep(replace(config, run=f"{config.run}-half{p.half}", probing=p, neurons=neurons)) for p in probing
        ]

    def run(self) -> list[str]:
        """Make and judge all runs; the tables as lines of text."""
        folder = self._judged({name: self._runs(name, scorer) for name, scorer in self.scorers.items()})
        figures, store = folder.read_all("benchmark").to_pylist(), Store(self.sweep.config.store)
        if picture := tradeoff(figures):
            store.put(f"{folder.name}/tradeoff.svg", picture.encode())
        return [*tables(figures), f"written to {store.path(folder.name)}"]

    def _runs(self, name: str, scorer: ScorerSettings) -> Runs:
        """Name all units with one scorer, in the run itself and in its controls."""
        run = self.sweep.scored_by(name, scorer)
        shuffled, halves = ([s.scored_by(name, scorer) for s in sweeps] for sweeps in (self.shuffled, self.halves))
        run.name()
        for control in shuffled:
            control.twin = run.twin
        for other in (*shuffled, *halves):
            other.explain(run.manifest)
            other.neurons()
        return Runs(run, shuffled, halves)

    def _judged(self, runs: dict[str, Runs]) -> Folder:
        config, first = self.sweep.config, next(iter(runs.values())).run
        named = {scorer: found.named() for scorer, found in runs.items()}
        truth = planted_units(config.world, config.target.checkpoint)
        read = ("activations", "image_embeddings", "vocabulary")
        payload: dict[str, Any] = {stage: first.hash(stage) for stage in read}
        payload |= {"named": {scorer: n.identity() for scorer, n in named.items()}}
        payload |= {"planted": truth and fingerprint({"rows": truth.to_pylist()}), "annotations": self.annotations}
        manifest = Run(f"{config.run}-benchmark", config.store, asdict(config))
        folder = manifest.plan("benchmark", payload, 1, ("torch", "numpy"))
        manifest.save()
        job = BenchmarkJob(
            folder,
            first.images,
            **{stage: first.folder(stage) for stage in read},
            blocks=first.blocks,
            clip=config.clip,
            threads=config.cluster.threads,
            named=named,
            class_names=first.target.class_names or [],
            planted=truth,
            annotations=self.annotations,
        )
        run_stage(Work(folder, "tasks.benchmark:BenchmarkWorker", job, 1, 1, "benchmark", False), config.cluster)
        return folder


def scorer_settings(spec: str, keep: int) -> ScorerSettings:
    """From name:key=value:key=value. Raises ValueError naming what is wrong."""
    name, *pairs = spec.split(":")
    params: dict[str, Any] = {}
    for key, _, value in (pair.partition("=") for pair in pairs):
        try:
            params[key] = int(value) if value.isdigit() else float(value)
        except ValueError:
            raise ValueError(f"scorers={spec}: {key}={value}: expected a number") from None
    return ScorerSettings(name, params, keep)


def planted_units(world: str, checkpoint: str | None) -> pa.Table | None:
    """The truth about the target's units where it is a trained net of the drawn world in that folder."""
    path = Path(checkpoint or "")
    if path.parent != Path(world):
        return None
    return pq.read_table(f"{world}/planted.parquet", filters=[("net", "==", path.stem)])


def tables(figures: list[dict[str, Any]]) -> list[str]:
    """One table per benchmark: a line per subject and measure, a column per scorer, 95 % intervals in the Parquet."""
    lines = []
    scorers = [*dict.fromkeys(f["scorer"] for f in figures if f["scorer"] != NO_SCORER)]
    for benchmark in dict.fromkeys(f["benchmark"] for f in figures):
        found = [f for f in figures if f["benchmark"] == benchmark]
        cells: dict[str, dict[str, str]] = {}
        for f in found:
            cells.setdefault(f"{f['subject']}: {f['measure']}", {})[f["scorer"]] = f"{f['value']:.3f}"
        width = max(map(len, cells))
        own = [s for s in scorers if any(s in row for row in cells.values())] or [NO_SCORER]
        lines += [f"{benchmark:<{width}}  " + "  ".join(f"{s:>7}" for s in own)]
        for subject, row in cells.items():
            shown = own if row.keys() & set(own) else list(row)
            texts = [f"{row.get(s, ''):>{max(len(s), 7)}}" for s in shown]
            lines.append(f"{subject:<{width}}  " + "  ".join(texts).rstrip())
        lines.append("")
    return lines


def tradeoff(figures: list[dict[str, Any]]) -> str | None:
    """SVG: every scorer by how it names the final layer, and how its names follow hidden units; None without both."""
    first = {f["scorer"]: f for f in figures if (f["subject"], f["measure"]) == ("classes", "first")}
    follows = {f["scorer"]: f for f in figures if (f["subject"], f["measure"]) == ("hidden", "correlation")}
    points = [
        Point(first[s]["value"], f["value"], s.replace("_", " "), f["lower"], f["upper"], s == ScorerSettings().name)
        for s, f in follows.items()
        if s in first
    ]
    if not points:
        return None
    x = Axis(
        "final units whose own class name comes first",
        0,
        min(1, 1.15 * max(max(p.x for p in points), 1e-3)),
        percent=True,
    )
    y = Axis("held-out correlation of hidden units' names", 0, 1.15 * max(max(p.upper or p.y for p in points), 1e-3))
    return chart(f"{len(points)} scorers, {next(iter(follows.values()))['units']:,} hidden units", x, y, points)


if __name__ == "__main__":
    from flows.cli import run_flow

    sys.exit(run_flow(main, sys.argv[1:]))
