"""Stage benchmark: what is known of the names that several scorers give the same units.

In: finished stages of one run per scorer, its randomly initialised twin and its controls; the truth, where there is
one: planted units, class names, human descriptions. Out: the benchmark table, one figure a row. Part 0 is the only one.
"""

import csv
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa

from tasks.classes import class_concepts, final_layer
from tasks.clip import Clip, ClipSettings
from tasks.correlation import correlations, read_block
from tasks.forward import worker_device
from tasks.images import ImageList
from tasks.layers import Block
from tasks.store import Folder, PartReport
from tasks.tables import make_table, matrix
from tasks.world.judging import FIVE, judge, scores, wilson

LIVE = ("explained", "ambiguous", "unexplained")
NO_SCORER = "-"
"""Stands for the scorer in rows about labels that no scorer gave."""


@dataclass
class Named:
    """The names that one scorer gave: stage neurons of a run and of its controls."""

    neurons: Folder
    controls: dict[str, Folder]
    """Of the same layers where no name can be true: 'randomly initialised', 'shuffled'."""
    halves: list[Folder]
    """Of two runs whose explain images are disjoint; empty where that was not asked for."""

    def identity(self) -> dict[str, Any]:
        """For the fingerprint."""
        controls = {name: folder.fingerprint for name, folder in self.controls.items()}
        return {"neurons": self.neurons.fingerprint} | controls | {"halves": [half.fingerprint for half in self.halves]}


@dataclass
class BenchmarkJob:
    out: Folder
    images: ImageList
    activations: Folder
    image_embeddings: Folder
    vocabulary: Folder
    blocks: list[Block]
    clip: ClipSettings
    threads: int
    named: dict[str, Named]
    """By scorer."""
    class_names: list[str]
    """Of the target's outputs; empty where they have none."""
    planted: pa.Table | None = None
    annotations: str | None = None
    """CSV with layer, unit, description; several rows of a unit are several people's."""


class Figure(NamedTuple):
    """A row of the benchmark table."""

    benchmark: str
    scorer: str
    subject: str
    measure: str
    value: float
    lower: float
    upper: float
    units: int


class BenchmarkWorker:
    """Judges the names of all scorers."""

    def __init__(self, job: BenchmarkJob) -> None:
        self.job, self.device = job, worker_device(job.threads)

    @cached_property
    def vectors(self) -> dict[str, np.ndarray]:
        """Text vector of every concept, float32."""
        names = self.job.vocabulary.read_all("concepts", columns=["concept"])["concept"].to_pylist()
        table = self.job.vocabulary.read_all("concept_embeddings")
        return dict(zip(names, matrix(table["embedding"]).astype(np.float32), strict=True))

    @cached_property
    def final(self) -> str | None:
        return final_layer([block.layer for block in self.job.blocks for _ in range(len(block))], self.job.class_names)

    def run(self, part: int) -> PartReport:
        report = PartReport(part)
        with report.phase("compute"):
            figures = [f for scorer, named in self.job.named.items() for f in self._judged(scorer, named)]
            figures += self._constant()
        table = make_table("benchmark", {c: [getattr(f, c) for f in figures] for c in Figure._fields})
        with report.phase("write"):
            self.job.out.write(part, {"benchmark": table})
        report.rows = {"benchmark": table.num_rows}
        return report

    def _judged(self, scorer: str, named: Named) -> Iterator[Figure]:
        neurons = named.neurons.read_all("neurons")
        rows = neurons.to_pylist()
        parts = self._parts(rows)
        if self.job.planted is not None:
            yield from planted(scorer, neurons, self.job.planted)
        if self.final:
            yield from classes(scorer, parts.get("final layer", []), self._class_concepts, self.vectors)
        for subject, members in parts.items():
            yield from held_out(scorer, subject, members)
            yield from collisions(scorer, subject, members)
        for control, folder in named.controls.items():
            status = folder.read_all("neurons", columns=["status"])["status"].to_pylist()
            live = sum(one in LIVE for one in status)
            yield share("controls", scorer, control, "explained", status.count("explained"), live)
        if named.halves:
            first, second = (self._parts(half.read_all("neurons").to_pylist()) for half in named.halves)
            for subject in first:
                yield from agreement(scorer, subject, first[subject], second.get(subject, []), self.vectors)
        if self.job.annotations:
            names = {(r["layer"], r["unit"]): self.vectors[r["phrase"]] for r in rows if r["phrase"] is not None}
            yield from described(scorer, self._descriptions, names)

    def _parts(self, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """Units with a name, hidden ones and those of the final layer."""
        live = [row for row in rows if row["status"] in LIVE and row["phrase"] is not None]
        parts = {"hidden": [r for r in live if r["layer"] != self.final]}
        parts["final layer"] = [r for r in live if r["layer"] == self.final]
        return {subject: members for subject, members in parts.items() if members}

    @cached_property
    def _class_concepts(self) -> list[str | None]:
        return class_concepts(self.job.vocabulary, self.job.class_names)

    @cached_property
    def _descriptions(self) -> dict[tuple[str, int], list[np.ndarray]]:
        """Text vectors of the human descriptions of each unit."""
        found = read_annotations(str(self.job.annotations))
        texts = sorted({text for several in found.values() for text in several})
        clip = Clip(self.job.clip, self.device, self.job.images.batch_size)
        vector = dict(zip(texts, clip.concepts(texts).astype(np.float32), strict=True))
        return {unit: [vector[text] for text in several] for unit, several in found.items()}

    def _constant(self) -> Iterator[Figure]:
        """The one name that fits all live units best, chosen on select, and what it reaches on validate."""
        job, names = self.job, list(self.vectors)
        stored = np.flatnonzero(job.images.stored)
        split, vectors_CD = job.images.split[stored], np.stack(list(self.vectors.values()))
        images_ND = matrix(job.image_embeddings.read_all("image_embeddings")["embedding"]).astype(np.float32)[stored]
        if min((split == "select").sum(), (split == "validate").sum()) < 4:
            return
        reached: dict[str, list[np.ndarray]] = {}
        for number, block in enumerate(job.blocks):
            pooled_US = read_block(job.activations, job.images, number)
            subject = "final layer" if block.layer == self.final else "hidden"
            both = [
                correlations(pooled_US[:, split == s], images_ND[split == s] @ vectors_CD.T)
                for s in ("select", "validate")
            ]
            reached.setdefault(subject, []).append(np.stack(both))
        for subject, found in reached.items():
            select_UC, validate_UC = np.concatenate(found, 1)
            best = int(np.nanmean(select_UC, 0).argmax())
            yield mean("held-out", NO_SCORER, subject, f"constant label '{names[best]}'", validate_UC[:, best].tolist())


def share(benchmark: str, scorer: str, subject: str, measure: str, right: int, of: int) -> Figure:
    """A share with its 95 % interval; NaN of none."""
    value, (low, high) = (right / of, wilson(right, of)) if of else (math.nan, (math.nan, math.nan))
    return Figure(benchmark, scorer, subject, measure, value, low, high, of)


def mean(benchmark: str, scorer: str, subject: str, measure: str, values: list) -> Figure:
    """A mean over units with its 95 % interval by the central limit; NaN and None are left out."""
    known = np.array([v for v in values if v is not None and math.isfinite(v)], float)
    if not len(known):
        return Figure(benchmark, scorer, subject, measure, math.nan, math.nan, math.nan, 0)
    value, half = float(known.mean()), 1.96 * float(known.std()) / math.sqrt(len(known))
    return Figure(benchmark, scorer, subject, measure, value, value - half, value + half, len(known))


def planted(scorer: str, neurons: pa.Table, truth: pa.Table) -> Iterator[Figure]:
    """Units of every planted kind that are named right."""
    for score in scores(judge(neurons, truth)):
        for measure in ("first", "five", "explained"):
            kind = score.kind.strip()
            yield share("planted", scorer, kind, measure, getattr(score, measure), score.units)


def classes(
    scorer: str, rows: list[dict[str, Any]], concepts: list[str | None], vectors: dict[str, np.ndarray]
) -> Iterator[Figure]:
    """Final units whose own class name comes first or among the best five, and the text cosine of name and class."""
    known = [(row, concepts[row["unit"]]) for row in rows if concepts[row["unit"]] is not None]
    first = sum(row["phrase"] == want for row, want in known)
    five = sum(want in row["concepts"][:FIVE] for row, want in known)
    yield share("final layer", scorer, "classes", "first", first, len(known))
    yield share("final layer", scorer, "classes", "five", five, len(known))
    cosines = [float(vectors[row["phrase"]] @ vectors[str(want)]) for row, want in known]
    yield mean("final layer", scorer, "classes", "text cosine", cosines)


def held_out(scorer: str, subject: str, rows: list[dict[str, Any]]) -> Iterator[Figure]:
    """Correlation of the names on validate, and how many are explained."""
    yield mean("held-out", scorer, subject, "correlation", [row["confidence"] for row in rows])
    explained = sum(row["status"] == "explained" for row in rows)
    yield share("held-out", scorer, subject, "explained", explained, len(rows))


def collisions(scorer: str, subject: str, rows: list[dict[str, Any]]) -> Iterator[Figure]:
    """How far names repeat: distinct names per unit, the commonest name's share, the entropy of names in bits."""
    counts, nan = Counter(row["phrase"] for row in rows), math.nan
    shares = np.array(list(counts.values())) / len(rows)
    entropy = float(-(shares * np.log2(shares)).sum())
    figures = {"distinct names per unit": len(counts) / len(rows), "largest share": shares.max(), "entropy": entropy}
    for measure, value in figures.items():
        yield Figure("collisions", scorer, subject, measure, value, nan, nan, len(rows))


def agreement(
    scorer: str, subject: str, a: list[dict[str, Any]], b: list[dict[str, Any]], vectors: dict[str, np.ndarray]
) -> Iterator[Figure]:
    """Units that two halves of the images give the same name, or a common one among five; text cosine of the names."""
    other = {(row["layer"], row["unit"]): row for row in b}
    both = [(row, other[row["layer"], row["unit"]]) for row in a if (row["layer"], row["unit"]) in other]
    same = sum(x["phrase"] == y["phrase"] for x, y in both)
    five = sum(bool(set(x["concepts"][:FIVE]) & set(y["concepts"][:FIVE])) for x, y in both)
    yield share("stability", scorer, subject, "first", same, len(both))
    yield share("stability", scorer, subject, "five", five, len(both))
    cosines = [float(vectors[x["phrase"]] @ vectors[y["phrase"]]) for x, y in both]
    yield mean("stability", scorer, subject, "text cosine", cosines)


def read_annotations(path: str) -> dict[tuple[str, int], list[str]]:
    """Descriptions by layer and unit. Raises ValueError naming the key for a file without these columns."""
    try:
        with fsspec.open(path, "rt", encoding="utf-8", newline="") as file:
            rows = [(row["layer"], int(row["unit"]), row["description"]) for row in csv.DictReader(file)]  # type: ignore
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"annotations={path}: expected a CSV with layer, unit, description: {error!r}") from None
    found: dict[tuple[str, int], list[str]] = {}
    for layer, unit, text in rows:
        found.setdefault((layer, unit), []).append(text)
    return found


def described(
    scorer: str, descriptions: dict[tuple[str, int], list[np.ndarray]], names: dict[tuple[str, int], np.ndarray]
) -> Iterator[Figure]:
    """Text cosine of names and human descriptions, beside it what one constant label and two people reach."""
    units = [unit for unit in descriptions if unit in names]
    subject = "described units"

    def figure(of: str, measure: str, cosines: list[float]) -> Figure:
        return mean("annotations", of, subject, measure, cosines)

    cosines = [float(np.mean([names[unit] @ d for d in descriptions[unit]])) for unit in units]
    yield figure(scorer, "text cosine", cosines)
    means_ND = np.stack([np.mean(descriptions[unit], 0) for unit in units]) if units else np.zeros((0, 1))
    if units:
        labels_ND = np.stack([names[unit] for unit in units])
        constant = (labels_ND @ means_ND.T).mean(1).argmax()
        yield figure(scorer, "its best constant label", (means_ND @ labels_ND[constant]).tolist())
    people = [float(a @ b) for several in descriptions.values() for a, b in combinations(several, 2)]
    yield figure(scorer, "human and human", people)
