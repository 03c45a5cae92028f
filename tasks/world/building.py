"""Stage world: the world's models.

In: a folder to write into and a seed. Out: the models there (clip/, resnet.safetensors, vit.safetensors,
vit_registers.safetensors, llm/), and two tables: what each can do on scenes that it has not seen, and what was planted.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from tasks.forward import worker_device
from tasks.store import Folder, PartReport
from tasks.tables import make_table
from tasks.world import clip, language, targets
from tasks.world.concepts import CONCEPTS, lexicon_text
from tasks.world.planting import Planted

PARTS = (("clip",), ("vit", "vit_registers"), ("resnet",), ("llm",))
"""Models of each part: those that build on each other together, the slowest first."""


@dataclass
class WorldJob:
    out: Folder
    """Of the tables measures, planted."""
    folder: str
    """Where the models are written."""
    seed: int
    effort: float
    """Share of the usual training steps: 1 for real, less for a quick look."""
    threads: int


class WorldWorker:
    """Makes one model."""

    SCENES = 1000
    """Fresh scenes that a model is measured on."""

    def __init__(self, job: WorldJob) -> None:
        self.job = job
        self.device = worker_device(job.threads)

    def run(self, part: int) -> PartReport:
        report, measures, planted = PartReport(part), [], []
        with report.phase("compute"):
            for name in PARTS[part]:
                units, auroc, figures = self._make(name)
                measures.append(_measures_table(name, figures))
                planted.append(_planted_table(name, units, auroc))
        tables = {"measures": pa.concat_tables(measures), "planted": pa.concat_tables(planted)}
        with report.phase("write"):
            self.job.out.write(part, tables)
        report.rows = {name: table.num_rows for name, table in tables.items()}
        return report

    def _make(self, name: str) -> tuple[list[Planted], np.ndarray, dict[str, float]]:
        folder, seed = Path(self.job.folder), self.job.seed
        if name == "llm":
            steps = max(round(language.STEPS * self.job.effort), 1)
            return [], np.zeros(0), language.train_language(folder / "llm", seed, steps, self.device)
        recipe = clip.RECIPE if name == "clip" else targets.NETS[name].recipe
        recipe = replace(recipe, steps=max(round(recipe.steps * self.job.effort), 1))
        count = max(round(self.SCENES * self.job.effort), 100)
        if name == "clip":
            return [], np.zeros(0), clip.train_clip(folder / "clip", seed, self.device, recipe, count)
        return targets.train_target(folder, name, seed, self.device, recipe, 2 * count)


def _measures_table(model: str, figures: dict[str, float]) -> pa.Table:
    return make_table(
        "measures", {"model": [model] * len(figures), "measure": [*figures], "value": [*figures.values()]}
    )


def _planted_table(net: str, units: list[Planted], auroc: np.ndarray) -> pa.Table:
    columns = {
        "net": [net] * len(units),
        "layer": [u.layer for u in units],
        "unit": [u.unit for u in units],
        "kind": [u.kind for u in units],
        "family": [u.family for u in units],
        "concepts": [list(u.concepts) for u in units],
        "source": [u.source for u in units],
        "auroc": [None if np.isnan(a) else float(a) for a in auroc],
    }
    return make_table("planted", columns)


def write_words(folder: Path) -> None:
    """The names of the nets' outputs, and the world's word list."""
    (folder / "class_names.txt").write_text("\n".join(CONCEPTS) + "\n")
    (folder / "lexicon.txt").write_text(lexicon_text())
