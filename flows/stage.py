"""Running one stage over its parts: on Ray actors or in this process, same bytes either way.

In: a stage's folder, the import path of its worker, its job and the number of parts. Out: every missing part written; a
line of statistics; StageFailed with the parts that could not be made. The only file that knows Ray.
"""

import ctypes
import gc
import importlib
import logging
import os
import re
import secrets
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from flows.resources import ClusterSettings, Resources
from tasks.store import Folder, PartReport, peak_mib

log = logging.getLogger("axonym")


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

    def __init__(self, own_process: bool) -> None:
        environment()  # on other nodes of a cluster the processes have no part in the driver's
        self.own_process = own_process

    def prepare(self, worker: str, job: Any) -> None:
        """Take up another stage; the worker itself is made with its first part, so that its failure is a report too."""
        self.path, self.job, self.worker = worker, job, None
        gc.collect()
        if self.own_process:  # libraries stay: to look at their objects again takes 0.3 s a stage
            gc.freeze()
        with suppress(AttributeError, OSError):  # glibc keeps gigabytes of freed tensors until it is asked for them
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):  # Linux: count the peak of memory anew
            Path("/proc/self/clear_refs").write_text("5")

    def run(self, part: int) -> PartReport:
        try:
            if self.worker is None:
                module, _, name = self.path.partition(":")
                self.worker = getattr(importlib.import_module(module), name)(self.job)
            report = self.worker.run(part)
            report.peak_mib = peak_mib()
            out = self.job.out
            out.store.put_json(f"{out.name}/reports/part-{part:05d}.json", asdict(report))
            return report
        except Exception as error:
            reason, refused = " ".join(str(error).split())[:500], type(error) is ValueError
            if refused and not os.environ.get("AXONYM_TRACEBACK"):
                return PartReport(part, error=reason, refused=True)
            log.exception("%s part %d failed", self.path, part)
            return PartReport(part, error=f"{type(error).__name__}: {reason}", refused=refused)


def environment() -> None:
    """Defaults that must be in the environment before libraries are imported; what the user has set stays."""
    # S3 servers other than Amazon's often refuse the checksums that newer clients add.
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run_stage(work: Work, cluster: ClusterSettings) -> bool:
    """Make the missing parts; True if there were any. Raises StageFailed after all others are done, and ValueError
    where all that failed is the user's to mend."""
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
    if failed and all(r.refused for r in failed):
        raise ValueError(failed[0].error)
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
    host = Host(own_process=False)
    host.prepare(work.worker, work.job)
    for part in parts:
        yield host.run(part)


IDLE: list[tuple[Resources, Any]] = []
"""Ray hosts that wait for the next stage, with the resources that they hold; those without a place yet come first."""


def _run_on_ray(work: Work, parts: list[int], cluster: ClusterSettings) -> Iterator[PartReport]:
    """Parts over a set of actors, one part each at a time; a dead actor is replaced and its part tried again.

    Only an actor that has a place gets a part. So where a node has died or is still to come, the others go on with
    everything; and the actors without a place are what makes an autoscaling cluster grow.
    """
    import ray
    from ray.exceptions import RayActorError

    start_ray(cluster)
    stage, need = work.folder.stage, cluster.resources(work.folder.stage)
    waiting, tries, job = deque(parts), Counter(), ray.put(work.job)
    hired: dict[Any, Any] = {}  # actors without a place yet, by what tells that they have one
    running: dict[Any, tuple[Any, int]] = {}  # actors and their parts, by the report that is awaited
    release_hosts(keep=None if work.alone else need)
    workers = need.workers or (1 if work.alone else cluster.default.workers or max(_fitting(need), 1))
    workers = min(len(parts), workers)
    spare, reason = len(IDLE) + need.retries * workers, ""  # how many may be found dead before they had a part
    for _ in range(workers):
        _hire(hired, need, work.worker, job)
    since, told = time.monotonic(), False
    try:
        while waiting or running:
            if not hired and not running:
                yield from (PartReport(part, error=f"no worker could be started: {reason}") for part in waiting)
                return
            done = ray.wait([*running, *hired], num_returns=1, timeout=1)[0]
            if done or running:
                since, told = time.monotonic(), False
            else:
                told = _check_room(stage, need, cluster.wait, time.monotonic() - since, told)
            for ref in done:
                actor, part = running.pop(ref) if ref in running else (hired.pop(ref), None)
                try:
                    report = ray.get(ref)
                except RayActorError as error:
                    reason = str(error).splitlines()[0]
                    at = "before its first part" if part is None else f"at part {part}"
                    log.warning("%s: a worker died %s (%s)", stage, at, type(error).__name__)
                    ray.kill(actor)  # perhaps it is only out of reach
                    tries[part] += 1
                    if part is None:
                        spare -= 1
                    elif tries[part] <= need.retries:
                        waiting.append(part)
                    else:
                        yield PartReport(part, error=f"its worker died {tries[part]} times: {reason}")
                    if waiting and spare >= 0:
                        _hire(hired, need, work.worker, job)
                    continue
                if part is not None:
                    yield report
                if waiting:
                    part = waiting.popleft()
                    running[actor.run.remote(part)] = (actor, part)
                else:
                    IDLE.append((need, actor))
    finally:
        IDLE[:0] = [(need, actor) for actor in hired.values()]
        for actor, _ in running.values():  # only where the stage was broken off
            ray.kill(actor)
        if work.alone:
            release_hosts(keep=None)


def _hire(hired: dict[Any, Any], need: Resources, worker: str, job: Any) -> None:
    """Prepare an idle host of these resources, or a new one, for the stage."""
    import ray

    if IDLE:
        actor = IDLE.pop()[1]
    else:
        options = {"num_cpus": need.num_cpus, "num_gpus": need.num_gpus, "memory": need.memory, "max_restarts": 0}
        actor = cast(Any, ray.remote(Host).options(**options).remote(own_process=True))  # its types miss methods
    hired[actor.prepare.remote(worker, job)] = actor


def release_hosts(keep: Resources | None) -> None:
    """End the idle hosts that hold other resources than `keep`."""
    import ray

    for need, actor in IDLE[:]:
        if need != keep:
            ray.kill(actor)
            IDLE.remove((need, actor))


def start_ray(cluster: ClusterSettings) -> None:
    """Join the cluster, or start one on this machine, which takes calls with a token of its own and has no dashboard.

    Raises ValueError naming cluster.address where no cluster answers there.
    """
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if cluster.address:
        try:
            if place := re.fullmatch(r"(?:ray://)?(.+):(\d+)", cluster.address):  # Ray itself waits for minutes
                socket.create_connection((place[1].strip("[]"), int(place[2])), timeout=5).close()
            ray.init(address=cluster.address, logging_level=logging.WARNING)
        except (OSError, OverflowError, RuntimeError, ValueError, RayError) as error:
            hint = "is Ray running there, with the same RAY_AUTH_MODE and token?"
            raise ValueError(f"cluster.address={cluster.address}: {hint} {' '.join(str(error).split())}") from None
    else:
        _make_token()
        where = "local"  # not what RAY_ADDRESS names
        ray.init(where, num_cpus=cluster.num_cpus, include_dashboard=False, logging_level=logging.WARNING)


def _make_token() -> None:
    """Ray listens on every address of the machine, whatever it is told (tried with 2.58): without a token whoever
    reaches it runs what he likes. What the user has set stays."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from ray import _raylet

    cast(Any, _raylet).Config.initialize("")  # it read the environment when it was imported


def _check_room(stage: str, need: Resources, patience: float, waited: float, told: bool) -> bool:
    """Say once in a log line why a stage has no worker yet; True if that has been said.

    Raises ValueError where for longer than `patience` seconds no node could hold a worker.
    """
    import ray

    lack = "the nodes that could hold one are busy"
    if not _fitting(need):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        has = ", ".join(sorted({f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes}))
        lack = f"one worker needs {need.num_cpus:g} CPUs and {need.num_gpus:g} GPUs"
        lack += f" and {need.memory:,} bytes" if need.memory else ""
        lack += f"; the nodes there are have {has}"
        if waited > patience:
            hint = "; without GPUs choose cluster=local" if need.num_gpus else ""
            raise ValueError(f"cluster: {stage}: {lack}{hint}")
    if not told and waited > 30:
        log.warning("%s: waits for a place for its first worker: %s", stage, lack)
    return told or waited > 30


def _fitting(need: Resources) -> int:
    """Workers that the nodes of the cluster, as it is now, can hold."""
    import ray

    asked = {"CPU": need.num_cpus, "GPU": need.num_gpus, "memory": need.memory or 0}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min((int(node.get(kind, 0) / n) for kind, n in asked.items() if n), default=1) for node in nodes)
