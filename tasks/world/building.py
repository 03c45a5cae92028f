"""Stage world: the world's models, one part each.

In: a folder to write into and a seed. Out: the models there (clip/, resnet.safetensors, vit.safetensors,
vit_registers.safetensors, llm/), and two tables: what each can do on scenes that it has not seen, and what was planted.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tasks.forward import worker_device
from tasks.store import Folder, PartReport
from tasks.tables import make_table
from tasks.world import clip, language, targets
from tasks.world.concepts import CONCEPTS, lexicon_text
from tasks.world.planting import Planted

MODELS = ("clip", *targets.NETS, "llm")
"""Part number -> model; the slowest first, so that two workers end at about the same time."""


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

    def __init__(self, job: WorldJob) -> None:
        self.job = job
        self.device = worker_device(job.threads)

    def run(self, part: int) -> PartReport:
        report, name = PartReport(part), MODELS[part]
        with report.phase("compute"):
            units, auroc, figures = self._make(name)
        measures = {"model": [name] * len(figures), "measure": list(figures), "value": list(figures.values())}
        tables = {"measures": make_table("measures", measures), "planted": planted_table(name, units, auroc)}
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
        if name == "clip":
            return [], np.zeros(0), clip.train_clip(folder / "clip", seed, self.device, recipe)
        return targets.train_target(folder, name, seed, self.device, recipe)


def planted_table(net: str, units: list[Planted], auroc: np.ndarray):
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
