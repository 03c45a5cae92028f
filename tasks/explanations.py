"""Stage explanations: what is said about each unit.

In: kept concepts and exemplars of a unit block. Out: one row a unit with its phrase, concepts, weights and exemplars.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.layers import Block
from tasks.store import Folder, PartReport
from tasks.tables import make_table

CONCEPTS = 5
"""Concepts of an explanation."""
COLUMNS = ("concept", "score", "lead", "adds")
EXEMPLARS = 20
"""Exemplar ids that an explanation carries."""


@dataclass
class ExplanationsJob:
    out: Folder
    scores: Folder
    exemplars: Folder
    blocks: list[Block]


class ExplanationsWorker:
    """Turns the scores of one unit block into explanations."""

    def __init__(self, job: ExplanationsJob) -> None:
        self.job = job

    def run(self, part: int) -> PartReport:
        report, block = PartReport(part), self.job.blocks[part]
        with report.phase("read"):
            scores = self.job.scores.read("scores", part)
            columns = ["unit", "tail", "rank", "image_id"]
            exemplars = self.job.exemplars.read("exemplars", part, columns=columns)
        with report.phase("compute"):
            table = explain(block, scores, exemplars)
        with report.phase("write"):
            self.job.out.write(part, {"explanations": table})
        report.rows = {"explanations": table.num_rows}
        return report


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
    ids = {unit: [] for unit in range(block.start, block.stop)}
    for unit, image_id in zip(first["unit"].to_pylist(), first["image_id"].to_pylist(), strict=True):
        ids[unit].append(image_id)
    columns = {
        "layer": [block.layer] * len(block),
        "unit": np.arange(block.start, block.stop),
        "phrase": [row[0] if ids[unit] else None for unit, row in zip(ids, concepts, strict=True)],
        "concepts": concepts.tolist(),
        "weights": weights.astype(np.float32),
        "margin": score[:, 0] - score[:, 1] if keep > 1 else score[:, 0],
        "exemplars": list(ids.values()),
    }
    return make_table("explanations", columns)
