"""Running one stage over its parts: on Ray actors or in this process, same bytes either way.

In: a stage's folder, the import path of its worker, its job and the number of parts. Out: every missing part written; a
line of statistics; StageFailed with the parts that could not be made. The only file that knows Ray.
"""

import gc
import importlib
import logging
import os
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from tasks.store import Folder, PartReport

log = logging.getLogger("axonym")


@dataclass
class Resources:
    """What one worker of a stage needs."""

    num_cpus: float = 1
    num_gpus: float = 0
    memory: int | None = None
    """Bytes that Ray reserves for the worker."""
    workers: int | None = None
    """Workers of the stage; default: as many as fit the cluster's CPUs or GPUs."""
    retries: int = 3
    """How often a part is tried again after its worker died."""


@dataclass
class ClusterSettings:
    ray: bool = True
    """False runs every stage in this process."""
    address: str | None = None
    """Running Ray cluster to join (auto, or ray://host:port); null starts one on this machine."""
    num_cpus: int | None = None
    """CPUs of a Ray started on this machine; default: its cores."""
    threads: int = 1
    """Torch threads of each worker; part of what decides the last bits of every number."""
    default: Resources = field(default_factory=Resources)
    stages: dict[str, Resources] = field(default_factory=dict)
    """Resources by stage, where they differ from the default."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"cluster.threads={self.threads}: must be at least 1")
        if self.address and not self.ray:
            raise ValueError(f"cluster.address={self.address}: needs cluster.ray=true")

    def resources(self, stage: str) -> Resources:
        return self.stages.get(stage, self.default)


class StageFailed(Exception):
    """Some parts could not be made; the message lists them."""


@dataclass
class Work:
    """A stage as the runner sees it."""

    folder: Folder
    worker: str
    """Import path of a class with __init__(job) and run(part) -> PartReport."""
    job: Any
    parts: int
    items: int
    """What the progress bar counts: images, units or concepts."""
    unit: str
    alone: bool = False
    """The stage has one worker unless told otherwise, which is gone when it ends (a vLLM engine and its GPU)."""


class Host:
    """Holds a worker in its process, Ray actor or not, and turns every exception into a report.

    One host serves stage after stage, so that Python's imports are paid once per process and not once per stage.
    """

    def prepare(self, worker: str, job: Any) -> None:
        """Take up another stage; the worker itself is made with its first part, so that its failure is a report too."""
        self.path, self.job, self.worker = worker, job, None
        gc.collect()
        with suppress(OSError):  # Linux: count the peak of memory anew
            Path("/proc/self/clear_refs").write_text("5")

    def run(self, part: int) -> PartReport:
        try:
            if self.worker is None:
                module, _, name = self.path.partition(":")
                self.worker = getattr(importlib.import_module(module), name)(self.job)
            report = self.worker.run(part)
            report.peak_mib = _peak_mib()
            out = self.job.out
            out.store.put_json(f"{out.name}/reports/part-{part:05d}.json", asdict(report))
            return report
        except Exception as error:
            log.exception("%s part %d failed", self.path, part)
            return PartReport(part, error=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


def _peak_mib() -> int:
    """Peak of the resident memory since the stage began; since the process began where Linux does not tell."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def run_stage(work: Work, cluster: ClusterSettings) -> bool:
    """Make the missing parts; True if there were any. Raises StageFailed after all others are done."""
    name = work.folder.stage
    missing = sorted(set(range(work.parts)) - work.folder.done())
    if not missing:
        print(f"{name:<18} done already ({work.parts} parts)", flush=True)
        return False
    start, reports = time.perf_counter(), []
    share = work.items / max(work.parts, 1)
    run = _run_on_ray if cluster.ray else _run_here
    with tqdm(total=work.items, unit=work.unit, desc=name, mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        bar.update(round(share * (work.parts - len(missing))))
        for report in run(work, missing, cluster):
            reports.append(report)
            bar.update(min(round(share), work.items - bar.n))
    print(summary(work, reports, time.perf_counter() - start), flush=True)
    failed = [r for r in reports if r.error]
    if failed:
        lines = "".join(f"\n  part {r.part}: {r.error}" for r in failed[:10])
        raise StageFailed(f"{name}: {len(failed)} of {work.parts} parts failed; run the same command again{lines}")
    return True


def summary(work: Work, reports: list[PartReport], wall: float) -> str:
    """One line: parts, rows, skipped, seconds by phase, peak memory."""
    rows, skipped, seconds = Counter(), Counter(), Counter()
    for report in reports:
        rows.update(report.rows)
        skipped.update(report.skipped)
        seconds.update({phase: round(s, 1) for phase, s in report.seconds.items()})
    good = sum(r.error is None for r in reports)
    text = [f"{work.folder.stage:<18} {good} parts in {wall:.1f} s", ", ".join(f"{n:,} {k}" for k, n in rows.items())]
    text.append("skipped " + ", ".join(f"{n:,} {k}" for k, n in skipped.items()) if skipped else "")
    text.append(" ".join(f"{phase} {s:.1f} s" for phase, s in seconds.items()))
    text.append(f"peak {max((r.peak_mib for r in reports), default=0):,} MiB")
    return " | ".join(t for t in text if t)


def _run_here(work: Work, parts: list[int], cluster: ClusterSettings) -> Iterator[PartReport]:
    host = Host()
    host.prepare(work.worker, work.job)
    for part in parts:
        yield host.run(part)


IDLE: list[tuple[Resources, Any]] = []
"""Ray hosts that wait for the next stage, with the resources that they hold."""


def _run_on_ray(work: Work, parts: list[int], cluster: ClusterSettings) -> Iterator[PartReport]:
    """Parts over a fixed set of actors, one part each at a time; a dead actor is replaced and its part tried again."""
    import ray
    from ray.exceptions import RayActorError

    start_ray(cluster)
    need = cluster.resources(work.folder.stage)
    waiting, tries, running = deque(parts), Counter(), {}
    job = ray.put(work.job)

    def give(actor: Any) -> None:
        part = waiting.popleft()
        running[actor.run.remote(part)] = (actor, part)

    release_hosts(keep=None if work.alone else need)
    for _ in range(min(len(parts), need.workers or (1 if work.alone else _fitting(need)))):
        give(_host(need, work.worker, job))
    while running:
        for ref in ray.wait(list(running), num_returns=1)[0]:
            actor, part = running.pop(ref)
            try:
                yield ray.get(ref)
            except RayActorError as error:
                tries[part] += 1
                log.warning("%s part %d: its worker died (%s)", work.folder.stage, part, type(error).__name__)
                if tries[part] <= need.retries:
                    waiting.append(part)
                else:
                    yield PartReport(part, error=f"its worker died {tries[part]} times: {str(error).splitlines()[0]}")
                actor = _host(need, work.worker, job) if waiting else None
            if waiting:
                give(actor)
            elif actor is not None:
                IDLE.append((need, actor))
    if work.alone:
        release_hosts(keep=None)


def _host(need: Resources, worker: str, job: Any) -> Any:
    """An idle host of these resources, or a new one, prepared for the stage."""
    import ray

    if IDLE:
        actor = IDLE.pop()[1]
    else:
        options = {"num_cpus": need.num_cpus, "num_gpus": need.num_gpus, "memory": need.memory, "max_restarts": 0}
        actor = cast(Any, ray.remote(Host).options(**options).remote())  # its types miss methods
    actor.prepare.remote(worker, job)
    return actor


def release_hosts(keep: Resources | None) -> None:
    """End the idle hosts that hold other resources than `keep`."""
    import ray

    for need, actor in IDLE[:]:
        if need != keep:
            ray.kill(actor)
            IDLE.remove((need, actor))


def start_ray(cluster: ClusterSettings) -> None:
    """Join the cluster, or start one on this machine with its ports on loopback and without the dashboard.

    Raises ValueError naming cluster.address where no cluster answers there.
    """
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if cluster.address:
        try:
            ray.init(address=cluster.address, logging_level=logging.WARNING)
        except (OSError, RuntimeError, ValueError) as error:
            hint = "is Ray running there, with the same RAY_AUTH_MODE and token?"
            raise ValueError(f"cluster.address={cluster.address}: {hint} {' '.join(str(error).split())}") from None
    else:
        ray.init(
            num_cpus=cluster.num_cpus,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            logging_level=logging.WARNING,
        )


def _fitting(need: Resources) -> int:
    import ray

    total = ray.cluster_resources()
    fits = [total.get(kind, 0) / n for kind, n in (("CPU", need.num_cpus), ("GPU", need.num_gpus)) if n]
    count = int(min(fits, default=1))
    if count < 1:
        has = f"it has {total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs"
        raise ValueError(f"cluster: one worker needs {need.num_cpus:g} CPUs and {need.num_gpus:g} GPUs; {has}")
    return count
