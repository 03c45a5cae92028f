"""Names against the truth.

In: the neurons table of a run on one of the world's nets, and the table of planted units. Out: how many planted units
of each kind are named right, with intervals; which are not.

Right is the planted concept or a synonym from the table in concepts.py, which was fixed before any unit was named.
"""

import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tasks.world.concepts import FAMILY, synonyms

OFF = ("dead", "always_on", "special_token_only")
"""Kinds that are right when the status says so; they have no name."""
FIVE = 5


@dataclass
class Verdict:
    """One planted unit and what was said about it."""

    truth: dict[str, Any]
    """Row of the planted table."""
    neuron: dict[str, Any]
    """Row of the neurons table."""
    first: bool
    """The name is right; for units without one the status is."""
    five: bool
    """The best five concepts hold all that the unit was planted with."""


@dataclass
class Score:
    """Planted units of one kind, or of one family of mono units."""

    kind: str
    units: int
    first: int
    five: int
    explained: int

    def text(self) -> str:
        cells = [interval(n, self.units) for n in (self.first, self.five, self.explained)]
        return f"{self.kind:<20} {self.units:>5}   " + "   ".join(f"{cell:<20}" for cell in cells).rstrip()


HEAD = f"{'planted':<20} {'units':>5}   {'right at once':<20}   {'right in five':<20}   explained"


def judge(neurons: pa.Table, planted: pa.Table) -> list[Verdict]:
    """Verdicts in the order of the planted table; planted units that the run did not look at are left out."""
    rows = {(row["layer"], row["unit"]): row for row in neurons.to_pylist()}
    return [_verdict(t, rows[t["layer"], t["unit"]]) for t in planted.to_pylist() if (t["layer"], t["unit"]) in rows]


def _verdict(truth: dict[str, Any], neuron: dict[str, Any]) -> Verdict:
    if truth["kind"] in OFF:
        right = neuron["status"] == truth["kind"]
        return Verdict(truth, neuron, right, right)
    if truth["kind"] == "noise":
        right = neuron["status"] == "unexplained"
        return Verdict(truth, neuron, right, right)
    meanings = [accepted(concept) for concept in truth["concepts"]]
    best = (neuron["concepts"] or [])[:FIVE]
    first = any(neuron["phrase"] in m for m in meanings)
    return Verdict(truth, neuron, first, all(m & set(best) for m in meanings))


def accepted(concept: str) -> set[str]:
    """Phrases that are right for a concept, a compound or an absence."""
    return set(synonyms(concept)) if concept in FAMILY else {concept}


def scores(verdicts: list[Verdict]) -> list[Score]:
    """By kind, mono units by family too."""
    groups: dict[str, list[Verdict]] = {}
    for v in verdicts:
        groups.setdefault(v.truth["kind"], []).append(v)
        if v.truth["kind"] == "mono":
            groups.setdefault(f"  {v.truth['family']}", []).append(v)
    return [
        Score(
            kind,
            len(found),
            sum(v.first for v in found),
            sum(v.five for v in found),
            sum(v.neuron["status"] == "explained" for v in found),
        )
        for kind, found in groups.items()
    ]


def wilson(right: int, of: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z, share = 1.96, right / of
    middle, spread = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(middle - spread, 0) / (1 + z * z / of), (middle + spread) / (1 + z * z / of)


def interval(right: int, of: int) -> str:
    low, high = wilson(right, of)
    return f"{right / of:4.0%} ({low:.0%} to {high:.0%})"
