"""The page about the classes: which units carry each of them, and whether their names say so.

In: the run's name, the rows of causes, cumulative and agreement, the model's class names, and where the card of a unit
is. Out: classes.html.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from tasks.report_page import render

UNITS = 10
"""Units shown of a class, those that cost it most; the others are counted."""
ABOVE = 0.95
"""Share of the random units that a unit must cost the class more than to be called confirmed."""
SIZE, LEFT, RIGHT, EDGE, FOOT = (320, 130), 44, 12, 10, 20
"""Width and height of a drawing; room for the numbers of its scale, around, and for those below."""


def classes_page(
    run: str,
    causes: list[dict[str, Any]],
    cumulative: list[dict[str, Any]],
    agreement: list[dict[str, Any]],
    names: list[str],
    card: Callable[[str, int], str],
) -> bytes:
    """`card` tells where a unit's card is, by its layer and number; `names` is empty where the classes have none."""
    units, curves = defaultdict(list), defaultdict(list)
    for row in causes:
        units[row["class_index"]].append(row | {"card": card(row["layer"], row["unit"])})
    for row in cumulative:
        curves[row["class_index"]].append(row)
    found = sorted({*units, *curves}, key=lambda own: (names[own] if own < len(names) else "", own))
    values = {
        "run": run,
        "classes": [
            {"index": own, "name": names[own] if own < len(names) else f"class {own}"}
            | {"images": (units[own] + curves[own])[0]["images"], "curve": curve(curves[own])}
            | summary(units[own])
            for own in found
        ],
        "tested": len(causes),
        "confirmed": sum(map(confirmed, causes)),
        "cosine": mean([row["cosine"] for row in causes]),
        "chance": mean([row["cosine_chance"] for row in causes]),
        "agreement": [row for row in agreement if row["value"] is not None],
        "above": ABOVE,
        "size": SIZE,
        "plot": {"left": LEFT, "right": SIZE[0] - RIGHT},
    }
    return render("classes", values)


def confirmed(row: dict[str, Any]) -> bool:
    """Whether the class needs the unit: its logit falls beyond the interval, and more than without random units."""
    above = row["control_share"] is None or row["control_share"] > ABOVE
    return row["logit_lower"] is not None and row["logit_lower"] > 0 and above


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one class, its units by what they cost it, with their places in percent on one axis for all of them."""
    rows = sorted(rows, key=lambda row: -drop(row))
    ends = [0.0] + [row[c] for row in rows for c in ("logit_lower", "logit_upper", "logit_drop") if row[c] is not None]
    low, high = min(ends), max(*ends, 1e-9)

    def place(value: float | None) -> float | None:
        return None if value is None else round(100 * min(max((value - low) / (high - low), 0), 1), 1)

    figures = ("logit_drop", "logit_lower", "logit_upper", "control_logit_drop")
    units = [row | {"at": {c: place(row[c]) for c in figures}, "confirmed": confirmed(row)} for row in rows[:UNITS]]
    return {
        "units": units,
        "zero": place(0.0),
        "tested": len(rows),
        "confirmed": sum(map(confirmed, rows)),
        "cosine": mean([row["cosine"] for row in rows]),
        "chance": mean([row["cosine_chance"] for row in rows]),
    }


def worst_classes(causes: list[dict[str, Any]], count: int) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """By layer and unit the rows of the classes that it costs something, most accuracy first, at most `count`."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in sorted(causes, key=lambda row: (-(row["accuracy_drop"] or 0), -drop(row))):
        at = found.setdefault((row["layer"], row["unit"]), [])
        if drop(row) > 0 and len(at) < count:
            at.append(row)
    return found


def drop(row: dict[str, Any]) -> float:
    return -np.inf if row["logit_drop"] is None else row["logit_drop"]


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def curve(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Accuracy by units switched off together: points (x, y, units, value) of the class's own and of random ones, and
    the scale from 0 to 1. Numbers of units double, so their places are even. None without rows."""
    rows = sorted(rows, key=lambda row: row["units"])
    step = (SIZE[0] - LEFT - RIGHT - 2 * EDGE) / max(len(rows) - 1, 1)

    def y(value: float) -> float:
        return round(SIZE[1] - FOOT - (SIZE[1] - FOOT - EDGE) * value, 1)

    lines = {
        name: [
            (round(LEFT + EDGE + step * number, 1), y(row[name]), row["units"], row[name])
            for number, row in enumerate(rows)
            if row[name] is not None
        ]
        for name in ("control_accuracy", "accuracy")
    }
    return {"lines": lines, "scale": [(y(value), value) for value in (0, 1)]} if rows else None
