"""Stage neurons: exactly one row for every unit of every chosen layer; what people read.

In: explanations, validation, unit_stats, the validation of the randomly initialised twin where there is one. Out: the
neurons table with phrase, confidence, bar, q value and status.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from tasks.layers import Block
from tasks.store import Folder, PartReport
from tasks.tables import make_table

STATUSES = ("explained", "ambiguous", "unexplained", "dead", "always_on", "special_token_only")
RECTIFIED = -0.376
"""Lowest value of the usual activation functions (hardswish -0.375, SiLU -0.278, GELU -0.170, ReLU 0)."""
SPECIAL = 0.05
"""A unit belongs to the special tokens if on patches it never reaches this share of its peak on prefix tokens."""
ALWAYS = 0.5
"""A unit is always on if it is above zero everywhere and never falls below this share of its largest activation."""


@dataclass
class NeuronsSettings:
    q: float = 0.05
    """False discovery rate below which a name counts as supported."""
    min_correlation: float = 0.05
    """The lower end of the interval must lie above this to be called explained."""
    twin: bool = False
    """Measure the bar on the same architecture with random weights, which costs as much again; else min_correlation is
    the bar."""
    twin_quantile: float = 0.98
    """The bar of a layer is this quantile of the twin's confidence there, or min_correlation if that is more."""
    rival_gain: float = 2.0
    """A rival concept that does better on select by more standard errors than this makes the name ambiguous."""

    def __post_init__(self) -> None:
        if not 0 < self.q < 1:
            raise ValueError(f"neurons.q={self.q}: must lie between 0 and 1")
        if not 0 <= self.twin_quantile <= 1:
            raise ValueError(f"neurons.twin_quantile={self.twin_quantile}: must lie between 0 and 1")


@dataclass
class NeuronsJob:
    out: Folder
    exemplars: Folder
    explanations: Folder
    validation: Folder
    twin: Folder | None
    """Validation of the randomly initialised twin."""
    blocks: list[Block]
    settings: NeuronsSettings


class NeuronsWorker:
    """Joins what the other stages found about one unit block."""

    def __init__(self, job: NeuronsJob) -> None:
        self.job = job

    @cached_property
    def q_values(self) -> np.ndarray:
        """Of all units of the run, in block order."""
        return benjamini_hochberg(self.job.validation.read_all("validation", columns=["p"])["p"].to_numpy())

    @cached_property
    def lows(self) -> dict[str, float]:
        """Smallest activation at any position, by layer."""
        stats = self.job.exemplars.read_all("unit_stats", columns=["layer", "low"])
        found = stats.group_by("layer").aggregate([("low", "min")])
        return dict(zip(found["layer"].to_pylist(), found["low_min"].to_pylist(), strict=True))

    @cached_property
    def bars(self) -> dict[str, float]:
        """What a name's interval must exceed, by layer."""
        job, least = self.job, self.job.settings.min_correlation
        twin = job.twin and job.twin.read_all("validation", columns=["layer", "correlation"])
        chance = by_chance(twin, job.settings.twin_quantile) if twin else {}
        return {block.layer: max(least, chance.get(block.layer, least)) for block in job.blocks}

    def run(self, part: int) -> PartReport:
        report, job, block = PartReport(part), self.job, self.job.blocks[part]
        with report.phase("read"):
            stats = job.exemplars.read("unit_stats", part)
            explanations = job.explanations.read("explanations", part)
            validation = job.validation.read("validation", part)
            start = sum(len(b) for b in job.blocks[:part])
            q = self.q_values[start : start + len(block)]
        with report.phase("compute"):
            off = unit_state(stats, rectified=self.lows[block.layer] >= RECTIFIED)
            bar = self.bars[block.layer]
            status = decide(off, validation, q, replace(job.settings, min_correlation=bar))
            table = _neurons(explanations, validation, q, bar, status)
        with report.phase("write"):
            job.out.write(part, {"neurons": table})
        report.rows = {"neurons": table.num_rows} | {
            s: int((status == s).sum()) for s in STATUSES if (status == s).any()
        }
        return report


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """q values (Benjamini and Hochberg 1995): smallest false discovery rate at which each is found; NaN stays NaN."""
    q = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    raw = p[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum.accumulate(raw[::-1])[::-1].clip(max=1)
    return q


def unit_state(stats: pa.Table, rectified: bool) -> np.ndarray:
    """'' for a unit that answers to images, else dead, always_on or special_token_only.

    dead: the same activation whatever the image; behind a rectifying function also a unit that never gets above zero.
    """
    maximum, minimum = stats["maximum"].to_numpy(), stats["minimum"].to_numpy()
    prefix = stats["prefix_maximum"].to_numpy(zero_copy_only=False).astype(np.float32)  # null becomes NaN
    spread = maximum - minimum
    dead = (spread <= 1e-6 * np.maximum(np.abs(maximum), np.abs(minimum))) | ~np.isfinite(spread)
    if rectified:
        dead |= np.maximum(maximum, np.nan_to_num(prefix, nan=-np.inf)) <= 0
    special = (prefix > 0) & (maximum <= SPECIAL * prefix)
    always = (stats["low"].to_numpy() > 0) & (minimum >= ALWAYS * maximum)
    return np.select([special & ~(dead & (prefix <= 0)), dead, always], ["special_token_only", "dead", "always_on"], "")


def by_chance(twin: pa.Table, quantile: float) -> dict[str, float]:
    """That quantile of the twin's known correlations in each layer; no entry for a layer that has none."""
    known: dict[str, list[float]] = {}
    for layer, correlation in zip(twin["layer"].to_pylist(), twin["correlation"].to_pylist(), strict=True):
        if correlation is not None:
            known.setdefault(layer, []).append(correlation)
    return {layer: float(np.quantile(values, quantile)) for layer, values in known.items()}


def decide(off: np.ndarray, validation: pa.Table, q: np.ndarray, settings: NeuronsSettings) -> np.ndarray:
    """Status of each unit: held-out evidence decides between explained, ambiguous and unexplained."""
    lower, gain = (validation[c].to_numpy(zero_copy_only=False).astype(np.float32) for c in ("lower", "rival_gain"))
    supported = (np.nan_to_num(q, nan=1) < settings.q) & (np.nan_to_num(lower, nan=-1) > settings.min_correlation)
    rivalled = np.nan_to_num(gain, nan=-np.inf) > settings.rival_gain
    return np.select([off != "", supported & rivalled, supported], [off, "ambiguous", "explained"], "unexplained")


def _neurons(explanations: pa.Table, validation: pa.Table, q: np.ndarray, bar: float, status: np.ndarray) -> pa.Table:
    named = ~np.isin(status, ("dead",))
    phrases = [p if keep else None for p, keep in zip(explanations["phrase"].to_pylist(), named, strict=True)]
    columns = {
        c: explanations[c].combine_chunks() for c in ("layer", "unit", "concepts", "weights", "margin", "exemplars")
    }
    columns |= {"status": status, "phrase": phrases, "q": pa.array(q, pa.float64(), from_pandas=True)}
    columns |= {"bar": [bar] * len(status)}
    columns |= {c: validation[c].combine_chunks() for c in ("lower", "upper")}
    return make_table("neurons", columns | {"confidence": validation["correlation"].combine_chunks()})
