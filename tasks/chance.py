"""Stage chance: how closely units with random weights follow each concept. One part is one random net.

In: the target's architecture, validate images, CLIP vectors of them and of the concepts. Out: one row a layer and
concept. Several nets, because the units of one are all alike: in one net many follow blue, in another orange.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tasks.correlation import correlations, product
from tasks.forward import HookedTarget, TargetPass
from tasks.layers import Layer
from tasks.store import Folder, PartReport
from tasks.tables import SCHEMAS, make_table, matrix

UNITS = 512
"""Units of a layer that are looked at."""


@dataclass
class ChanceJob:
    out: Folder
    model: TargetPass
    """Of the first random net; the others have the seeds after its own."""
    pool: str
    vocabulary: Folder
    image_embeddings: Folder
    concept_vectors: Folder
    """Of the CLIP that judges; the vocabulary itself where that is the one that names."""
    quantile: float
    """Over the units of a layer: what this share of them stays below."""


class ChanceWorker:
    """Runs random nets over the validate images, one after the other."""

    def __init__(self, job: ChanceJob) -> None:
        self.job, images = job, job.model.images
        self.numbers = np.flatnonzero(images.stored & (images.split == "validate"))
        vectors_ND = _vectors(job.image_embeddings, "image_embeddings")[self.numbers]
        concepts = job.vocabulary.read_all("concepts", columns=["concept"])
        self.concepts: list[str] = concepts["concept"].to_pylist()
        table = "concept_embeddings" if job.concept_vectors == job.vocabulary else "phrase_embeddings"
        self.similarity_NC = product(vectors_ND, _vectors(job.concept_vectors, table).T)

    def run(self, part: int) -> PartReport:
        report = PartReport(part)
        with report.phase("compute"):
            pooled = self._pooled(part)
            tables = [self._table(layer, pooled_UN) for layer, pooled_UN in pooled.items()]
        table = pa.concat_tables([SCHEMAS["chance"].empty_table(), *tables])  # without validate images there is none
        with report.phase("write"):
            self.job.out.write(part, {"chance": table})
        report.rows = {"chance": table.num_rows}
        return report

    def _pooled(self, part: int) -> dict[str, np.ndarray]:
        """float32 [units, validate images] of every layer."""
        model = self.job.model
        target = HookedTarget(replace(model, target=replace(model.target, seed=model.target.seed + part)))
        found: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in model.layers}
        size = model.images.batch_size
        batches = [self.numbers[start : start + size] for start in range(0, len(self.numbers), size)]

        def on_layer(layer: Layer, output: Any) -> None:
            pooled_BU = layer.pooled(output, self.job.pool, slice(UNITS))
            found[layer.name].append(pooled_BU.clone())  # not a view, which would hold all units of the layer

        target.run(batches, on_layer, lambda _: None)
        return {name: torch.cat(rows)[: len(self.numbers)].T.cpu().numpy() for name, rows in found.items() if rows}

    def _table(self, layer: str, pooled_UN: np.ndarray) -> pa.Table:
        """Empty for a layer in which nothing varies."""
        r_UC = correlations(pooled_UN, self.similarity_NC)
        alive = np.isfinite(r_UC).any(1)
        reached = np.nanquantile(r_UC[alive], self.job.quantile, axis=0) if alive.any() else np.zeros(0)
        columns = {"layer": [layer] * len(reached), "concept": self.concepts[: len(reached)]}
        return make_table("chance", columns | {"correlation": pa.array(reached, pa.float32(), from_pandas=True)})


def _vectors(folder: Folder, table: str) -> np.ndarray:
    return matrix(folder.read_all(table)["embedding"]).astype(np.float32)
