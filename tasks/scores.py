"""Stage scores: the best concepts of every unit.

In: patches and their embeddings, exemplars, unit_stats, pooled activations of the explain sample, image embeddings,
concepts and their embeddings. Out: the kept concepts of each unit, ranked; among them the one that says most beside the
best. Units go through in chunks of one fixed size: nothing is held that has a row for each unit of a block and a column
for each concept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tasks.correlation import read_block
from tasks.crops import MAX_CROPS
from tasks.evidence import Evidence, Sample
from tasks.forward import worker_device
from tasks.images import ImageList
from tasks.layers import Block
from tasks.meanings import above_median, adding, meaning_shares, share
from tasks.pixels import to_device
from tasks.scorers import SCORERS, ScorerSettings, following, log_mean_exp, share_asked, weighted_mean
from tasks.signs import rectified
from tasks.store import Folder, PartReport, hash64
from tasks.tables import make_table, matrix

CHUNK = 32
"""Units scored at once."""
NULL_CROPS = 2048
"""Random crops per size behind the null mean and deviation."""


@dataclass
class ScoresJob:
    out: Folder
    images: ImageList
    activations: Folder
    exemplars: Folder
    patches: Folder
    embeddings: Folder
    image_embeddings: Folder
    vocabulary: Folder
    blocks: list[Block]
    settings: ScorerSettings
    k: int
    """Exemplars per unit (activations.k)."""
    num_patches: int
    """Patches per unit (patches.k)."""
    threads: int


class ScoresWorker:
    """Scores one unit block; keeps the embeddings of all crops, images and concepts between blocks."""

    def __init__(self, job: ScoresJob) -> None:
        self.job, self.device = job, worker_device(job.threads)
        self.scorer = SCORERS[job.settings.name]
        self.marginal, self.laid = lru_cache(maxsize=4)(self._marginal), lru_cache(maxsize=4)(self._laid)

    @cached_property
    def concepts(self) -> pa.Table:
        columns = ["concept_id", "concept", "family"]
        return self.job.vocabulary.read_all("concepts", columns=columns).combine_chunks()

    @cached_property
    def concepts_CD(self) -> torch.Tensor:
        vectors = matrix(self.job.vocabulary.read_all("concept_embeddings")["embedding"])
        return torch.from_numpy(vectors.astype(np.float32)).to(self.device)

    @cached_property
    def images_ND(self) -> np.ndarray:
        return matrix(self.job.image_embeddings.read_all("image_embeddings")["embedding"])

    @cached_property
    def crops(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sorted crop ids, their vectors float16 [n, D] and their levels; a whole image has the image's vector."""
        crops = self.job.patches.read_all("crops", columns=["crop_id", "level"])
        ids, levels = crops["crop_id"].to_numpy(), crops["level"].to_numpy()
        vectors = np.empty((len(ids), self.images_ND.shape[1]), np.float16)
        whole = ids % MAX_CROPS == 0
        vectors[whole] = self.images_ND[ids[whole] // MAX_CROPS]
        cut, start = np.flatnonzero(~whole), 0
        for part in range(self.job.images.num_shards):  # gigabytes in all: one part at a time
            embeddings = self.job.embeddings.read("embeddings", part)
            place = cut[start : start + len(embeddings)]
            assert np.array_equal(embeddings["crop_id"].to_numpy(), ids[place]), "embeddings do not match the crops"
            vectors[place] = matrix(embeddings["embedding"], vectors.shape[1])
            start += len(embeddings)
        assert start == len(cut), "embeddings do not match the crops"
        return ids, vectors, levels

    @cached_property
    def null(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation [L, C] of the similarity of a hash-fixed sample of crops of each level to each concept.

        All are of explain images: at level 0 any of them whole, else crops of exemplars. A level without crops has mean
        0 and deviation 1.
        """
        ids, vectors, levels = self.crops
        known = np.flatnonzero(self.job.images.explain)
        means, stds = [], []
        for level in range(int(levels.max(initial=0)) + 1):
            members = known * MAX_CROPS if level == 0 else ids[levels == level]
            chosen = members[np.argsort([hash64(f"null:{i}") for i in members], kind="stable")[:NULL_CROPS]]
            sample = self.images_ND[chosen // MAX_CROPS] if level == 0 else vectors[np.searchsorted(ids, chosen)]
            similarity = torch.from_numpy(sample.astype(np.float32)).to(self.device) @ self.concepts_CD.T
            few = len(chosen) < 2
            means.append(torch.zeros(len(self.concepts_CD), device=self.device) if few else similarity.mean(0))
            stds.append(torch.ones(len(self.concepts_CD), device=self.device) if few else similarity.std(0))
        return torch.stack(means), torch.stack(stds)

    @cached_property
    def mean_image_D(self) -> np.ndarray:
        """Mean vector of the explain images."""
        return self.job.images.mean_vector(self.images_ND)

    @cached_property
    def covariance_DD(self) -> torch.Tensor:
        """Of the vectors of the explain images."""
        total = torch.zeros(len(self.mean_image_D), len(self.mean_image_D), dtype=torch.float64)
        for rows in self.job.images.explain_slices():
            centred = torch.from_numpy(self.images_ND[rows] - self.mean_image_D)
            total += centred.T @ centred
        return (total / max(self.job.images.explain.sum(), 1)).float().to(self.device)

    @cached_property
    def rectified(self) -> dict[str, bool]:
        return rectified(self.job.exemplars)

    @cached_property
    def in_sample(self) -> np.ndarray:
        """bool, which of the stored images are of the explain split."""
        return self.job.images.explain[self.job.images.stored]

    @cached_property
    def sample(self) -> Sample:
        images = self.images_ND[self.job.images.stored][self.in_sample].astype(np.float32)
        vectors_SD = torch.from_numpy(images).to(self.device)
        mean_D = vectors_SD.mean(0) if len(vectors_SD) else vectors_SD.sum(0)
        return Sample(vectors_SD - mean_D, mean_D, self.concepts_CD)

    def run(self, part: int) -> PartReport:
        report, block = PartReport(part), self.job.blocks[part]
        with report.phase("read"):
            _ = self.concepts_CD, self.crops, self.null, self.covariance_DD
        with report.phase("compute"), torch.inference_mode():
            layer = [i for i, b in enumerate(self.job.blocks) if b.layer == block.layer]
            marginal_C = self.scorer.marginal * self.marginal(tuple(layer)) if self.scorer.marginal else 0
            after = self.scorer.after or (lambda _, scores_UC: scores_UC)
            chunks = [
                self._kept(evidence, after(evidence, s - marginal_C * share_asked(evidence, self.job.settings)))
                for evidence, s in self._scored(part)
            ]
            found = {c: torch.cat([chunk[c] for chunk in chunks]).cpu().numpy() for c in chunks[0]}
            found["negative"] = np.repeat(self._negatives(part)[:, None], found["concept"].shape[1], 1)
            table = self._table(block, found)
        with report.phase("write"):
            self.job.out.write(part, {"scores": table})
        report.rows = {"scores": table.num_rows}
        return report

    def _negatives(self, part: int) -> np.ndarray:
        """Object [units]: the concept that correlates best over the explain sample with the unit's negative side, what
        a rectified unit would say that has its opposite sign; None where it has none. Whatever the scorer, it is chosen
        by what validation measures."""
        job, block = self.job, self.job.blocks[part]
        found = np.full(len(block), None, object)
        if self.rectified[block.layer]:
            return found
        names = self.concepts["concept"].to_numpy(zero_copy_only=False)
        negative_US = read_block(job.activations, job.images, part, "negative")[:, self.in_sample]
        chunks = (negative_US[start : start + CHUNK] for start in range(0, len(block), CHUNK))
        most = [following(to_device(chunk_US, self.device), self.sample).max(1) for chunk_US in chunks]
        best, index = (torch.cat(values).cpu().numpy() for values in zip(*most, strict=True))
        found[best > 0] = names[index[best > 0]]
        return found

    def _marginal(self, parts: tuple[int, ...]) -> torch.Tensor:
        """[C], log of the mean of exp(score) over all units of a layer that have exemplars, whatever its blocks.

        A sum over few exemplars is that much larger: raised to what it would be over all, else a unit that three images
        excite would be the marginal of the whole layer.
        """
        total_C = torch.full((len(self.concepts_CD),), -torch.inf, dtype=torch.float64, device=self.device)
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        for part in parts:
            for evidence, scores_UC in self._scored(part):
                asked_U1 = share_asked(evidence, self.job.settings)
                raised_UC = (scores_UC / asked_U1.clamp(min=1e-6)).masked_fill(asked_U1 == 0, -torch.inf)
                total_C = torch.logaddexp(total_C, raised_UC.double().logsumexp(0))
                count += (asked_U1 > 0).sum()
        units = int(count)  # the one value that the host waits for
        return log_mean_exp(total_C, units).float() if units else torch.zeros_like(total_C, dtype=torch.float32)

    def _scored(self, part: int) -> Iterator[tuple[Evidence, torch.Tensor]]:
        """Evidence and scores [U, C], chunk by chunk."""
        laid = self.laid(part)
        for start in range(0, len(self.job.blocks[part]), CHUNK):
            evidence = self._evidence(*(rows[start : start + CHUNK] for rows in laid))
            yield evidence, self.scorer.score(evidence, **self.job.settings.params)

    def _laid(self, part: int) -> tuple[np.ndarray, ...]:
        """What is known of a block's units, as _evidence takes it; read once for the marginal and for the scores."""
        block, read = self.job.blocks[part], self.job.exemplars.read
        crop_UP = _by_rank(self._patches(part), "crop_id", block, self.job.num_patches)
        exemplars = read("exemplars", part, columns=["unit", "rank", "image"], filters=[("tail", "==", "top")])
        image_UK = _by_rank(exemplars, "image", block, self.job.k)
        stats = read("unit_stats", part, columns=["sum", "embedding_sum", "sum_cubed", "embedding_sum_cubed"])
        sums_2UD = [
            matrix(stats[f"embedding_{name}"]) - stats[name].to_numpy()[:, None] * self.mean_image_D
            for name in ("sum", "sum_cubed")
        ]
        pooled_US = read_block(self.job.activations, self.job.images, part)[:, self.in_sample]
        return crop_UP, image_UK, *sums_2UD, pooled_US

    def _patches(self, part: int) -> pa.Table:
        columns = ["unit", "tail", "rank", "crop_id"]
        shards = range(self.job.images.num_shards)
        found = pa.concat_tables([self.job.patches.read("patches", s, columns=columns, group=part) for s in shards])
        return found.filter(pc.field("tail") == "top")

    def _evidence(
        self,
        crop_UP: np.ndarray,
        image_UK: np.ndarray,
        summed_UD: np.ndarray,
        weighted_UD: np.ndarray,
        pooled_US: np.ndarray,
    ) -> Evidence:
        ids, vectors, levels = self.crops
        has_patch_UP, exemplars_UKD = crop_UP >= 0, self.images_ND[image_UK.clip(0)]
        exemplars_UKD[image_UK < 0] = 0
        place = np.searchsorted(ids, crop_UP[has_patch_UP])
        patches_UPD = np.zeros((*crop_UP.shape, vectors.shape[1]), np.float16)
        levels_UP = np.zeros(crop_UP.shape, np.int64)
        patches_UPD[has_patch_UP], levels_UP[has_patch_UP] = vectors[place], levels[place]

        def device(array: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return to_device(np.ascontiguousarray(array), self.device).to(dtype)

        return Evidence(
            concepts_CD=self.concepts_CD,
            patches_UPD=device(patches_UPD),
            has_patch_UP=device(has_patch_UP, torch.bool),
            levels_UP=device(levels_UP, torch.int64),
            exemplars_UKD=device(exemplars_UKD),
            has_exemplar_UK=device(image_UK >= 0, torch.bool),
            summed_UD=device(summed_UD),
            weighted_UD=device(weighted_UD),
            null_mean_LC=self.null[0],
            null_std_LC=self.null[1],
            sample=self.sample,
            activations_US=device(pooled_US),
        )

    def _kept(self, evidence: Evidence, scores_UC: torch.Tensor) -> dict[str, torch.Tensor]:
        """The kept concepts of a few units: columns [U, R] of the table, on the device."""
        keep = min(self.job.settings.keep, scores_UC.shape[1])
        best, index = scores_UC.topk(keep, dim=1)
        lead_UC = above_median(weighted_mean(evidence))
        weight_UC = lead_UC if self.scorer.logs else above_median(scores_UC)
        first_U1 = index[:, :1]
        adds = adding(evidence, first_U1, self.covariance_DD) if keep > 1 else torch.full_like(first_U1, -1)
        missing = (index != adds).all(1) & (adds[:, 0] >= 0)
        added_U = scores_UC.gather(1, adds.clamp(min=0))[:, 0]
        index[:, -1] = torch.where(missing, adds[:, 0], index[:, -1])
        best[:, -1] = torch.where(missing, added_U, best[:, -1])
        shares_U2 = meaning_shares(evidence, first_U1, adds)
        other = torch.where((index == adds) & (shares_U2[:, 1:] > 0), shares_U2[:, 1:], torch.nan)
        meaning = torch.where(index == first_U1, shares_U2[:, :1], other)
        return {
            "concept": index,
            "score": best,
            "lead": weight_UC.gather(1, index),
            "null_z": evidence.null_z().gather(1, index),
            "share": share(evidence, index),
            "meaning": meaning,
            "adds": index == adds,
        }

    def _table(self, block: Block, found: dict[str, np.ndarray]) -> pa.Table:
        """The scores table from its columns [U, R]; `concept` has rows of the vocabulary."""
        units, keep = found["concept"].shape
        columns: dict[str, Any] = {name: values.reshape(-1) for name, values in found.items()}
        chosen = pa.array(columns["concept"])
        columns |= {name: self.concepts[name].take(chosen).combine_chunks() for name in self.concepts.column_names}
        columns["meaning"] = pa.array(columns["meaning"], from_pandas=True)  # NaN becomes null
        columns |= {"unit": np.repeat(np.arange(block.start, block.stop), keep)}
        columns |= {"layer": pa.repeat(block.layer, units * keep), "rank": np.tile(np.arange(keep), units)}
        return make_table("scores", columns)


def _by_rank(table: pa.Table, column: str, block: Block, width: int) -> np.ndarray:
    """int64 [units, width] of a column of a block's table laid out by rank, -1 where a unit has fewer."""
    laid = np.full((len(block), width), -1, np.int64)
    laid[table["unit"].to_numpy() - block.start, table["rank"].to_numpy()] = table[column].to_numpy()
    return laid
