"""Stage coverage: how well the vocabulary serves the units.

In: neurons, scores, explanations, validation and the vocabulary of a run; the validation of the same units named from
another word list, where it is wanted. Out: the coverage table, one row per figure. Part 0 is the only one.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from tasks.forward import worker_device
from tasks.store import Folder, PartReport
from tasks.tables import make_table, matrix

ABOVE = 1.645
"""Standard errors above random crops from which a concept is above the null: 95 %, one-sided."""
HUBS = 20
"""Names listed that most units have."""
ALIKE, PAIRS = 0.9, 50
"""Cosine of text vectors from which two concepts are near-duplicates, and how many pairs are listed."""
BLOCK = 1024
"""Concepts compared with all others at once."""
NAMED = ("explained", "ambiguous", "unexplained")


@dataclass
class CoverageJob:
    out: Folder
    neurons: Folder
    scores: Folder
    explanations: Folder
    validation: Folder
    vocabulary: Folder
    threads: int
    answers: list[Folder] = field(default_factory=list)
    """Of all rounds, for what the prompts asked; none for word lists."""
    against: Folder | None = None
    """Validation of the same units with the names of another word list."""


class Figure(NamedTuple):
    """A row of the coverage table."""

    what: str
    layer: str | None
    name: str | None
    value: float
    units: int


class CoverageWorker:
    """Counts over all units of a run."""

    def __init__(self, job: CoverageJob) -> None:
        self.job = job
        worker_device(job.threads)

    def run(self, part: int) -> PartReport:
        report, job = PartReport(part), self.job
        with report.phase("read"):
            units = self._units()
            concepts = job.vocabulary.read_all("concepts").to_pylist()
            asked = [f.read_all("answers", columns=["prompt_id", "prompt"]).to_pylist() for f in job.answers]
            prompts = {
                r["prompt_id"]: f"{r['prompt'].splitlines()[-1]} ({r['prompt_id']})" for rows in asked for r in rows
            }
            vectors = matrix(job.vocabulary.read_all("concept_embeddings")["embedding"])
        with report.phase("compute"):
            rows = [*by_layer(units), *by_concept(units, concepts, prompts), *near_duplicates(concepts, vectors)]
        table = make_table("coverage", {c: [getattr(row, c) for row in rows] for c in Figure._fields})
        with report.phase("write"):
            job.out.write(part, {"coverage": table})
        report.rows = {"coverage": table.num_rows}
        return report

    def _units(self) -> list[dict[str, Any]]:
        """What is known of every unit that has a name."""
        job = self.job
        units = job.neurons.read_all("neurons", columns=["layer", "unit", "status", "phrase", "confidence"]).to_pylist()
        rounds = job.explanations.read_all("explanations", columns=["round"])["round"].to_pylist()
        scores = job.scores.read_all("scores", columns=["concept", "null_z"])
        concepts, z = (scores[c].to_numpy().reshape(len(units), -1) for c in ("concept", "null_z"))  # as many a unit
        is_name = concepts == np.array([[unit["phrase"]] for unit in units], object)
        of_name = z[np.arange(len(units)), is_name.argmax(1)].astype(object)
        of_name[~is_name.any(1)] = None
        against = [None] * len(units)
        if job.against is not None:
            against = job.against.read_all("validation", columns=["correlation"])["correlation"].to_pylist()
        for unit, number, other, own in zip(units, rounds, against, of_name, strict=True):
            unit |= {"round": number, "against": other, "z": own}
        return [unit for unit in units if unit["status"] in NAMED and unit["phrase"] is not None]


def by_layer(units: list[dict[str, Any]]) -> Iterator[Figure]:
    """Figures of every layer, and of all together (layer null)."""
    groups: dict[str | None, list[dict[str, Any]]] = {None: units}
    for unit in units:
        groups.setdefault(unit["layer"], []).append(unit)
    for layer, members in groups.items():
        known = [u for u in members if u["z"] is not None]
        yield Figure("above the null", layer, None, _mean([u["z"] > ABOVE for u in known]), len(known))
        yield Figure("explained", layer, None, _mean([u["status"] == "explained" for u in members]), len(members))
        names = {u["phrase"] for u in members}
        yield Figure("distinct names", layer, None, len(names) / max(len(members), 1), len(names))
        held = [u["confidence"] for u in members if u["confidence"] is not None]
        yield Figure("confidence", layer, None, _mean(held), len(held))
        gains = [u["confidence"] - u["against"] for u in members if None not in (u["confidence"], u["against"])]
        if gains:
            yield Figure("gain", layer, None, _mean(gains), len(gains))


def by_concept(
    units: list[dict[str, Any]], concepts: list[dict[str, Any]], prompts: dict[str, str]
) -> Iterator[Figure]:
    """Names that many units share, concepts that none has, prompts and rounds by what they won."""
    by_name = {row["concept"]: row for row in concepts}
    wins = Counter(unit["phrase"] for unit in units)
    for name, count in sorted(wins.items(), key=lambda item: (-item[1], item[0]))[:HUBS]:
        yield Figure("hub", None, name, count / len(units), count)
    for name in sorted(by_name.keys() - wins.keys()):
        yield Figure("never used", None, name, 0.0, 0)
    for what, column in (("prompt", "prompt_id"), ("round", "round")):
        brought, won = Counter(row[column] for row in concepts), Counter[Any]()
        for name, count in wins.items():
            won[by_name[name][column]] += count
        for key, number in brought.items():
            if key is not None:
                yield Figure(what, None, prompts.get(str(key), str(key)), won[key] / number, won[key])


def near_duplicates(concepts: list[dict[str, Any]], vectors_CD: np.ndarray) -> Iterator[Figure]:
    """The pairs of concepts that are most alike, and how many concepts are alike to one before them."""
    vectors = torch.from_numpy(vectors_CD.astype(np.float32))
    pairs, alike = [], 0
    for start in range(0, len(vectors), BLOCK):
        cosine = (vectors[start : start + BLOCK] @ vectors[: start + BLOCK].T).tril(start - 1)
        best, place = cosine.max(1)
        alike += int((best >= ALIKE).sum())
        pairs += [(float(best[i]), start + int(i), int(place[i])) for i in (best >= ALIKE).nonzero().flatten()]
    yield Figure("near-duplicates", None, None, alike / max(len(vectors), 1), alike)
    for cosine, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:PAIRS]:
        yield Figure("near-duplicate", None, f"{concepts[j]['concept']} | {concepts[i]['concept']}", cosine, 2)


def _mean(values: list) -> float:
    return float(np.mean(values)) if values else float("nan")
