"""Stage precision: the smallest number format in which a GPU still finds the same exemplars.

In: a hash-fixed sample of images, the target model. Out: one row per format with the share of the float32 top images it
keeps. Half precision makes ties and reorders exemplars, more so in some models than in others, so it is measured.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tasks.forward import HookedTarget, TargetPass
from tasks.layers import Layer, unit_blocks
from tasks.sae import AT_ONCE
from tasks.store import Folder, PartReport
from tasks.tables import make_table

SAMPLE, TOP = 512, 20
KEEPS = 0.95
"""Mean share of the float32 top images that a format must keep."""


@dataclass
class PrecisionJob:
    out: Folder
    model: TargetPass


class PrecisionWorker:
    """Runs the sample in each format."""

    def __init__(self, job: PrecisionJob) -> None:
        self.job = job

    def run(self, part: int) -> PartReport:
        report = PartReport(part)
        with report.phase("compute"):
            reference = self._peaks("float32")
            overlap = {dtype: top_overlap(reference, self._peaks(dtype)) for dtype in ("float16", "bfloat16")}
            overlap["float32"] = 1.0
        with report.phase("write"):
            columns = {"dtype": list(overlap), "overlap": np.array(list(overlap.values()), np.float32)}
            self.job.out.write(part, {"precision": make_table("precision", columns)})
        report.rows = {"precision": len(overlap)}
        return report

    def _peaks(self, dtype: str) -> torch.Tensor:
        """float32 [N, U], peak of every unit on the sample."""
        images, target = self.job.model.images, HookedTarget(replace(self.job.model, dtype=dtype))
        known = np.flatnonzero(images.ok)
        sample = np.sort(known[np.argsort(images.order[known])][:SAMPLE])
        rows: list[torch.Tensor] = []
        current: list[torch.Tensor] = []

        def on_layer(layer: Layer, output: Any) -> None:
            blocks = unit_blocks([layer], AT_ONCE)  # latents come in blocks
            current.extend(layer.maps(output, slice(b.start, b.stop)).amax(2).float() for b in blocks)

        def after_batch(numbers: np.ndarray) -> None:
            rows.append(torch.cat(current, 1)[: len(numbers)].cpu())
            current.clear()

        batches = [sample[i : i + images.batch_size] for i in range(0, len(sample), images.batch_size)]
        target.run(batches, on_layer, after_batch)
        return torch.cat(rows)


def top_overlap(reference_NU: torch.Tensor, other_NU: torch.Tensor) -> float:
    """Mean over units of the share of the reference's top images that the other has too; earlier images win ties."""
    top = min(TOP, len(reference_NU))
    first, second = (x.argsort(dim=0, descending=True, stable=True)[:top] for x in (reference_NU, other_NU))
    member = torch.zeros(reference_NU.shape, dtype=torch.bool).scatter_(0, first, True)
    return float(member.gather(0, second).float().mean())


def choose_dtype(out: Folder) -> str:
    """The first format, half precision first, that keeps enough of the float32 top images."""
    table = out.read("precision", 0)
    kept = dict(zip(table["dtype"].to_pylist(), table["overlap"].to_pylist(), strict=True))
    return next(dtype for dtype in ("float16", "bfloat16", "float32") if kept[dtype] >= KEEPS)
