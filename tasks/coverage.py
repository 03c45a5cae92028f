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


class Named(NamedTuple):
    """Units that have a name, a row each; NaN where a figure is not known."""

    layer: np.ndarray
    phrase: np.ndarray
    explained: np.ndarray
    confidence: np.ndarray
    against: np.ndarray
    """Confidence with the names of another word list."""
    z: np.ndarray
    """Standard errors of the name above random crops."""

    def chosen(self, rows: np.ndarray) -> "Named":
        return Named(*(column[rows] for column in self))


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

    def _units(self) -> Named:
        """Every unit that has a name."""
        job = self.job
        columns = ["layer", "status", "phrase", "confidence"]
        neurons = job.neurons.read_all("neurons", columns=columns)
        layer, status, phrase, confidence = (neurons[c].to_numpy(zero_copy_only=False) for c in columns)
        scores = job.scores.read_all("scores", columns=["concept", "null_z"])
        concepts, z = (scores[c].to_numpy().reshape(len(layer), -1) for c in ("concept", "null_z"))  # as many a unit
        is_name = concepts == phrase[:, None]
        of_name = np.where(is_name.any(1), z[np.arange(len(z)), is_name.argmax(1)], np.nan)
        against = np.full(len(layer), np.nan)
        if job.against is not None:
            against = job.against.read_all("validation", columns=["correlation"])["correlation"].to_numpy()
        units = Named(layer, phrase, status == "explained", confidence, against, of_name)
        return units.chosen(np.isin(status, NAMED) & (phrase != None))  # noqa: E711, null by null


def by_layer(units: Named) -> Iterator[Figure]:
    """Figures of every layer, and of all together (layer null)."""
    for layer in (None, *dict.fromkeys(units.layer)):
        of = units if layer is None else units.chosen(units.layer == layer)
        known = of.z[np.isfinite(of.z)]
        yield Figure("above the null", layer, None, _mean(known > ABOVE), len(known))
        yield Figure("explained", layer, None, _mean(of.explained), len(of.explained))
        names = len(set(of.phrase))
        yield Figure("distinct names", layer, None, names / max(len(of.phrase), 1), names)
        for what, values in (("confidence", of.confidence), ("gain", of.confidence - of.against)):
            known = values[np.isfinite(values)]
            if what == "confidence" or len(known):
                yield Figure(what, layer, None, _mean(known), len(known))


def by_concept(units: Named, concepts: list[dict[str, Any]], prompts: dict[str, str]) -> Iterator[Figure]:
    """Names that many units share, concepts that none has, prompts and rounds by what they won."""
    by_name, wins = {row["concept"]: row for row in concepts}, Counter(units.phrase)
    for name, count in sorted(wins.items(), key=lambda item: (-item[1], item[0]))[:HUBS]:
        yield Figure("hub", None, name, count / len(units.phrase), count)
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


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")
