"""Stage neurons: exactly one row for every unit of every chosen layer; what people read.

In: explanations, validation, unit_stats; of the randomly initialised twin, where there is one, the first two, and what
chance reaches. Out: the neurons table with phrase, confidence, bar, q value and status.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.calibration import SHIPPED, Calibration, evidence, load
from tasks.layers import Block
from tasks.signs import rectified
from tasks.store import Folder, PartReport
from tasks.tables import make_table

STATUSES = ("explained", "ambiguous", "unexplained", "dead", "always_on", "special_token_only")
SPECIAL = 0.05
"""A unit belongs to the special tokens if on patches it never reaches this share of its peak on prefix tokens."""
LARGEST = 0.999
"""Correlations that chance reaches are taken for no more: beyond, Fisher's scale has no end."""
ALWAYS = 0.5
"""A unit is always on if it is above zero everywhere and never falls below this share of its largest activation."""


@dataclass
class NeuronsSettings:
    q: float = 0.05
    """False discovery rate below which a name counts as supported."""
    min_correlation: float = 0.05
    """The lower end of the interval must lie above this to be called explained."""
    twin: bool = False
    """Measure the bar on the same architecture with random weights, which costs as much again and a fifth for each
    further net of twin_nets; else min_correlation is the bar."""
    twin_nets: int = 8
    """Random nets that tell what chance reaches with a concept; all but the first see the validate images only."""
    twin_quantile: float = 0.98
    """The bar of a name is what this share of a random net's units of the layer stays below."""
    twin_confidence: float = 0.99
    """And a random net that was not looked at keeps below it with this probability."""
    rival_gain: float = 2.0
    """A rival concept that does better on select by more standard errors than this makes the name ambiguous."""
    calibration: str | None = str(SHIPPED)
    """File from which the probability of a name comes, as `axonym calibrate` writes it; null for none."""

    def __post_init__(self) -> None:
        if not 0 < self.q < 1:
            raise ValueError(f"neurons.q={self.q}: must lie between 0 and 1")
        if not 0 < self.min_correlation < 1:
            raise ValueError(f"neurons.min_correlation={self.min_correlation}: must lie between 0 and 1")
        if not self.rival_gain >= 0:
            raise ValueError(f"neurons.rival_gain={self.rival_gain}: must be at least 0")
        if self.twin_nets < 3:
            raise ValueError(
                f"neurons.twin_nets={self.twin_nets}: must be at least 3, fewer do not tell how nets differ"
            )
        if not 0 <= self.twin_quantile <= 1:
            raise ValueError(f"neurons.twin_quantile={self.twin_quantile}: must lie between 0 and 1")
        if not 0.5 <= self.twin_confidence < 1:
            raise ValueError(f"neurons.twin_confidence={self.twin_confidence}: must be at least 0.5 and below 1")
        if self.calibration is not None:
            load(self.calibration, "")


@dataclass
class NeuronsJob:
    out: Folder
    exemplars: Folder
    explanations: Folder
    validation: Folder
    blocks: list[Block]
    settings: NeuronsSettings
    calibration: Calibration | None = None
    """None where it is of another scorer."""
    twin: Folder | None = None
    """Validation of the randomly initialised twin."""
    twin_names: Folder | None = None
    """Its explanations."""
    chance: Folder | None = None
    """What random nets reach with each concept."""


class NeuronsWorker:
    """Joins what the other stages found about one unit block."""

    def __init__(self, job: NeuronsJob) -> None:
        self.job = job

    @cached_property
    def q_values(self) -> np.ndarray:
        """Of all units of the run, in block order."""
        return benjamini_hochberg(self.job.validation.read_all("validation", columns=["p"])["p"].to_numpy())

    @cached_property
    def rectified(self) -> dict[str, bool]:
        return rectified(self.job.exemplars)

    @cached_property
    def reached(self) -> tuple[pa.Table | None, np.ndarray]:
        """What chance reaches, as `predicted`, None without a twin; how many times that the name of an even and of an
        odd unit must reach.

        Where the twin itself is judged, as a control, nothing may be known of what is judged: its own values are not
        among the nets, and each half of its units is held to what the names of the other half reach.
        """
        job, settings = self.job, self.job.settings
        if job.twin is None or job.twin_names is None or job.chance is None:
            return None, np.ones(2)
        nets = [job.chance.read("chance", part) for part in sorted(job.chance.done())]
        others = predicted(nets[1:], settings.twin_confidence)  # the first net is the twin, whose names are judged here
        found = job.twin_names.read_all("explanations", columns=["layer", "unit", "phrase"])
        chance = chance_of(others, found["layer"], found["phrase"]).clip(settings.min_correlation, LARGEST)
        correlation = job.twin.read_all("validation", columns=["correlation"])["correlation"].to_numpy()
        ratios = np.arctanh(correlation.astype(np.float64)) / np.arctanh(chance)
        odd = found["unit"].to_numpy() % 2 == 1
        if job.twin == job.validation:
            return others, np.array([times(ratios[half], settings.twin_quantile) for half in (odd, ~odd)])
        both = times(ratios, settings.twin_quantile)
        return predicted(nets, settings.twin_confidence), np.array([both, both])

    def bars(self, layers: pa.ChunkedArray, units: pa.ChunkedArray, names: pa.ChunkedArray) -> np.ndarray:
        """What the interval of each name must exceed: min_correlation, or where the twin knows better, more.

        A concept has its own: random units follow a snowy ground closely and a star hardly at all. The best of many
        concepts was chosen for a name, so it must exceed its concept's chance as many times as the twin's own names
        exceed what the other nets tell of theirs, on Fisher's scale (atanh), which ends at no correlation.
        """
        (reached, factors), least = self.reached, self.job.settings.min_correlation
        chance = np.zeros(len(names)) if reached is None else chance_of(reached, layers, names)
        return np.tanh(np.arctanh(chance.clip(least, LARGEST)) * factors[units.to_numpy() % 2]).astype(np.float32)

    def run(self, part: int) -> PartReport:
        report, job, block = PartReport(part), self.job, self.job.blocks[part]
        with report.phase("read"):
            stats = job.exemplars.read("unit_stats", part)
            explanations = job.explanations.read("explanations", part)
            validation = job.validation.read("validation", part)
            start = sum(len(b) for b in job.blocks[:part])
            q = self.q_values[start : start + len(block)]
        with report.phase("compute"):
            off = unit_state(stats, rectified=self.rectified[block.layer])
            bar = self.bars(*(explanations[c] for c in ("layer", "unit", "phrase")))
            status = decide(off, validation, q, bar, job.settings)
            table = _neurons(explanations, validation, q, bar, status, self.job.calibration)
        with report.phase("write"):
            job.out.write(part, {"neurons": table})
        report.rows = {"neurons": table.num_rows} | {
            s: int((status == s).sum()) for s in STATUSES if (status == s).any()
        }
        return report


def times(ratios: np.ndarray, quantile: float) -> float:
    """How many times what chance reaches this share of names stays below, at least once; not finite ones left out."""
    known = ratios[np.isfinite(ratios)]
    return max(1.0, float(np.quantile(known, quantile))) if len(known) else 1.0


def predicted(nets: list[pa.Table], confidence: float) -> pa.Table:
    """By layer and concept, in column upper, what one more random net stays below with this probability.

    The upper end of a prediction interval, mean + t s sqrt(1 + 1/n), over the nets' values on Fisher's scale: one net
    follows blue closely, the next one hardly at all, and the largest of n is exceeded by every (n + 1)th.
    """
    from scipy.special import stdtrit  # Student's t; here, because only runs with a twin need it

    rows = pa.concat_tables(nets)
    z = pa.array(
        np.arctanh(rows["correlation"].to_numpy().astype(np.float64).clip(-LARGEST, LARGEST)), from_pandas=True
    )
    groups = rows.select(["layer", "concept"]).append_column("z", z).group_by(["layer", "concept"], use_threads=False)
    found = groups.aggregate([("z", "mean"), ("z", "stddev", pc.VarianceOptions(ddof=1)), ("z", "count")])
    mean, spread = (found[c].to_numpy(zero_copy_only=False).astype(np.float64) for c in ("z_mean", "z_stddev"))
    count = found["z_count"].to_numpy()
    beyond = np.where(
        count > 1, stdtrit(np.maximum(count - 1, 1), confidence) * spread * np.sqrt(1 + 1 / count.clip(1)), 0
    )
    return found.append_column("upper", pa.array(np.nan_to_num(np.tanh(mean + beyond))))


def chance_of(reached: pa.Table, layers: pa.ChunkedArray, names: pa.ChunkedArray) -> np.ndarray:
    """float64, what chance reaches with each name in its layer; 0 where nothing is known of it."""

    def pairs(of: pa.ChunkedArray, concepts: pa.ChunkedArray) -> pa.Array:
        return pc.call_function("binary_join_element_wise", [of, concepts, "\n"])

    known = pairs(reached["layer"], reached["concept"])
    place = pc.call_function("index_in", [pairs(layers, names)], pc.SetLookupOptions(known)).fill_null(len(known))
    return np.append(reached["upper"].to_numpy(), 0.0)[place.to_numpy()]


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


def decide(
    off: np.ndarray, validation: pa.Table, q: np.ndarray, bar: np.ndarray, settings: NeuronsSettings
) -> np.ndarray:
    """Status of each unit: held-out evidence decides between explained, ambiguous and unexplained."""
    lower, gain = (validation[c].to_numpy(zero_copy_only=False).astype(np.float32) for c in ("lower", "rival_gain"))
    supported = (np.nan_to_num(q, nan=1) < settings.q) & (np.nan_to_num(lower, nan=-1) > bar)
    rivalled = np.nan_to_num(gain, nan=-np.inf) > settings.rival_gain
    return np.select([off != "", supported & rivalled, supported], [off, "ambiguous", "explained"], "unexplained")


def _neurons(
    explanations: pa.Table,
    validation: pa.Table,
    q: np.ndarray,
    bar: np.ndarray,
    status: np.ndarray,
    calibration: Calibration | None,
) -> pa.Table:
    named = pa.array(status != "dead")

    def alive(column: pa.ChunkedArray) -> pa.Array:
        return pc.call_function("if_else", [named, column.combine_chunks(), pa.scalar(None, column.type)])

    columns = {
        c: explanations[c].combine_chunks()
        for c in ("layer", "unit", "concepts", "weights", "margin", "meanings", "shares", "exemplars")
    }
    columns |= {c: alive(explanations[c]) for c in ("phrase", "negative")}
    columns["negative_confidence"] = alive(validation["negative_confidence"])
    columns |= {"status": status, "q": pa.array(q, pa.float64(), from_pandas=True), "bar": bar}
    columns |= {c: validation[c].combine_chunks() for c in ("lower", "upper")}
    unknown = np.full(len(status), np.nan)
    probability = calibration.probability(evidence(explanations, validation)) if calibration else unknown
    says = np.isin(status, ("explained", "ambiguous", "unexplained"))
    columns["probability"] = pa.array(np.where(says, probability, np.nan), pa.float32(), from_pandas=True)
    return make_table("neurons", columns | {"confidence": validation["correlation"].combine_chunks()})
