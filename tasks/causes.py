"""Stage causes: what switching a unit off does to a class, beside the unit's name. What people read of the ablations.

In: pairs and ablation, the names in neurons, the vocabulary. Out: causes (one row a pair with its controls, its name
and how near the name is to the class's) and agreement (how well the screen foretells the ablations). Part 0 is the only
one. Names are joined here, so that another vocabulary repeats no ablation.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy.stats import spearmanr

from tasks.cleaning import class_concept
from tasks.store import Folder, PartReport
from tasks.tables import SCHEMAS, make_table, matrix

SURE = 0.99
"""Share of the controls that a pair must exceed to be counted in agreement."""


@dataclass
class CausesJob:
    out: Folder
    pairs: Folder
    ablation: Folder
    neurons: Folder
    vocabulary: Folder
    class_names: list[str] | None


class CausesWorker:
    """Joins what was measured with what the unit is called."""

    def __init__(self, job: CausesJob) -> None:
        self.job = job

    def run(self, part: int) -> PartReport:
        report, job = PartReport(part), self.job
        with report.phase("read"):
            pairs = job.pairs.read_all("pairs").to_pylist()
            measured = job.ablation.read_all("ablation").to_pylist()
            neurons = job.neurons.read_all("neurons", columns=["layer", "unit", "status", "phrase"]).to_pylist()
        with report.phase("compute"):
            names = {(row["layer"], row["unit"]): row for row in neurons}
            rows = self._rows(pairs, measured, names)
            causes = make_table("causes", {c: [row[c] for row in rows] for c in SCHEMAS["causes"].names})
            agreement = _agreement(rows, measured)
        with report.phase("write"):
            job.out.write(part, {"causes": causes, "agreement": agreement})
        report.rows = {"causes": len(rows)}
        return report

    def _rows(self, pairs: list[dict], measured: list[dict], names: dict[tuple[str, int], dict]) -> list[dict]:
        found = {(row["layer"], row["unit"], row["class_index"]): row for row in measured}
        controls: dict[int, list[dict]] = {}
        for row in pairs:
            if row["role"] == "control":
                controls.setdefault(row["rank"], []).append(found[row["layer"], row["unit"], row["class_index"]])
        texts, rows = Texts(self.job.vocabulary, self.job.class_names), []
        for pair in (row for row in pairs if row["role"] == "pair"):
            own, name = pair["class_index"], names[pair["layer"], pair["unit"]]
            row = found[pair["layer"], pair["unit"], own] | {"rank": pair["rank"]}
            row |= {"status": name["status"], "phrase": name["phrase"], "class": texts.name(own)}
            row |= beside(row, controls.get(pair["rank"], []))
            row["cosine"], row["cosine_chance"] = texts.cosines(name["phrase"], own)
            rows.append(row)
        return rows


def beside(row: dict, controls: list[dict]) -> dict:
    """The pair against its controls."""
    drops = [control["logit_drop"] for control in controls]
    known = bool(drops) and None not in [row["logit_drop"], *drops]
    below = sum((drop < row["logit_drop"]) + 0.5 * (drop == row["logit_drop"]) for drop in drops) if known else 0
    return {
        "controls": len(drops),
        "control_logit_drop": float(np.mean(drops)) if known else None,
        "control_accuracy_drop": float(np.mean([c["accuracy_drop"] for c in controls])) if known else None,
        "control_share": below / len(drops) if known else None,
    }


class Texts:
    """Class names and phrases as CLIP reads them, where they are concepts of the vocabulary."""

    def __init__(self, vocabulary: Folder, class_names: list[str] | None) -> None:
        self.class_names = class_names
        self.vectors = matrix(vocabulary.read_all("concept_embeddings")["embedding"]).astype(np.float64)
        concepts = vocabulary.read_all("concepts", columns=["concept", "synonyms"]).to_pylist()
        self.row_of = {phrase: i for i, row in enumerate(concepts) for phrase in row["synonyms"]}
        self.row_of |= {row["concept"]: i for i, row in enumerate(concepts)}
        self.class_rows = [self.row_of.get(class_concept(name)) for name in class_names or []]
        self.known = [row for row in self.class_rows if row is not None]

    def name(self, own: int) -> str | None:
        return self.class_names[own] if self.class_names and own < len(self.class_names) else None

    def cosines(self, phrase: str | None, own: int) -> tuple[float | None, float | None]:
        """Of a phrase to its class, and on average to all classes; None where one of them is no concept."""
        row = None if phrase is None else self.row_of.get(phrase)
        class_row = self.class_rows[own] if own < len(self.class_rows) else None
        if row is None or class_row is None:
            return None, None
        cosine = (self.vectors[[class_row, *self.known]] * self.vectors[row]).sum(1)
        return float(cosine[0]), float(cosine[1:].mean())


def _agreement(rows: list[dict], measured: list[dict]) -> pa.Table:
    shares = [row["control_share"] for row in rows if row["control_share"] is not None]
    near = [(row["cosine"], row["cosine_chance"]) for row in rows if row["cosine"] is not None]
    found = [
        ("Spearman of screen and logit drop, pairs and controls", *_spearman(measured)),
        ("Spearman of screen and logit drop, pairs", *_spearman(rows)),
        ("mean share of controls that cost the class less", _mean(shares), len(shares)),
        (f"share of pairs above {SURE:.0%} of their controls", _mean([s >= SURE for s in shares]), len(shares)),
        ("mean text cosine of phrase and class", _mean([own for own, _ in near]), len(near)),
        ("mean text cosine of phrase and any class", _mean([chance for _, chance in near]), len(near)),
    ]
    what, value, count = zip(*found, strict=True)
    return make_table("agreement", {"what": what, "value": value, "rows": count})


def _mean(values: list) -> float | None:
    return float(np.mean(values)) if values else None


def _spearman(rows: list[dict]) -> tuple[float | None, int]:
    """Rank correlation and how many rows it is of; None where one side is constant or there are fewer than three."""
    known = [(row["screen"], row["logit_drop"]) for row in rows if row["logit_drop"] is not None]
    screen, drop = np.array(known).reshape(-1, 2).T
    if len(known) < 3 or np.ptp(screen) == 0 or np.ptp(drop) == 0:
        return None, len(known)
    return float(np.asarray(spearmanr(screen, drop))[0]), len(known)
