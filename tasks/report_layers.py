"""The page that compares the layers.

In: the run's name, the rows of the census, the first page of each layer. Out: layers.html.
"""

import math
from collections import defaultdict
from collections.abc import Collection
from typing import Any, NamedTuple

from tasks.report_page import STATUSES, render

FAMILIES = {
    "colour": "#a3261b",
    "texture": "#ff725c",
    "pattern": "#efb118",
    "material": "#8a6d00",
    "shape": "#b8d98a",
    "part": "#5c7a29",
    "object": "#3ca951",
    "compound": "#6cc5b0",
    "plant": "#c2d4f6",
    "animal": "#97bbf5",
    "food": "#6f9ae8",
    "person": "#4269d0",
    "scene": "#1d3f8f",
    "layout": "#a463f2",
    "action": "#8f2f6b",
    "abstract": "#ff8ab7",
    "absence": "#d0a5c0",
    "other": "#9498a0",
}
"""Families from what is seen in a few pixels to what takes the whole image, with their colours."""
OTHERS = ("#9c6b4e", "#c9b18f", "#5c6b7a", "#d9d2c5")
"""Colours of the families that a word list brings of its own, in turn."""
MEASURES = {
    "confidence": "How well the names predict the neurons on held-out images.",
    "monosemanticity": "How alike the images are on which a neuron is active, weighted by how active it is.",
    "clarity": "How alike the images are on which a neuron is most active.",
    "redundancy": "How alike the images of a neuron are to those of the neuron of its layer that is most like it.",
}
"""Figures of a layer that are drawn over depth, with what they mean: all are cosines or correlations, 1 at most."""
SIZE, LEFT, EDGE = (320, 110), 34, 8
"""Width and height of a drawing; room for the numbers of its scale; room around."""


class Slice(NamedTuple):
    """Of a stacked bar."""

    name: str
    share: float
    colour: str


def layers_page(run: str, census: list[dict[str, Any]], first_pages: dict[str, str]) -> bytes:
    shares = family_shares(census)
    colours = family_colours(shares)
    rows = [
        row
        | {
            "page": first_pages[row["layer"]],
            "explained": round(row["units"] * explained(row)),
            "status_bar": slices(row["statuses"], row["status_shares"], {s: f"var(--{s})" for s in STATUSES}),
            "family_bar": slices(row["families"], row["family_shares"], colours),
        }
        for row in census
    ]
    values = {
        "run": run,
        "rows": rows,
        "statuses": [status for status in STATUSES if any(status in row["statuses"] for row in rows)],
        "key": [Slice(name, shares[name], colour) for name, colour in colours.items()],
        "measures": MEASURES,
        "drawings": {name: drawing([(row["layer"], row[name]) for row in rows]) for name in MEASURES},
        "size": SIZE,
        "plot": {"left": LEFT, "right": SIZE[0] - EDGE},
    }
    return render("layers", values)


def family_colours(names: Collection[str]) -> dict[str, str]:
    """Colour of each of these families, in the order in which they are drawn."""
    own = sorted(set(names) - FAMILIES.keys())
    known = {name: colour for name, colour in FAMILIES.items() if name in names}
    return known | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(own)}


def slices(names: list[str], shares: list[float], colours: dict[str, str]) -> list[Slice]:
    """In the order of the colours."""
    found = dict(zip(names, shares, strict=True))
    return [Slice(name, found[name], colour) for name, colour in colours.items() if name in found]


def family_shares(census: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the explained units of all layers by family of their names."""
    units = defaultdict[str, float](float)
    for row in census:
        for family, share in zip(row["families"], row["family_shares"], strict=True):
            units[family] += row["units"] * explained(row) * share
    return {family: number / sum(units.values()) for family, number in units.items()}


def explained(row: dict[str, Any]) -> float:
    """Share of the layer's units."""
    return dict(zip(row["statuses"], row["status_shares"], strict=True)).get("explained", 0.0)


def drawing(values: list[tuple[str, float | None]]) -> dict[str, Any]:
    """A line over the layers, first to last: points (x, y, layer, value) of those that have a value, and the scale.

    The scale begins at 0, or below where a value is, and ends at the next twentieth above the largest value.
    """
    known = [value for _, value in values if value is not None]
    low, high = min([0.0, *known]), max(math.ceil(20 * max([0.0, *known])), 1) / 20
    step = (SIZE[0] - LEFT - 2 * EDGE) / max(len(values) - 1, 1)

    def y(value: float) -> float:
        return round(SIZE[1] - EDGE - (SIZE[1] - 2 * EDGE) * (value - low) / (high - low), 1)

    points = [
        (round(LEFT + EDGE + step * place, 1), y(value), layer, value)
        for place, (layer, value) in enumerate(values)
        if value is not None
    ]
    return {"points": points, "scale": [(y(value), value) for value in (0.0, high)]}
