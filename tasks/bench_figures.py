"""Figures of `axonym bench`: runs timed in turn, their ratios and the targets for them.

In: functions that report seconds. Out: one Figure per ratio; names of the machine and of the versions.
"""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

AT_LEAST = {"collection": 0.95, "collection, files": 0.85, "embedding": 0.90, "workers": 1.8, "sweep": 0.80}
AT_MOST = {"bytes": 1.0, "memory": 1.05, "memory, GPU": 1.05, "time, images": 2.05, "time, units": 1.10}
"""Targets of the figures."""
ONLY = {"collection": "cpu", "collection, files": "cuda"}
"""Targets that are set for one device."""


def has_cuda() -> bool:
    return torch.cuda.is_available()


@dataclass
class Figure:
    name: str
    value: float
    low: float
    high: float
    """Least and largest of the pairs."""
    target: float
    """NaN where there is none."""
    at_least: bool
    """Whether the value should reach the target, or stay below it."""
    base: float
    ours: float
    """What the value is the ratio of, medians: seconds, MiB or bytes."""
    pairs: int
    model: str
    what: str
    size: float | None = None
    """Of a point of a cost curve: images, units, concepts or workers."""

    @property
    def met(self) -> bool | None:
        """None where there is no target."""
        if np.isnan(self.target):
            return None
        return bool(self.value >= self.target if self.at_least else self.value <= self.target)


def in_turn(runs: list[Callable[[], dict[str, float]]], pairs: int, warm: int = 0) -> dict[str, np.ndarray]:
    """Seconds that each run reports, by name, `pairs` times each: in order, then in reverse, and so on, so that what
    drifts or disturbs meets all alike. Before that each but the first `warm` runs once and counts for nothing."""
    found: dict[str, list[float]] = {}
    for run in runs[warm:]:
        run()
    for number in range(pairs):
        for run in runs[:: -1 if number % 2 else 1]:
            for name, seconds in run().items():
                found.setdefault(name, []).append(seconds)
    return {name: np.array(seconds) for name, seconds in found.items()}


def figure(
    device: str, name: str, over: np.ndarray, under: np.ndarray, model: str, what: str, scale: float = 1
) -> Figure:
    """Median of scale * over / under, pair by pair, with the least and the largest, beside its target."""
    ratios = scale * over / under
    spread = float(np.median(ratios)), float(ratios.min()), float(ratios.max())
    goal = (AT_LEAST | AT_MOST).get(name, np.nan) if ONLY.get(name, device) == device else np.nan
    medians = float(np.median(over)), float(np.median(under))
    return Figure(name, *spread, goal, name not in AT_MOST, *medians, len(ratios), model, what)


def timed(name: str, call: Callable[[], Any]) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        start = time.perf_counter()
        call()
        if has_cuda():
            torch.cuda.synchronize()
        return {name: time.perf_counter() - start}

    return run


def named(kind: str, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    return {f"{kind} {name}": seconds for name, seconds in run().items()}


def hardware(device: str) -> str:
    """Name of the GPU, or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs"


def versions() -> str:
    names = ("torch", "torchvision", "timm", "pyarrow", "numpy", "pillow")
    return ", ".join([f"python {platform.python_version()}", *(f"{n} {metadata.version(n)}" for n in names)])
