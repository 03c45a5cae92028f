"""Stage vocabulary: the concepts that units are compared with.

In: phrases and their CLIP vectors; in later rounds also the concepts before and the clusters that were asked about.
Out: concepts, with phrases of one meaning merged and linked to broader ones, and their vectors in the same order.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from tasks.cleaning import broader
from tasks.forward import worker_device
from tasks.store import Folder, PartReport
from tasks.tables import SCHEMAS, make_table, matrix

BLOCK = 1024
"""Phrases compared with all before them at once."""


@dataclass
class VocabularyJob:
    out: Folder
    """Of the tables concepts, concept_embeddings."""
    phrases: Folder
    phrase_embeddings: Folder
    merge: float
    """Cosine from which two phrases are one concept."""
    threads: int
    before: Folder | None = None
    """The vocabulary of the round before; all of it stays."""
    clusters: Folder | None = None
    """What this round's phrases were asked for."""
    number: int = 0
    """Of the round."""


class VocabularyWorker:
    """Merges the whole vocabulary: part 0 is the only one."""

    def __init__(self, job: VocabularyJob) -> None:
        self.job = job
        worker_device(job.threads)

    def run(self, part: int) -> PartReport:
        report, job = PartReport(part), self.job
        with report.phase("read"):
            rows, vectors = self._rows()
        with report.phase("compute"):
            into = synonyms(vectors, np.array([row["is_class"] for row in rows], bool), job.merge)
            concepts = merged(rows, into)
        kept = np.flatnonzero(into == np.arange(len(into)))
        embeddings = {"concept_id": concepts["concept_id"].combine_chunks(), "embedding": vectors[kept]}
        tables = {"concepts": concepts, "concept_embeddings": make_table("concept_embeddings", embeddings)}
        with report.phase("write"):
            job.out.write(part, tables)
        report.rows = {"concepts": len(kept)}
        report.skipped = {"synonym": len(into) - len(kept)} if len(kept) < len(into) else {}
        return report

    def _rows(self) -> tuple[list[dict], np.ndarray]:
        """All that may be a concept, what must stay first, and its vectors."""
        job = self.job
        rows = job.phrases.read_all("phrases").to_pylist()
        vectors = matrix(job.phrase_embeddings.read_all("phrase_embeddings")["embedding"])
        clusters = job.clusters.read_all("clusters").to_pylist() if job.clusters else []
        parents = {row["prompt_id"]: row["parent"] for row in clusters}
        for row in rows:
            row |= {"synonyms": [], "parent": parents.get(row["prompt_id"]), "round": job.number}
        if job.before is None:
            return rows, vectors
        old = job.before.read_all("concepts").to_pylist()
        known = {phrase for row in old for phrase in (row["concept"], *row["synonyms"])}
        new = [i for i, row in enumerate(rows) if row["concept"] not in known]
        before = matrix(job.before.read_all("concept_embeddings")["embedding"])
        rows = [row | {"is_class": True} for row in old] + [rows[i] for i in new]
        return rows, np.concatenate([before, vectors[new]]) if new else before


def synonyms(vectors_ND: np.ndarray, is_class_N: np.ndarray, limit: float) -> np.ndarray:
    """int64 [N], the phrase that each is merged into, itself where it stays: the most similar of those that stay and
    come before it, from a cosine of `limit`. Classes come before all others and always stay."""
    order = np.argsort(~is_class_N, kind="stable")
    vectors = torch.from_numpy(vectors_ND[order].astype(np.float32))
    into = np.arange(len(order))
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        cosine = (vectors[start:stop] @ vectors[:stop].T).tril(start - 1).numpy()
        for i in np.flatnonzero((cosine >= limit).any(1) & ~is_class_N[order[start:stop]]):
            close = np.flatnonzero(cosine[i] >= limit)
            close = close[into[close] == close]
            if len(close):
                into[start + i] = close[cosine[i, close].argmax()]
    found = np.empty_like(into)
    found[order] = order[into]
    return found


def merged(rows: list[dict], into_N: np.ndarray) -> pa.Table:
    """The concepts table, in the order of the rows; a concept has the sources of all that is merged into it."""
    for row, into in zip(rows, into_N.tolist(), strict=True):
        if row is not rows[into]:
            rows[into]["synonyms"].append(row["concept"])
            rows[into]["sources"] = list(dict.fromkeys(rows[into]["sources"] + row["sources"]))
    kept = [row for row, into in zip(rows, into_N.tolist(), strict=True) if row is rows[into]]
    ids = {phrase: row["concept_id"] for row in kept for phrase in (*row["synonyms"], row["concept"])}
    for row in kept:
        links = (ids[phrase] for phrase in broader(row["concept"]) if phrase in ids)
        row["broader"] = next((link for link in links if link != row["concept_id"]), None)
    return make_table("concepts", {column: [row[column] for row in kept] for column in SCHEMAS["concepts"].names})
