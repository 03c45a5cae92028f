"""Stage pairs: which units are switched off, and the images of which class are looked at.

In: the sums of the stage screen, the classes of the images. Out: the best (unit, class) pairs by their screen, random
units of the same layer beside each, and for a few classes the units that are switched off together. Part 0 is the only
one. All choices are made on the select split; of validate only the number of images is known here.

Shapes: U units of all layers in block order, C classes.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa

from tasks.classes import Classes
from tasks.images import ImageList
from tasks.layers import Block
from tasks.store import Folder, PartReport, hash64
from tasks.tables import make_table, matrix

LEAST = 4
"""Images of a class, on select and on validate each, below which it is left alone."""
TOGETHER = 64
"""Units of a class that are switched off together at most."""
ROLES = ("pair", "control", "together", "together_control")


@dataclass
class PairsJob:
    out: Folder
    images: ImageList
    screen: Folder
    blocks: list[Block]
    num_classes: int
    pairs: int
    controls: int
    classes: int
    to: str
    """zero or mean."""


class PairsWorker:
    """Merges the screen over all shards and takes the best of it."""

    def __init__(self, job: PairsJob) -> None:
        self.job = job
        self.layers = np.concatenate([[block.layer] * len(block) for block in job.blocks])
        self.units = np.concatenate([np.arange(block.start, block.stop) for block in job.blocks])

    def run(self, part: int) -> PartReport:
        report = PartReport(part)
        with report.phase("read"):
            means_UC, values_U = self._merged()
        with report.phase("compute"):
            classes = Classes(self.job.screen, self.job.images)
            counts = [classes.count(split, self.job.num_classes) for split in ("select", "validate")]
            means_UC[:, np.minimum(*counts) < LEAST] = 0
            rows = self._pairs(means_UC)
            right = classes.count("select", self.job.num_classes, right=True)
            for own in best_known(right, *counts)[: self.job.classes]:
                rows += self._together(means_UC, own)
            table = self._table(rows, means_UC, values_U)
        with report.phase("write"):
            self.job.out.write(part, {"pairs": table})
        report.rows = {"pairs": sum(row[0] == "pair" for row in rows), "rows": len(rows)}
        return report

    def _merged(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [U, C], mean over the class's images of the estimated fall of its logit, zero for classes without
        images; and what each unit is set to, float64 [U]. Summed in shard order."""
        job, shards = self.job, range(self.job.images.num_shards)
        found = [job.screen.read("screen_counts", shard) for shard in shards]
        classes = [table["class_index"].to_numpy() for table in found]
        counts = np.zeros(job.num_classes)
        for own, table in zip(classes, found, strict=True):
            counts[own] += table["images"].to_numpy()
        means, values = [], []
        for part, block in enumerate(job.blocks):
            effect, gradient = np.zeros((2, len(block), job.num_classes))
            activation = np.zeros(len(block))
            for shard in shards:
                table = job.screen.read("screen", shard, group=part)
                effect[:, classes[shard]] += matrix(table["effect"], len(classes[shard]))
                gradient[:, classes[shard]] += matrix(table["gradient"], len(classes[shard]))
                activation += table["activation"].to_numpy()
            value = activation / max(counts.sum(), 1) * (job.to == "mean")
            means.append(((effect - value[:, None] * gradient) / counts.clip(min=1)).astype(np.float32))
            values.append(value)
        return np.concatenate(means), np.concatenate(values)

    def _pairs(self, means_UC: np.ndarray) -> list[tuple[str, int, int, int]]:
        """Rows (role, rank, class, number of the unit): the largest means above zero, with their controls."""
        flat = means_UC.reshape(-1)
        rows = []
        for rank, place in enumerate(largest(flat, self.job.pairs)):
            unit, own = (int(i) for i in np.divmod(place, self.job.num_classes))
            rows.append(("pair", rank, own, unit))
            rows += [("control", rank, own, other) for other in self._random(unit, own)[: self.job.controls]]
        return rows

    def _together(self, means_UC: np.ndarray, own: int) -> list[tuple[str, int, int, int]]:
        """The class's most important units, and for each a random one of its layer that is none of them."""
        best = [int(unit) for unit in largest(means_UC[:, own], TOGETHER)]
        used, rows = set(best), []
        for rank, unit in enumerate(best):
            rows.append(("together", rank, own, unit))
            other = next((i for i in self._random(unit, own) if i not in used), None)
            if other is not None:
                rows.append(("together_control", rank, own, other))
                used.add(other)
        return rows

    def _random(self, unit: int, own: int) -> list[int]:
        """The other units of a unit's layer, in an order that hangs on layer, class and number alone."""
        return [i for i in self._shuffled(self.layers[unit], own) if i != unit]

    @cache  # noqa: B019, a worker lives as long as its stage
    def _shuffled(self, layer: str, own: int) -> list[int]:
        members = np.flatnonzero(self.layers == layer).tolist()
        return sorted(members, key=lambda i: hash64(f"control:{layer}:{self.units[i]}:{own}"))

    def _table(self, rows: list[tuple[str, int, int, int]], means_UC: np.ndarray, values_U: np.ndarray) -> pa.Table:
        role, place = [row[0] for row in rows], np.array([row[1:] for row in rows], np.int64).reshape(-1, 3)
        rank, own, unit = place.T
        columns = {"role": role, "rank": rank, "class_index": own, "layer": self.layers[unit], "unit": self.units[unit]}
        columns |= {"screen": means_UC[unit, own], "value": values_U[unit]}
        return make_table("pairs", columns)


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest values above zero, at most `count`, largest first; of equals the first."""
    found = np.flatnonzero(values > 0)
    if len(found) > count:
        found = found[values[found] >= np.partition(values[found], -count)[-count]]
    return found[np.argsort(-values[found], kind="stable")][:count]


def best_known(right: np.ndarray, select: np.ndarray, validate: np.ndarray) -> list[int]:
    """Classes with enough images, the one with the largest share right on select first; then the one with most images.

    All are right where the model itself says what the class is.
    """
    enough = np.flatnonzero(np.minimum(select, validate) >= LEAST)
    share = right[enough] / select[enough]
    return enough[np.lexsort((enough, -select[enough], -share))].tolist()
