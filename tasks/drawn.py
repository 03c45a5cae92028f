"""Stage drawn: every name tested on scenes that were drawn for it, with and without what it says.

In: the names in the neurons table, the target model. Out: for every named unit the chance that a fresh scene that shows
the name excites it more than one that does not (CoSy, NeurIPS 2024, with a renderer in place of a diffusion model).

Shapes: S scenes that show a phrase, N that do not, U units.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from scipy.stats import rankdata

from tasks.forward import HookedTarget, TargetPass
from tasks.layers import Layer
from tasks.store import Folder, PartReport
from tasks.tables import make_table
from tasks.world.orders import OWN, pool, showing
from tasks.world.truth import NO, phrases_seen

PHRASES_PER_PART = 32
"""Fixed, so that the number of workers changes no number."""


@dataclass
class DrawnSettings:
    num: int = 48
    """Scenes drawn per name that show it, and as many that do not."""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"drawn.num={self.num}: must be at least 1")


@dataclass
class DrawnJob:
    out: Folder
    model: TargetPass
    neurons: Folder
    pool: str
    settings: DrawnSettings


def named_phrases(neurons: Folder) -> list[str]:
    """Every phrase that names a unit of the run, sorted; parts are slices of this list."""
    return sorted(set(neurons.read_all("neurons", columns=["phrase"])["phrase"].drop_null().to_pylist()))


class DrawnWorker:
    """Draws scenes for the phrases of one part and runs the target model over them."""

    def __init__(self, job: DrawnJob) -> None:
        self.job = job
        self.target = HookedTarget(job.model)

    def run(self, part: int) -> PartReport:
        report, job = PartReport(part), self.job
        with report.phase("read"):
            phrases = named_phrases(job.neurons)[part * PHRASES_PER_PART : (part + 1) * PHRASES_PER_PART]
            units = job.neurons.read_all("neurons", columns=["layer", "unit", "phrase"])
            units = units.filter(pc.field("phrase").isin(pa.array(phrases, pa.string())))
        with report.phase("draw"):
            scenes, shown, absent = draw_tests([p for p in phrases if p in OWN], job.settings.num)
        with report.phase("compute"):
            activations = self._activations(scenes, units)
            table = _table(units, activations, shown, absent)
        with report.phase("write"):
            job.out.write(part, {"drawn": table})
        report.rows = {"drawn": table.num_rows, "phrases": len(phrases), "scenes": len(scenes)}
        unknown = sum(phrase not in OWN for phrase in phrases)
        report.skipped = {"phrases_not_of_the_world": unknown} if unknown else {}
        return report

    def _activations(self, scenes: np.ndarray, units: pa.Table) -> np.ndarray:
        """float32 [scenes, U], in the order of `units`."""
        layers, numbers = units["layer"].to_numpy(zero_copy_only=False), units["unit"].to_numpy()
        rows = {layer.name: np.flatnonzero(layers == layer.name) for layer in self.job.model.layers}
        chosen = {
            name: torch.from_numpy(numbers[r].astype(np.int64)).to(self.target.device) for name, r in rows.items()
        }
        found: dict[str, list[torch.Tensor]] = {name: [] for name in rows}

        def on_layer(layer: Layer, output: Any) -> None:
            found[layer.name].append(layer.pooled(output, self.job.pool, chosen[layer.name]))

        self.target.run_arrays(scenes, on_layer)
        activations = np.empty((len(scenes), len(numbers)), np.float32)
        for name, batches in found.items():
            if batches:
                activations[:, rows[name]] = torch.cat(batches)[: len(scenes)].cpu().numpy()
        return activations


def draw_tests(phrases: list[str], num: int) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """uint8 [scenes, side, side, 3], and by phrase the numbers of the scenes that show it and that do not.

    Phrases share the scenes that they are absent from; a scene of which it is hard to say is in neither.
    """
    random = pool(num)
    seen = phrases_seen(random, [OWN[phrase] for phrase in phrases]) if phrases else np.empty((len(random), 0))
    absent = {phrase: np.flatnonzero(seen[:, i] == NO)[:num] for i, phrase in enumerate(phrases)}
    kept = np.unique(np.concatenate([np.empty(0, np.int64), *absent.values()]))
    scenes, shown = [random.pixels[kept]], {}
    start = len(kept)
    for phrase in phrases:
        scenes.append(showing(OWN[phrase], num))
        shown[phrase] = np.arange(start, start + len(scenes[-1]))
        start += len(scenes[-1])
    return np.concatenate(scenes), shown, {p: np.searchsorted(kept, numbers) for p, numbers in absent.items()}


def _table(
    units: pa.Table, activations: np.ndarray, shown: dict[str, np.ndarray], absent: dict[str, np.ndarray]
) -> pa.Table:
    phrases = units["phrase"].to_numpy(zero_copy_only=False)
    auc, counts = np.full(len(phrases), np.nan), np.zeros((2, len(phrases)), np.int32)
    for phrase in shown:
        rows = np.flatnonzero(phrases == phrase)
        auc[rows] = exceeds(activations[shown[phrase]][:, rows], activations[absent[phrase]][:, rows])
        counts[:, rows] = [[len(shown[phrase])], [len(absent[phrase])]]
    columns: dict[str, Any] = {c: units[c].combine_chunks() for c in ("layer", "unit", "phrase")}
    columns |= {"auc": pa.array(auc, pa.float32(), from_pandas=True), "shown": counts[0], "absent": counts[1]}
    return make_table("drawn", columns)


def exceeds(with_SU: np.ndarray, without_NU: np.ndarray) -> np.ndarray:
    """float64 [U], the chance that an activation of the first exceeds one of the second, ties counted half (AUC).

    NaN where there is nothing to compare, or a NaN among the activations.
    """
    shown, absent = len(with_SU), len(without_NU)
    if not shown or not absent:
        return np.full(with_SU.shape[1], np.nan)
    ranks = rankdata(np.concatenate([with_SU, without_NU]), axis=0)[:shown].sum(0)
    return (ranks - shown * (shown + 1) / 2) / (shown * absent)
