"""Calibration: how probable it is that a name is right.

In: evidence of units whose truth is known (planted units of drawn worlds, final layers), and whether their names were
right. Out: a Calibration, which turns the evidence of any unit into a probability; how far its probabilities are from
the truth.

Shapes: U units, F = len(FEATURES).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tasks.classes import class_concepts, final_layer
from tasks.store import Folder

SHIPPED = Path(__file__).parent / "calibration.json"
FEATURES = ("confidence", "margin", "match")
"""Correlation on validate (by Fisher's transform), the logarithm of the lead over the second best concept, the share of
the patches that match the name."""
RIDGE = 0.01
BINS = 10
DRAWS = 1000


@dataclass(frozen=True)
class Calibration:
    """A logistic regression on the evidence, whose value isotonic regression maps to a probability."""

    scorer: str
    """The scorer that made the names: the margin is a difference of its values."""
    sources: list[str]
    """Drawn worlds whose planted units it was learned from, models whose classes."""
    units: int
    centre: list[float]
    scale: list[float]
    weights: list[float]
    scores: list[float]
    """Ascending; between them probabilities are linear."""
    probabilities: list[float]

    def probability(self, evidence_UF: np.ndarray) -> np.ndarray:
        """float64 [U] in (0, 1); NaN where the evidence has a NaN."""
        return np.interp(self._score(evidence_UF), self.scores, self.probabilities)

    def _score(self, evidence_UF: np.ndarray) -> np.ndarray:
        return (evidence_UF - self.centre) / self.scale @ np.array(self.weights)


def load(path: str, scorer: str) -> Calibration | None:
    """None where it is of another scorer. Raises ValueError naming neurons.calibration where the file is none."""
    try:
        found = Calibration(**json.loads(Path(path).read_text()))
        return found if found.scorer == scorer else None
    except (OSError, ValueError, TypeError) as error:
        expected = "expected a file that axonym calibrate wrote"
        raise ValueError(f"neurons.calibration={path}: {expected}: {error}") from None


def save(calibration: Calibration, path: str) -> None:
    Path(path).write_text(json.dumps(asdict(calibration), indent=1) + "\n")


def evidence(explanations: pa.Table, validation: pa.Table) -> np.ndarray:
    """float64 [U, F] of the units of both tables, row by row; NaN where a unit has no name."""
    confidence, margin, match = (
        column.to_numpy(zero_copy_only=False).astype(np.float64)
        for column in (validation["correlation"], explanations["margin"], explanations["match"])
    )
    return np.stack([np.arctanh(confidence.clip(-0.999, 0.999)), np.log(margin.clip(1e-3)), match], 1)


def class_units(
    explanations: pa.Table, validation: pa.Table, class_names: list[str], vocabulary: Folder
) -> tuple[np.ndarray, np.ndarray]:
    """Evidence [U, F] of the final layer's units whose class is a concept, and whether that is the name, bool [U]. Both
    tables have the same units in the same order. Nothing where no layer's units are the classes."""
    layers, unit = explanations["layer"].to_pylist(), explanations["unit"].to_numpy()
    final, own = final_layer(layers, class_names), class_concepts(vocabulary, class_names)
    rows = np.array([row for row, layer in enumerate(layers) if layer == final and own[unit[row]]], int)
    named = explanations["phrase"].take(pa.array(rows)).to_pylist()
    right = np.array([name == own[i] for name, i in zip(named, unit[rows], strict=True)], bool)
    return evidence(explanations.take(rows), validation.take(rows)), right


def fit(evidence_UF: np.ndarray, right_U: np.ndarray, scorer: str, sources: list[str]) -> Calibration:
    """Learn from units whose evidence is finite and whose names are known to be right or not.

    The logistic regression has a ridge penalty on all but the constant; isotonic regression (Zadrozny and Elkan 2002)
    then frees the probability from its shape. Probabilities keep a distance of 1 / (U + 2) from 0 and 1.
    """
    from scipy.optimize import isotonic_regression, minimize

    centre, scale = evidence_UF.mean(0), evidence_UF.std(0).clip(1e-9)
    z_UF, sign_U = (evidence_UF - centre) / scale, 2 * right_U.astype(float) - 1

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin_U = sign_U * (weights[0] + z_UF @ weights[1:])
        slope_U = -sign_U / (1 + np.exp(margin_U.clip(-50, 50))) / len(z_UF)
        slope = np.concatenate([[slope_U.sum()], slope_U @ z_UF + RIDGE * weights[1:]])
        return float(np.logaddexp(0, -margin_U).mean() + RIDGE / 2 * weights[1:] @ weights[1:]), slope

    weights = minimize(loss, np.zeros(z_UF.shape[1] + 1), jac=True).x[1:]
    score_U = z_UF @ weights
    order = np.argsort(score_U, kind="stable")
    steps = isotonic_regression(right_U[order].astype(float))
    ends = np.unique(np.concatenate([steps.blocks[:-1], steps.blocks[1:] - 1]))  # first and last unit of every step
    known = steps.x[ends].clip(1 / (len(order) + 2), 1 - 1 / (len(order) + 2))
    return Calibration(
        scorer,
        sources,
        len(order),
        *(values.tolist() for values in (centre, scale, weights, score_U[order][ends], known)),
    )


class Bin(NamedTuple):
    """Units of neighbouring probability."""

    probability: float
    right: float
    units: int


def reliability(probability_U: np.ndarray, right_U: np.ndarray) -> list[Bin]:
    """BINS bins of as many units each, from the least probable names on."""
    parts = np.array_split(np.argsort(probability_U, kind="stable"), min(BINS, len(right_U)))
    return [Bin(float(probability_U[p].mean()), float(right_U[p].mean()), len(p)) for p in parts]


def calibration_error(probability_U: np.ndarray, right_U: np.ndarray) -> float:
    """Expected calibration error (Naeini et al. 2015): mean distance of probability and share over the bins."""
    bins = reliability(probability_U, right_U)
    return sum(b.units * abs(b.probability - b.right) for b in bins) / len(right_U)


def error_interval(probability_U: np.ndarray, right_U: np.ndarray) -> tuple[float, float]:
    """95 % interval of the calibration error: percentiles over DRAWS draws of as many units with replacement."""
    draws = np.random.default_rng(0).integers(0, len(right_U), (DRAWS, len(right_U)))
    found = [calibration_error(probability_U[draw], right_U[draw]) for draw in draws]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def together(units: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Evidence and right of several sources, one after the other."""
    return np.concatenate([found for found, _ in units]), np.concatenate([right for _, right in units])


def held_out(units: dict[str, tuple[np.ndarray, np.ndarray]], scorer: str) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the units of every source by what the others teach, and whether their names are right.

    `units` has evidence [U, F] and right [U] by source, two at least.
    """
    found = []
    for source in units:
        others = [name for name in units if name != source]
        taught = fit(*together([units[name] for name in others]), scorer, others)
        found.append((taught.probability(units[source][0]), units[source][1]))
    return together(found)
