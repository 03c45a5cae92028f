"""What all pages of the report share: statuses in plain words, and how a template becomes a page.

In: the name of a template beside this file and its values. Out: HTML as bytes, every value escaped.
"""

from pathlib import Path
from typing import Any

import jinja2

from tasks.store import fingerprint

STATUSES = {
    "explained": "The name predicts the neuron on images that did not make it, clearly better than chance.",
    "ambiguous": "The name predicts the neuron, but another of its concepts does so clearly better: it may mean that.",
    "unexplained": "No name found so far predicts the neuron on held-out images. Read the phrase as a guess.",
    "dead": "The neuron never becomes active, or is the same on every image. There is nothing to name.",
    "always_on": "The neuron is strongly active on every image, so what it tells apart is hard to see.",
    "special_token_only": "The neuron is active on the model's own tokens (CLS, registers), hardly on the image.",
}
"""Every status of the neurons table, in the order of the pages, with what it means in plain words."""
AXIS = (-0.2, 1.0)
"""Ends of the axis on which confidence is drawn."""


def templates() -> str:
    """Identity of the pages' templates, for the fingerprint: a changed look makes the pages anew."""
    return fingerprint({path.name: path.read_text() for path in sorted(Path(__file__).parent.glob("report_*.jinja"))})


def render(page: str, values: dict[str, Any]) -> bytes:
    return PAGES.get_template(f"report_{page}.jinja").render(values).encode()


def _axis(value: float) -> float:
    """Place on the axis of confidence, percent."""
    return round(100 * (min(max(value, AXIS[0]), AXIS[1]) - AXIS[0]) / (AXIS[1] - AXIS[0]), 2)


def _number(value: float | None) -> str:
    """Two decimals, never -0.00."""
    return "none" if value is None else f"{round(value, 2) + 0:.2f}"


def _points(value: float | None) -> str:
    """A share in percent, without the sign."""
    return "none" if value is None else str(round(100 * value))


PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # phrases come from language models, image ids from file names
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.filters |= {"axis": _axis, "number": _number, "points": _points}
PAGES.filters["words"] = lambda status: status.replace("_", " ")
