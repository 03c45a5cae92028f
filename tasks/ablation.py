"""Stage ablation: the chosen units switched off, the images of one class looked at. One part is one class.

In: the table pairs, validate images of the class and as many of other classes, the target model. Out: ablation (one
row a unit and class: what the logit and the accuracy lose) and cumulative (a class's most important units switched off
together, and as many random ones).

Every batch runs once whole and is recorded; each ablation then repeats only what comes after its layer (tasks/replay).

Shapes: A ablations, the first of which changes nothing, N images.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from scipy.stats import t as student

from tasks.classes import Classes
from tasks.forward import HookedTarget, TargetPass
from tasks.layers import POSITIONS
from tasks.replay import Change, ablated, recorded
from tasks.store import Folder, PartReport
from tasks.tables import make_table

TO = ("zero", "mean")


@dataclass
class AblationSettings:
    pairs: int = 0
    """(unit, class) pairs that are tested by switching the unit off, the best of the screen; 0 for none of this."""
    controls: int = 20
    """Random units of the same layer that are switched off beside each."""
    to: str = "zero"
    """What a unit that is off is set to: zero, or mean, its mean over positions and select images."""
    positions: str = "all"
    """Where it is switched off: all, or in layers of tokens only patches, or only the prefix (CLS, registers)."""
    classes: int = 5
    """Best known classes whose most important units are switched off together."""
    images: int = 200
    """Images of a class that are looked at, at most, and as many of other classes."""

    def __post_init__(self) -> None:
        for key, least in (("pairs", 0), ("controls", 0), ("classes", 0), ("images", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"ablation.{key}={getattr(self, key)}: must be at least {least}")
        for key, allowed in (("to", TO), ("positions", POSITIONS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"ablation.{key}={getattr(self, key)}: allowed are {', '.join(allowed)}")


@dataclass
class AblationJob:
    out: Folder
    model: TargetPass
    screen: Folder
    pairs: Folder
    positions: str
    images: int


def ablated_classes(pairs: Folder) -> list[int]:
    """Every class of the table, in order; each is one part."""
    return sorted(set(pairs.read_all("pairs", columns=["class_index"])["class_index"].to_pylist()))


class AblationWorker:
    """Switches off, one after the other, all that is to be tested for one class."""

    def __init__(self, job: AblationJob) -> None:
        self.job, self.images = job, job.model.images
        self.target = HookedTarget(job.model)
        self.classes = Classes(job.screen, self.images)

    def run(self, part: int) -> PartReport:
        report, job = PartReport(part), self.job
        with report.phase("read"):
            own = [*ablated_classes(job.pairs), 0][part]  # nothing to test is one empty part
            rows = job.pairs.read_all("pairs").filter(pc.field("class_index") == own).to_pylist()
            numbers, count = self._images(own)
        with report.phase("compute"):
            singles, sets = _singles(rows), _sets(rows)
            ablations = [[], *([row] for row in singles), *(units for _, _, units in sets)]
            found = self._measure(numbers, [self._changes(units) for units in ablations])
            start = 1 + len(singles)
            tables = {"ablation": _table(singles, own, found, count)}
            tables["cumulative"] = _cumulative(sets, own, found, start, count)
        with report.phase("write"):
            job.out.write(part, tables)
        report.rows = {name: table.num_rows for name, table in tables.items()}
        return report

    def _images(self, own: int) -> tuple[np.ndarray, int]:
        """Numbers of validate images, those of the class first, and how many those are; chosen by hash."""
        known = self.classes.of("validate")
        known = known[np.argsort(self.images.order[known])]
        of_class = self.classes.own[known] == own
        members = known[of_class][: self.job.images]
        return np.concatenate([members, known[~of_class][: len(members)]]), len(members)

    def _changes(self, rows: list[dict]) -> list[Change]:
        """One change per layer that has any of the units, in the order of the layers."""
        changes = []
        for layer in self.job.model.layers:
            chosen = [row for row in rows if row["layer"] == layer.name]
            if chosen:
                units, values = ([row[c] for row in chosen] for c in ("unit", "value"))
                changes.append(Change(layer, units, values, self.target.readers.get(layer.name)))
        return changes

    @torch.inference_mode()
    def _measure(self, numbers: np.ndarray, ablations: list[list[Change]]) -> "Outcome":
        """Run every image under every ablation; the first changes nothing."""
        size, model = self.images.batch_size, self.target.model
        modules = sorted({change.layer.module for changes in ablations for change in changes})
        found = Outcome(np.zeros((len(ablations), len(numbers))), np.zeros((len(ablations), len(numbers)), bool))
        starts = range(0, len(numbers), size)
        batches = self.target.inputs([numbers[start : start + size] for start in starts])
        for start, (batch, x) in zip(starts, batches, strict=True):
            with recorded(model, modules) as recording:
                unchanged = model(x)
            for a, changes in enumerate(ablations):
                logits = ablated(model, x, recording, changes, self.job.positions) if changes else unchanged
                found.put(a, start, logits[: len(batch)].float().cpu().numpy(), self.classes.own[batch])
        return found


@dataclass
class Outcome:
    """What every image says under every ablation."""

    logit_AN: np.ndarray
    """float64, logit of the image's own class."""
    right_AN: np.ndarray
    """bool, whether it is the largest."""

    def put(self, ablation: int, start: int, logits_BC: np.ndarray, own_B: np.ndarray) -> None:
        place = slice(start, start + len(own_B))
        self.logit_AN[ablation, place] = logits_BC[np.arange(len(own_B)), own_B]
        self.right_AN[ablation, place] = logits_BC.argmax(1) == own_B

    def drops(self, rows: slice, images: slice) -> tuple[np.ndarray, np.ndarray]:
        """By how much logit and accuracy fall, float64 [rows, images] each, against the first ablation."""
        logit, right = (x[:, images].astype(np.float64) for x in (self.logit_AN, self.right_AN))
        return logit[:1] - logit[rows], right[:1] - right[rows]


def mean_interval(values_AN: np.ndarray) -> np.ndarray:
    """float64 [3, A]: mean over images and its 95 % interval by Student's t, which needs two images; else NaN."""
    count = values_AN.shape[1]
    if count == 0:
        return np.full((3, len(values_AN)), np.nan)
    mean = values_AN.mean(1)
    width = np.full(len(mean), np.nan)
    if count > 1:
        width = student.ppf(0.975, count - 1) * values_AN.std(1, ddof=1) / np.sqrt(count)
    return np.stack([mean, mean - width, mean + width])


def _singles(rows: list[dict]) -> list[dict]:
    """The distinct units among pairs and controls, in order of their first row: several pairs share controls."""
    found: dict[tuple[str, int], dict] = {}
    for row in rows:
        if row["role"] in ("pair", "control"):
            found.setdefault((row["layer"], row["unit"]), row)
    return list(found.values())


def _sets(rows: list[dict]) -> list[tuple[str, int, list[dict]]]:
    """(role, number of units, their rows): the first 1, 2, 4, ... of what is switched off together, and all of it; of
    controls those of these very units, where each has one: units of other layers would be no comparison."""
    count = sum(row["role"] == "together" for row in rows)
    found = []
    for role in ("together", "together_control"):
        for n in sorted({2**power for power in range(count.bit_length())} | {count} - {0}):
            units = [row for row in rows if row["role"] == role and row["rank"] < n]
            found += [(role, n, units)] if len(units) == n else []
    return found


def _table(singles: list[dict], own: int, found: Outcome, count: int) -> pa.Table:
    rows = slice(1, 1 + len(singles))
    columns: dict = {c: [row[c] for row in singles] for c in ("layer", "unit", "screen")}
    columns |= {"class_index": [own] * len(singles), "images": [count] * len(singles)}
    for name, drop in zip(("logit", "accuracy"), found.drops(rows, slice(count)), strict=True):
        bounds = zip(("drop", "lower", "upper"), mean_interval(drop), strict=True)
        columns |= {f"{name}_{bound}": _nullable(values) for bound, values in bounds}
    for name, drop in zip(("logit", "accuracy"), found.drops(rows, slice(count, None)), strict=True):
        columns[f"other_{name}_drop"] = _nullable(mean_interval(drop)[0])
    return make_table("ablation", columns)


def _cumulative(sets: list[tuple[str, int, list[dict]]], own: int, found: Outcome, start: int, count: int) -> pa.Table:
    """One row per number of units, 0 first; controls beside them where there are as many."""
    at = {(role, n): start + i for i, (role, n, _) in enumerate(sets)}
    at |= {("together", 0): 0, ("together_control", 0): 0}
    numbers = sorted(n for role, n in at if role == "together") if sets else []
    columns: dict = {"class_index": [own] * len(numbers), "units": numbers, "images": [count] * len(numbers)}
    for prefix, role in (("", "together"), ("control_", "together_control")):
        places = [at.get((role, n)) for n in numbers]
        for name, values_AN in (("logit", found.logit_AN), ("accuracy", found.right_AN)):
            columns[prefix + name] = [None if place is None else values_AN[place, :count].mean() for place in places]
    return make_table("cumulative", columns)


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, pa.float32(), from_pandas=True)  # NaN becomes null
