"""Stage validation: does the name predict the unit on images that did not make it?

In: explanations, pooled activations and image embeddings of the held-out splits. Out: one row a unit: the correlation
on validate with its interval and p value, and the best rival concept on select. For a randomly initialised twin also
one row a concept: what the twin's units reach with it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from tasks.correlation import correlations, fisher, product, read_block
from tasks.forward import worker_device
from tasks.images import ImageList
from tasks.layers import Block
from tasks.store import Folder, PartReport
from tasks.tables import make_table, matrix

CHANCE_UNITS = 512
"""Units of a layer that tell what chance reaches: those of a random layer are all alike."""
SYNONYM = 0.9
"""Text cosine from which two concepts count as one meaning, so that neither is the other's rival."""


@dataclass
class ValidationJob:
    out: Folder
    images: ImageList
    activations: Folder
    image_embeddings: Folder
    vocabulary: Folder
    explanations: Folder
    blocks: list[Block]
    threads: int
    chance: float | None
    """Quantile over units of their correlation with each concept that is stored; None for none."""


class ValidationWorker:
    """Correlations of one unit block as one product of standardised activations and similarities."""

    def __init__(self, job: ValidationJob) -> None:
        self.job = job
        worker_device(job.threads)

    @cached_property
    def vectors(self) -> tuple[np.ndarray, dict[str, int]]:
        """Concept vectors float32 [C, D] and the row of each concept."""
        concepts = self.job.vocabulary.read_all("concepts", columns=["concept"])["concept"].to_pylist()
        table = self.job.vocabulary.read_all("concept_embeddings")
        return matrix(table["embedding"]).astype(np.float32), {c: i for i, c in enumerate(concepts)}

    @cached_property
    def images_ND(self) -> np.ndarray:
        return matrix(self.job.image_embeddings.read_all("image_embeddings")["embedding"]).astype(np.float32)

    def run(self, part: int) -> PartReport:
        report, job, block = PartReport(part), self.job, self.job.blocks[part]
        with report.phase("read"):
            explanations = job.explanations.read("explanations", part)
            pooled_US = read_block(job.activations, job.images, part)
        with report.phase("compute"):
            table = self._validate(block, explanations, pooled_US)
            chance = self._chance(block, pooled_US[:CHANCE_UNITS])
        with report.phase("write"):
            job.out.write(part, {"validation": table, "chance": chance})
        report.rows = {"validation": table.num_rows}
        return report

    def _validate(self, block: Block, explanations: pa.Table, pooled_US: np.ndarray) -> pa.Table:
        vectors_CD, row_of = self.vectors
        names = explanations["concepts"].to_pylist()
        most = max(map(len, names))  # fewer where a name is older than the vocabulary's later concepts: its own again
        names = np.array([row + row[:1] * (most - len(row)) for row in names], object)
        concepts_UR = np.array([[row_of[c] for c in row] for row in names])
        stored = np.flatnonzero(self.job.images.stored)
        split = self.job.images.split[stored]
        correlation_UR = {}
        for name in ("select", "validate"):
            chosen = split == name
            similarity = product(self.images_ND[stored[chosen]], vectors_CD[np.unique(concepts_UR)].T)
            place = np.searchsorted(np.unique(concepts_UR), concepts_UR)
            correlation_UR[name] = np.take_along_axis(correlations(pooled_US[:, chosen], similarity), place, 1)
        count = {name: int((split == name).sum()) for name in correlation_UR}
        r = correlation_UR["validate"][:, 0]
        lower, upper, p = fisher(r, count["validate"])
        rival, gain = best_rival(correlation_UR["select"], vectors_CD[concepts_UR], count["select"])
        columns = {
            "layer": [block.layer] * len(block),
            "unit": np.arange(block.start, block.stop),
            "images": [count["validate"]] * len(block),
            "correlation": _nullable(r, pa.float32()),
            "lower": _nullable(lower, pa.float32()),
            "upper": _nullable(upper, pa.float32()),
            "p": _nullable(p, pa.float64()),
            "rival": [names[u, i] if i >= 0 else None for u, i in enumerate(rival)],
            "rival_gain": _nullable(gain, pa.float32()),
        }
        return make_table("validation", columns)

    def _chance(self, block: Block, pooled_US: np.ndarray) -> pa.Table:
        """Of every concept, from the first block of a layer; empty for the others, and where it is not asked for."""
        vectors_CD, row_of = self.vectors
        reached = np.zeros(0)
        if self.job.chance is not None and block.start == 0:
            stored = np.flatnonzero(self.job.images.stored)
            chosen = self.job.images.split[stored] == "validate"
            similarity = product(self.images_ND[stored[chosen]], vectors_CD.T)
            r_UC = correlations(pooled_US[:, chosen], similarity)
            alive = np.isfinite(r_UC).any(1)
            reached = np.nanquantile(r_UC[alive], self.job.chance, axis=0) if alive.any() else reached
        concepts = list(row_of)[: len(reached)]
        columns = {"layer": [block.layer] * len(concepts), "concept": concepts}
        return make_table("chance", columns | {"correlation": _nullable(reached, pa.float32())})


def _nullable(values: np.ndarray, dtype: pa.DataType) -> pa.Array:
    return pa.array(values, dtype, from_pandas=True)  # NaN becomes null


def best_rival(r_UR: np.ndarray, vectors_URD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each unit's other concepts that are no synonyms of the first, the best on select: its index and its gain.

    The gain is (atanh r_rival - atanh r_first) sqrt(count - 3); index -1 and gain NaN where there is no rival.
    """
    cosine = (vectors_URD * vectors_URD[:, :1]).sum(2)
    r = np.where((cosine < SYNONYM) & np.isfinite(r_UR), r_UR, -np.inf)
    index, rows = r.argmax(1), np.arange(len(r))
    known = np.isfinite(r[rows, index]) & np.isfinite(r_UR[:, 0]) & (count > 3)
    z = np.arctanh(np.where(known[:, None], np.stack([r[rows, index], r_UR[:, 0]], 1), 0).clip(-0.999999, 0.999999))
    gain = (z[:, 0] - z[:, 1]) * np.sqrt(max(count - 3, 0))
    return np.where(known, index, -1), np.where(known, gain, np.nan)
