"""Stage validation: does the name predict the unit on images that did not make it?

In: explanations, pooled activations and image embeddings; of a second CLIP, where one judges, image embeddings and
concept vectors. Out: one row a unit: on validate the correlation with its interval and p value, and how well the name
finds the unit's strongest images, and the correlation of the negative side; on select the best rival concept.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from tasks.correlation import better, bootstrap, followed, paired, permutation_p, product, read_block, redrawn
from tasks.forward import worker_device
from tasks.images import SPLITS, ImageList
from tasks.layers import Block
from tasks.metrics import areas, f1, iou, mad, positives
from tasks.store import Folder, PartReport
from tasks.tables import make_table, matrix

SYNONYM = 0.9
"""Text cosine from which two concepts count as one meaning, so that neither is the other's rival."""
UNITS = 64
"""Units measured at once: bounds the memory."""


@dataclass
class Judge:
    """Where the vectors lie of a CLIP that judges names which another one made."""

    image_embeddings: Folder
    phrase_embeddings: Folder
    """Of the vocabulary's concepts, in their order."""


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
    judge: Judge | None = None
    """None where the CLIP that made the names judges them."""


class ValidationWorker:
    """Correlations of one unit block as products of standardised activations and similarities."""

    def __init__(self, job: ValidationJob) -> None:
        self.job = job
        worker_device(job.threads)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row of each concept in the vocabulary."""
        concepts = self.job.vocabulary.read_all("concepts", columns=["concept"])["concept"].to_pylist()
        return {concept: row for row, concept in enumerate(concepts)}

    @cached_property
    def made_by(self) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of the images, float32 [N, D], and of the concepts, [C, D], by the CLIP that made the names."""
        job = self.job
        return _vectors(job.image_embeddings, "image_embeddings"), _vectors(job.vocabulary, "concept_embeddings")

    @cached_property
    def judged_by(self) -> tuple[np.ndarray, np.ndarray]:
        """The same by the CLIP that judges them."""
        judge = self.job.judge
        if judge is None:
            return self.made_by
        return (
            _vectors(judge.image_embeddings, "image_embeddings"),
            _vectors(judge.phrase_embeddings, "phrase_embeddings"),
        )

    @cached_property
    def stored(self) -> np.ndarray:
        """Numbers of the images whose pooled activations are stored."""
        return np.flatnonzero(self.job.images.stored)

    @cached_property
    def of(self) -> dict[str, np.ndarray]:
        """Places of each split's images among the stored ones."""
        split = self.job.images.split[self.stored]
        return {name: np.flatnonzero(split == name) for name in SPLITS}

    @cached_property
    def times_ND(self) -> np.ndarray:
        """How often each image of validate is in each draw of the bootstrap."""
        return redrawn(len(self.of["validate"]))

    def run(self, part: int) -> PartReport:
        report, job = PartReport(part), self.job
        with report.phase("read"):
            explanations = job.explanations.read("explanations", part)
            pooled_US = read_block(job.activations, job.images, part)
        with report.phase("compute"):
            table = self._validate(part, explanations, pooled_US)
        with report.phase("write"):
            job.out.write(part, {"validation": table})
        report.rows = {"validation": table.num_rows}
        return report

    def _validate(self, part: int, explanations: pa.Table, pooled_US: np.ndarray) -> pa.Table:
        block = self.job.blocks[part]
        names = explanations["concepts"].to_pylist()
        most = max(map(len, names))  # fewer where a name is older than the vocabulary's later concepts: its own again
        names = np.array([row + row[:1] * (most - len(row)) for row in names], object)
        concepts_UR = np.array([[self.row_of[c] for c in row] for row in names])
        rival, gain = self._rivals(concepts_UR, pooled_US)
        measured = self._measured(concepts_UR[:, 0], pooled_US)
        nameless = explanations["phrase"].is_null().to_numpy()
        for values in (gain, *measured.values()):
            values[nameless] = np.nan
        columns = {
            "layer": [block.layer] * len(block),
            "unit": np.arange(block.start, block.stop),
            "images": [len(self.of["validate"])] * len(block),
            "rival": [names[u, i] if i >= 0 and not nameless[u] else None for u, i in enumerate(rival)],
            "rival_gain": _nullable(gain, pa.float32()),
            "p": _nullable(measured.pop("p"), pa.float64()),
        }
        measured["negative_confidence"] = self._negative(part, explanations["negative"].to_pylist())
        columns |= {column: _nullable(values, pa.float32()) for column, values in measured.items()}
        return make_table("validation", columns)

    def _rivals(self, concepts_UR: np.ndarray, pooled_US: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each unit's other concepts the best on select, by the CLIP that made the names."""
        (images_ND, vectors_CD), select = self.made_by, self.of["select"]
        vectors_URD = vectors_CD[concepts_UR]
        found = followed(pooled_US[:, select], images_ND[self.stored[select]], vectors_URD)
        return best_rival(*found, vectors_URD, len(select))

    def _measured(self, names_U: np.ndarray, pooled_US: np.ndarray) -> dict[str, np.ndarray]:
        """What `measures` says of each unit and its name, by the CLIP that judges.

        In float64 the products of float16 vectors are exact: whatever the blocks, no image crosses a threshold.
        """
        images_ND, vectors_CD = self.judged_by
        images_DS = np.ascontiguousarray(images_ND[self.stored].T, np.float64)
        found = []
        for start in range(0, len(names_U), UNITS):
            rows = slice(start, start + UNITS)
            similarity_US = product(vectors_CD[names_U[rows]].astype(np.float64), images_DS)
            found.append(measures(pooled_US[rows], similarity_US, self.of, self.times_ND))
        return {column: np.concatenate([part[column] for part in found]) for column in found[0]}

    def _negative(self, part: int, names: list[str | None]) -> np.ndarray:
        """float64 [units], correlation on validate of each unit's negative side with what that is called, by the CLIP
        that judges; NaN where it is called nothing."""
        found, units = np.full(len(names), np.nan), np.flatnonzero([name is not None for name in names])
        if not len(units):
            return found
        negative_US = read_block(self.job.activations, self.job.images, part, "negative")[:, self.of["validate"]]
        images_ND, vectors_CD = self.judged_by
        images_DS = np.ascontiguousarray(images_ND[self.stored[self.of["validate"]]].T, np.float64)
        for start in range(0, len(units), UNITS):
            rows = units[start : start + UNITS]
            vectors_UD = vectors_CD[[self.row_of[str(names[unit])] for unit in rows]].astype(np.float64)
            found[rows] = paired(negative_US[rows], product(vectors_UD, images_DS))
        return found


def measures(
    a_US: np.ndarray, s_US: np.ndarray, of: dict[str, np.ndarray], times_ND: np.ndarray
) -> dict[str, np.ndarray]:
    """Columns of the validation table, float64 [U], from pooled activations and similarities with each unit's name.

    `of` has the places of each split; `times_ND` is tasks.correlation.redrawn of validate. What is positive on validate
    is told by the images of explain.
    """
    a, s = a_US[:, of["validate"]], s_US[:, of["validate"]]
    fires, said = positives(a, a_US[:, of["explain"]]), positives(s, s_US[:, of["explain"]])
    lower, upper = bootstrap(a, s, times_ND)
    auc, auprc = areas(s, fires)
    return {
        "correlation": paired(a, s),
        "lower": lower,
        "upper": upper,
        "p": permutation_p(a, s),
        "auprc": auprc,
        "auc": auc,
        "f1": f1(fires, said),
        "iou": iou(fires, said),
        "mad": mad(a, said),
    }


def _vectors(folder: Folder, table: str) -> np.ndarray:
    return matrix(folder.read_all(table, columns=["embedding"])["embedding"]).astype(np.float32)


def _nullable(values: np.ndarray, dtype: pa.DataType) -> pa.Array:
    return pa.array(values, dtype, from_pandas=True)  # NaN becomes null


def best_rival(
    r_UR: np.ndarray, with_first_UR: np.ndarray, vectors_URD: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each unit's other concepts that are no synonyms of the first, the best on select: its index and its gain.

    The first two are what `followed` finds over `count` images. The gain is that of tasks.correlation.better, in
    standard errors: both concepts are judged on the same images and are often alike, so their correlations differ by
    chance much less than two do. Index -1 and gain NaN where there is no rival.
    """
    cosine = (vectors_URD * vectors_URD[:, :1]).sum(2)
    r = np.where((cosine < SYNONYM) & np.isfinite(r_UR), r_UR, -np.inf)
    index, rows = r.argmax(1), np.arange(len(r))
    known = np.isfinite(r[rows, index]) & np.isfinite(r_UR[:, 0])
    gain = better(np.where(known, r[rows, index], np.nan), r_UR[:, 0], with_first_UR[rows, index], count)
    return np.where(known, index, -1), gain
