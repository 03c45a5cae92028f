"""Stage clusters: units for which the vocabulary has no good word, grouped by what they see.

In: explanations, unit_stats, pooled activations, image embeddings and the vocabulary. Out: one row a cluster with its
units, the phrases that fit them best so far, and the prompt that asks for better ones. Part 0 is the only one.

A unit lacks a word where its own mean embedding (the weighted_mean scorer's vector) follows it on the select split more
closely, beyond chance, than its name does: CLIP sees what the unit answers to, and no concept says it. It also lacks
one where its name is the name of many units. The validate split is never looked at.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from tasks.correlation import better, paired, product, read_block
from tasks.forward import worker_device
from tasks.images import ImageList
from tasks.layers import Block
from tasks.prompting import Wording, cluster_prompts
from tasks.store import Folder, PartReport
from tasks.tables import make_table, matrix

PER_CLUSTER = 6
"""Units of a cluster, on average."""
STEPS = 20
"""Of k-means."""
PHRASES = 8
"""Phrases that a prompt shows."""


@dataclass
class RefineSettings:
    rounds: int = 0
    """Most rounds; 0 for none. Needs vocabulary.llm."""
    clusters: int = 64
    """Most clusters of a round, one prompt each."""
    sure: float = 1.645
    """Standard errors on the select split by which a new name must do better than the old one, and by which a unit's
    own vector must do better than its name to make it one that lacks a word."""
    same_name: int = 5
    """Units with one name from which all of them lack a word of their own."""
    least: float = 0.01
    """Share of units that must change their name in a round for another one."""

    def __post_init__(self) -> None:
        for key, least in (("rounds", 0), ("clusters", 1), ("sure", 0), ("same_name", 2), ("least", 0)):
            if not getattr(self, key) >= least:
                raise ValueError(f"refine.{key}={getattr(self, key)}: must be at least {least}")
        if self.least > 1:
            raise ValueError(f"refine.least={self.least}: must be a share, at most 1")


@dataclass
class ClustersJob:
    out: Folder
    images: ImageList
    activations: Folder
    exemplars: Folder
    image_embeddings: Folder
    vocabulary: Folder
    explanations: Folder
    blocks: list[Block]
    settings: RefineSettings
    wording: Wording
    threads: int


class ClustersWorker:
    """Looks at all units, block by block, and groups those that lack a word."""

    def __init__(self, job: ClustersJob) -> None:
        self.job = job
        worker_device(job.threads)

    @cached_property
    def images_ND(self) -> np.ndarray:
        return matrix(self.job.image_embeddings.read_all("image_embeddings")["embedding"]).astype(np.float32)

    @cached_property
    def mean_image_D(self) -> np.ndarray:
        """Mean vector of the explain images."""
        return self.job.images.mean_vector(self.images_ND)

    @cached_property
    def select(self) -> tuple[np.ndarray, np.ndarray]:
        """Which stored images are of the select split, and their vectors transposed float32 [D, n]."""
        stored = np.flatnonzero(self.job.images.stored)
        chosen = self.job.images.split[stored] == "select"
        return chosen, self.images_ND[stored[chosen]].T

    @cached_property
    def concepts(self) -> tuple[dict[str, int], np.ndarray, list[str]]:
        """Row of each concept, vectors float32 [C, D], ids."""
        table = self.job.vocabulary.read_all("concepts", columns=["concept", "concept_id"])
        vectors = matrix(self.job.vocabulary.read_all("concept_embeddings")["embedding"]).astype(np.float32)
        rows = {concept: i for i, concept in enumerate(table["concept"].to_pylist())}
        return rows, vectors, table["concept_id"].to_pylist()

    def run(self, part: int) -> PartReport:
        report, job = PartReport(part), self.job
        with report.phase("compute"):
            explained = job.explanations.read_all(
                "explanations", columns=["layer", "unit", "phrase", "concepts", "weights"]
            )
            found = [self._lacking(block) for block in range(len(job.blocks))]
            vectors, gaps, lacks = (np.concatenate(columns) for columns in zip(*found, strict=True))
            names = explained["phrase"].to_pylist()
            crowded = {name for name, n in Counter(names).items() if name and n >= job.settings.same_name}
            lacks |= np.array([name in crowded for name in names]) & np.isfinite(gaps)
            table = self._clusters(explained, vectors, gaps, np.flatnonzero(lacks))
        with report.phase("write"):
            job.out.write(part, {"clusters": table})
        report.rows = {"clusters": table.num_rows, "units": int(lacks.sum())}
        return report

    def _lacking(self, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a block's units: mean embedding float32 [U, D], how much better it follows them than their name does, and
        whether that is beyond chance. NaN where a unit has no name or does not vary."""
        job, (rows, vectors, _), (chosen, images_Dn) = self.job, self.concepts, self.select
        stats = job.exemplars.read("unit_stats", part, columns=["sum_cubed", "embedding_sum_cubed"])
        weighted = matrix(stats["embedding_sum_cubed"]) - stats["sum_cubed"].to_numpy()[:, None] * self.mean_image_D
        own = F.normalize(torch.from_numpy(weighted), dim=1).float().numpy()
        pooled = read_block(job.activations, job.images, part)[:, chosen]
        names = job.explanations.read("explanations", part, columns=["phrase"])["phrase"].to_pylist()
        named = vectors[[rows.get(name, 0) for name in names]]
        by_own, by_name = product(own, images_Dn), product(named, images_Dn)
        r_own, r_name = paired(pooled, by_own), paired(pooled, by_name)
        r_name[[name is None for name in names]] = np.nan
        sure = better(r_own, r_name, paired(by_own, by_name), int(chosen.sum()))
        return own, r_own - r_name, np.nan_to_num(sure, nan=-np.inf) > job.settings.sure

    def _clusters(self, explained: pa.Table, vectors: np.ndarray, gaps: np.ndarray, lacking: np.ndarray) -> pa.Table:
        """The clusters of the lacking units, those with the largest sum of gaps first."""
        job, (rows, _, ids) = self.job, self.concepts
        kind = kmeans(vectors[lacking], min(job.settings.clusters, -(-len(lacking) // PER_CLUSTER)))
        told = explained.take(pa.array(lacking)).to_pylist()
        clusters = []
        for number in np.unique(kind):
            members = np.flatnonzero(kind == number)
            weights: Counter = Counter()
            for row in (told[m] for m in members):
                weights.update(dict(zip(row["concepts"], row["weights"], strict=True)))
            phrases = [phrase for phrase, _ in sorted(weights.items(), key=lambda item: (-item[1], item[0]))][:PHRASES]
            clusters.append(
                {
                    "parent": ids[rows[phrases[0]]],
                    "phrases": phrases,
                    "layers": [told[m]["layer"] for m in members],
                    "units": [told[m]["unit"] for m in members],
                    "gap": float(gaps[lacking[members]].mean()),
                }
            )
        clusters.sort(key=lambda row: (-row["gap"] * len(row["units"]), row["phrases"]))
        prompts = cluster_prompts(job.wording, [row["phrases"] for row in clusters])
        columns = ("parent", "phrases", "layers", "units", "gap")
        table = {column: [row[column] for row in clusters] for column in columns}
        return make_table("clusters", table | {"prompt_id": [prompt.prompt_id for prompt in prompts]})


def kmeans(vectors_ND: np.ndarray, number: int) -> np.ndarray:
    """int64 [N], cluster of each unit vector, by cosine (spherical k-means, Dhillon and Modha 2001). The first centre
    is the vector most like the mean, each other one the vector least like all centres before it: no chance is in it."""
    x = torch.from_numpy(vectors_ND)
    if not len(x):
        return np.zeros(0, np.int64)
    chosen = [int((x @ x.mean(0)).argmax())]
    nearest = x @ x[chosen[0]]
    for _ in range(number - 1):
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, x @ x[chosen[-1]])
    centres = x[chosen]
    kind = (x @ centres.T).argmax(1)
    for _ in range(STEPS):
        centres = F.normalize(torch.zeros_like(centres).index_add_(0, kind, x), dim=1)
        before, kind = kind, (x @ centres.T).argmax(1)
        if torch.equal(before, kind):
            break
    return kind.numpy()
