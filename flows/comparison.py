"""What --multirun ends with: the runs side by side.

In: finished sweeps. Out: one row per run with how much of its units it explains, how sure, with how many names, at what
cost; and, where runs name the same units, how often two of them agree.
"""

from itertools import combinations
from typing import Any

from flows.run import spent
from flows.sweep import Sweep

HEAD = f"{'run':<40} {'concepts':>8} {'explained':>9} {'confidence':>10} {'above null':>10} {'names':>6} {'most':>6}"
HEAD += f" {'tokens':>9} {'worker s':>8}"


def compared(sweeps: list[Sweep]) -> list[str]:
    """The table as lines of text, then the agreement of every two runs over the same units."""
    lines = [HEAD, *map(_line, sweeps)]
    named = {str(sweep.config.run): _names(sweep) for sweep in sweeps}
    pairs = [(a, b) for a, b in combinations(named, 2) if named[a].keys() & named[b].keys()]
    lines += ["", "units that two runs give the same name / that share a concept of their best five"] if pairs else []
    return lines + [_agreement(a, b, named[a], named[b]) for a, b in pairs]


def _line(sweep: Sweep) -> str:
    rows = sweep.folder("coverage").read_all("coverage").to_pylist()
    total = {row["what"]: row for row in rows if row["layer"] is None and row["name"] is None}
    hubs = [row["value"] for row in rows if row["what"] == "hub"]
    answers = [sweep.manifest.folder(key) for key in sweep.manifest.rounds("answers")]
    tokens = sum(sum(f.read_all("answers", columns=["tokens"])["tokens"].to_pylist()) for f in answers)
    seconds = sum(sum(spent(sweep.manifest.folder(key))["seconds"].values()) for key in sweep.manifest.parts)
    return (
        f"{sweep.config.run:<40} {sweep.num_concepts:>8,} {total['explained']['value']:>9.1%}"
        f" {total['confidence']['value']:>10.3f} {total['above the null']['value']:>10.1%}"
        f" {total['distinct names']['units']:>6,} {max(hubs, default=0):>6.1%} {tokens:>9,} {seconds:>8.0f}"
    )


def _names(sweep: Sweep) -> dict[tuple[str, int], dict[str, Any]]:
    rows = sweep.folder("neurons").read_all("neurons", columns=["layer", "unit", "phrase", "concepts"]).to_pylist()
    return {(row["layer"], row["unit"]): row for row in rows if row["phrase"] is not None}


def _agreement(a: str, b: str, of_a: dict, of_b: dict) -> str:
    both = of_a.keys() & of_b.keys()
    same = sum(of_a[unit]["phrase"] == of_b[unit]["phrase"] for unit in both) / len(both)
    share = sum(bool(set(of_a[unit]["concepts"]) & set(of_b[unit]["concepts"])) for unit in both) / len(both)
    return f"{a} | {b}: {same:.1%} / {share:.1%} of {len(both):,}"
