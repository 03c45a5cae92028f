"""Which layers go below zero on purpose.

In: unit_stats of all units of a run. Out: by layer whether a rectifying function could have made its activations, so
that a value below zero means no more than "off".
"""

from tasks.store import Folder

RECTIFIED = -0.376
"""Lowest value of the usual activation functions (hardswish -0.375, SiLU -0.278, GELU -0.170, ReLU 0)."""


def rectified(exemplars: Folder) -> dict[str, bool]:
    """By layer, whether none of its units is anywhere below RECTIFIED."""
    found = exemplars.read_all("unit_stats", columns=["layer", "low"]).group_by("layer").aggregate([("low", "min")])
    lows = zip(found["layer"].to_pylist(), found["low_min"].to_pylist(), strict=True)
    return {layer: low >= RECTIFIED for layer, low in lows}
