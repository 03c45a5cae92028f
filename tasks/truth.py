"""Stage truth: what validation measures, with the drawn truth in place of CLIP.

In: the names in the neurons table, pooled activations, images that are all drawn scenes. Out: for every unit whose name
the world knows, how well the scenes of the validate split that really show it are those that excite the unit.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.correlation import paired, read_block
from tasks.images import ImageList
from tasks.layers import Block
from tasks.metrics import areas, f1, iou, positives
from tasks.store import Folder, PartReport
from tasks.tables import make_table
from tasks.world.files import number_of, scenes_of
from tasks.world.orders import OWN
from tasks.world.scenes import sample
from tasks.world.truth import UNSURE, YES, album, phrases_seen

MEASURES = ("correlation", "auc", "auprc", "f1", "iou")


@dataclass
class TruthJob:
    out: Folder
    images: ImageList
    activations: Folder
    neurons: Folder
    blocks: list[Block]


class TruthWorker:
    """Measures one unit block; keeps what the scenes show between blocks."""

    def __init__(self, job: TruthJob) -> None:
        self.job = job
        self.stored = np.flatnonzero(job.images.stored)
        self.split = job.images.split[self.stored]

    @cached_property
    def seen(self) -> dict[str, np.ndarray]:
        """YES, NO or UNSURE for every scene of validate, by phrase, of all names in the run that the world knows."""
        names = set(self.job.neurons.read_all("neurons", columns=["phrase"])["phrase"].to_pylist())
        known = sorted(name for name in names if name in OWN)
        uris = self.job.images.table["uri"].take(pa.array(self.stored[self.split == "validate"])).to_pylist()
        scenes = album(sample(scenes_of(uri)[0], number_of(uri)) for uri in uris)
        return dict(zip(known, phrases_seen(scenes, [OWN[name] for name in known]).T, strict=True)) if known else {}

    def run(self, part: int) -> PartReport:
        report, job = PartReport(part), self.job
        with report.phase("read"):
            neurons = job.neurons.read("neurons", part, columns=["layer", "unit", "phrase"])
            pooled_US = read_block(job.activations, job.images, part)
        with report.phase("compute"):
            phrases = neurons["phrase"].to_numpy(zero_copy_only=False)
            chosen = (
                np.flatnonzero([phrase in self.seen for phrase in phrases]) if (self.split == "validate").any() else []
            )
            table = self._table(neurons.take(pa.array(chosen, pa.int64())), pooled_US[chosen])
        with report.phase("write"):
            job.out.write(part, {"truth": table})
        report.rows = {"truth": table.num_rows}
        return report

    def _table(self, neurons: pa.Table, pooled_US: np.ndarray) -> pa.Table:
        a_UN, sample_UM = pooled_US[:, self.split == "validate"], pooled_US[:, self.split == "explain"]
        fires_UN = positives(a_UN, sample_UM)
        phrases = neurons["phrase"].to_numpy(zero_copy_only=False)
        found = {name: np.full(len(phrases), np.nan) for name in MEASURES}
        counts = np.zeros((2, len(phrases)), np.int32)
        for phrase in set(phrases):
            rows, seen_N = np.flatnonzero(phrases == phrase), self.seen[phrase]
            sure = seen_N != UNSURE
            a, fires = a_UN[rows][:, sure], fires_UN[rows][:, sure]
            shows = np.broadcast_to(seen_N[sure] == YES, a.shape)
            measured = paired(a, shows.astype(float)), *areas(a, shows), f1(shows, fires), iou(shows, fires)
            for name, values in zip(MEASURES, measured, strict=True):
                found[name][rows] = values
            counts[:, rows] = [[int(shows[0].sum())], [int((~shows[0]).sum())]]
        columns: dict[str, Any] = {c: neurons[c].combine_chunks() for c in ("layer", "unit", "phrase")}
        columns |= {name: pa.array(values, pa.float32(), from_pandas=True) for name, values in found.items()}
        return make_table("truth", columns | {"shown": counts[0], "absent": counts[1]})
