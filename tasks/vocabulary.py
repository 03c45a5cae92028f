"""Stage vocabulary: the concepts that units are compared with.

In: phrases and their CLIP vectors. Out: concepts, with phrases of one meaning merged and linked to broader ones, and
their vectors in the same order.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from tasks.cleaning import broader
from tasks.forward import worker_device
from tasks.store import Folder, PartReport
from tasks.tables import make_table, matrix

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


class VocabularyWorker:
    """Merges the whole vocabulary: part 0 is the only one."""

    def __init__(self, job: VocabularyJob) -> None:
        self.job = job
        worker_device(job.threads)

    def run(self, part: int) -> PartReport:
        report, job = PartReport(part), self.job
        with report.phase("read"):
            phrases = job.phrases.read_all("phrases").combine_chunks()
            vectors = matrix(job.phrase_embeddings.read_all("phrase_embeddings")["embedding"])
        with report.phase("compute"):
            into = synonyms(vectors, phrases["is_class"].to_numpy(), job.merge)
            concepts = merged(phrases, into)
        kept = np.flatnonzero(into == np.arange(len(into)))
        embeddings = {"concept_id": concepts["concept_id"].combine_chunks(), "embedding": vectors[kept]}
        tables = {"concepts": concepts, "concept_embeddings": make_table("concept_embeddings", embeddings)}
        with report.phase("write"):
            job.out.write(part, tables)
        report.rows = {"concepts": len(kept)}
        report.skipped = {"synonym": len(into) - len(kept)} if len(kept) < len(into) else {}
        return report


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


def merged(phrases: pa.Table, into_N: np.ndarray) -> pa.Table:
    """The concepts table, in the order of the phrases; a concept has the sources of all that is merged into it."""
    rows = phrases.drop_columns(["is_class"]).to_pylist()
    for row in rows:
        row |= {"synonyms": [], "parent": None, "round": 0}
    for row, into in zip(rows, into_N.tolist(), strict=True):
        if row is not rows[into]:
            rows[into]["synonyms"].append(row["concept"])
            rows[into]["sources"] = list(dict.fromkeys(rows[into]["sources"] + row["sources"]))
    kept = [row for row, into in zip(rows, into_N.tolist(), strict=True) if row is rows[into]]
    ids = {phrase: row["concept_id"] for row in kept for phrase in (*row["synonyms"], row["concept"])}
    for row in kept:
        links = (ids[phrase] for phrase in broader(row["concept"]) if phrase in ids)
        row["broader"] = next((link for link in links if link != row["concept_id"]), None)
    return make_table("concepts", {column: [row[column] for row in kept] for column in kept[0]})
