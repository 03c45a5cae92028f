"""Stage explanations: what is said about each unit.

In: kept concepts and exemplars of a unit block; in later rounds also the explanations before, and what of the select
split tells whether a new name is better. Out: one row a unit with its phrase, concepts, weights and exemplars.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.correlation import better, paired, product, read_block
from tasks.forward import worker_device
from tasks.images import ImageList
from tasks.layers import Block
from tasks.store import Folder, PartReport
from tasks.tables import Lists, make_table, matrix

CONCEPTS = 5
"""Concepts of an explanation."""
COLUMNS = ("concept", "score", "lead", "adds", "meaning", "share")
EXEMPLARS = 20
"""Exemplar ids that an explanation carries."""


@dataclass
class Earlier:
    """What a later round of refinement needs to know whether its names are better."""

    explanations: Folder
    """Of the round before."""
    images: ImageList
    activations: Folder
    image_embeddings: Folder
    vocabulary: Folder
    number: int
    """Of this round."""
    sure: float
    """Standard errors by which a new name must do better."""


@dataclass
class ExplanationsJob:
    out: Folder
    scores: Folder
    exemplars: Folder
    blocks: list[Block]
    threads: int
    earlier: Earlier | None = None
    """Set from the first round of refinement on."""


class ExplanationsWorker:
    """Turns the scores of one unit block into explanations."""

    def __init__(self, job: ExplanationsJob) -> None:
        self.job = job
        worker_device(job.threads)

    def run(self, part: int) -> PartReport:
        report, block = PartReport(part), self.job.blocks[part]
        with report.phase("read"):
            scores = self.job.scores.read("scores", part)
            columns = ["unit", "tail", "rank", "image_id"]
            exemplars = self.job.exemplars.read("exemplars", part, columns=columns)
        with report.phase("compute"):
            table = explain(block, scores, exemplars)
            if self.job.earlier:
                before = self.job.earlier.explanations.read("explanations", part)
                table = renamed(before, table, self._gains(part, before, table, self.job.earlier), self.job.earlier)
        with report.phase("write"):
            self.job.out.write(part, {"explanations": table})
        report.rows = {"explanations": table.num_rows}
        if self.job.earlier:
            report.rows["renamed"] = int((table["round"].to_numpy() == self.job.earlier.number).sum())
        return report

    @cached_property
    def select(self) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Which stored images are of the select split, their vectors float32 [n, D], and the vector of each concept."""
        job = self.job.earlier
        assert job is not None
        stored = np.flatnonzero(job.images.stored)
        chosen = job.images.split[stored] == "select"
        images = matrix(job.image_embeddings.read_all("image_embeddings")["embedding"]).astype(np.float32)
        names = job.vocabulary.read_all("concepts", columns=["concept"])["concept"].to_pylist()
        vectors = matrix(job.vocabulary.read_all("concept_embeddings")["embedding"]).astype(np.float32)
        return chosen, images[stored[chosen]], dict(zip(names, vectors, strict=True))

    def _gains(self, part: int, before: pa.Table, after: pa.Table, job: Earlier) -> np.ndarray:
        """By how many standard errors each unit's new name follows it better than its old one, on the select split."""
        chosen, images, vectors = self.select
        pooled = read_block(job.activations, job.images, part)[:, chosen]
        none = np.zeros(images.shape[1], np.float32)
        by_old, by_new = (
            product(np.array([vectors.get(name, none) for name in table["phrase"].to_pylist()]), images.T)
            for table in (before, after)
        )
        r_old, r_new = paired(pooled, by_old), paired(pooled, by_new)
        return better(r_new, r_old, paired(by_old, by_new), images.shape[0])


def explain(block: Block, scores: pa.Table, exemplars: pa.Table) -> pa.Table:
    """One row per unit of the block: its best concept, the one that adds to it if there is one, and the next best.

    A concept's weight is its lead over the vocabulary's median concept, normalised, whatever the scorer's scale. All
    are equal where nothing leads.
    """
    keep = scores.num_rows // len(block)
    columns = {c: scores[c].to_numpy(zero_copy_only=False).reshape(len(block), keep) for c in COLUMNS}
    score, place = columns["score"], np.arange(keep) + 1 - columns["adds"] * keep
    place[:, 0] = -keep
    order = place.argsort(1)[:, :CONCEPTS]
    concepts = np.take_along_axis(columns["concept"], order, 1)
    weights = np.take_along_axis(columns["lead"], order, 1).clip(0)
    total = weights.sum(1, keepdims=True)
    weights = np.where(total > 0, weights / np.where(total > 0, total, 1), 1 / weights.shape[1])
    first = exemplars.filter(pc.call_function("equal", [exemplars["tail"], "top"]))
    first = first.filter(pc.call_function("less", [first["rank"], EXEMPLARS]))
    means = np.isfinite(columns["meaning"])
    of_unit = first["unit"].to_numpy() - block.start
    ids = first["image_id"].combine_chunks().take(pa.array(of_unit.argsort(kind="stable")))
    known = np.bincount(of_unit, minlength=len(block))
    columns = {
        "layer": [block.layer] * len(block),
        "unit": np.arange(block.start, block.stop),
        "phrase": pa.array(concepts[:, 0], pa.string(), mask=known == 0),
        "concepts": concepts,
        "weights": weights.astype(np.float32),
        "margin": score[:, 0] - score[:, 1] if keep > 1 else score[:, 0],
        "match": columns["share"][:, 0],
        "meanings": Lists(means.sum(1), columns["concept"][means]),
        "shares": Lists(means.sum(1), columns["meaning"][means]),
        "exemplars": Lists(known, ids),
        "round": np.zeros(len(block), np.int32),
        "negative": scores["negative"].to_numpy(zero_copy_only=False)[::keep],
    }
    return make_table("explanations", columns)


def renamed(before: pa.Table, after: pa.Table, gains: np.ndarray, job: Earlier) -> pa.Table:
    """The row of this round where its name is better beyond chance, else the row of the round before."""
    new = np.nan_to_num(gains, nan=-np.inf) > job.sure
    after = after.set_column(
        after.schema.get_field_index("round"), "round", pa.array([job.number] * len(new), pa.int32())
    )
    place = np.where(new, np.arange(len(new)) + len(new), np.arange(len(new)))
    return pa.concat_tables([before, after]).take(pa.array(place)).combine_chunks()
