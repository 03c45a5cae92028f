"""The page about the vocabulary: how well it serves the units.

In: the run's name and the rows of the coverage table. Out: vocabulary.html.
"""

from typing import Any

from tasks.report_page import render

PALETTE = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
PALETTE += ("#1d3f8f", "#8a6d00", "#a3261b", "#1f7a6a", "#b8d98a", "#8f2f6b")
"""Colours of families, the most frequent first; the first ten are Observable's categorical palette."""


def vocabulary_page(run: str, coverage: list[dict[str, Any]]) -> bytes:
    of_what: dict[str, list[dict[str, Any]]] = {}
    figures: dict[str | None, dict[str, Any]] = {None: {}}
    for row in coverage:
        of_what.setdefault(row["what"], []).append(row)
        if row["name"] is None:
            figures.setdefault(row["layer"], {})[row["what"]] = row
    families: dict[str | None, list[dict[str, Any]]] = {layer: [] for layer in figures}
    for row in of_what.get("family", []):
        families[row["layer"]].append(row)
    names = [row["name"] for row in families[None]]
    won = {
        key: sorted(of_what.get(key, []), key=lambda row: (-row["units"], row["name"])) for key in ("prompt", "round")
    }
    values = {
        "run": run,
        "concepts": len(of_what.get("never used", [])) + figures[None]["distinct names"]["units"],
        "total": figures.pop(None),
        "layers": figures,
        "families": families,
        "palette": {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)},
        "hubs": [row for row in of_what.get("hub", []) if row["units"] > 1],
        "unused": of_what.get("never used", []),
        "alike": of_what.get("near-duplicate", []),
        "prompts": won["prompt"],
        "rounds": sorted(won["round"], key=lambda row: int(row["name"])),
    }
    return render("vocabulary", values)
