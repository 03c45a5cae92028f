"""The page about the vocabulary: how well it serves the units.

In: the run's name and the rows of the coverage table. Out: vocabulary.html.
"""

from typing import Any

from tasks.report_page import render


def vocabulary_page(run: str, coverage: list[dict[str, Any]]) -> bytes:
    of_what: dict[str, list[dict[str, Any]]] = {}
    figures: dict[str | None, dict[str, Any]] = {None: {}}
    for row in coverage:
        of_what.setdefault(row["what"], []).append(row)
        if row["name"] is None:
            figures.setdefault(row["layer"], {})[row["what"]] = row
    won = {
        key: sorted(of_what.get(key, []), key=lambda row: (-row["units"], row["name"])) for key in ("prompt", "round")
    }
    values = {
        "run": run,
        "concepts": len(of_what.get("never used", [])) + figures[None]["distinct names"]["units"],
        "total": figures.pop(None),
        "layers": figures,
        "hubs": [row for row in of_what.get("hub", []) if row["units"] > 1],
        "unused": of_what.get("never used", []),
        "alike": of_what.get("near-duplicate", []),
        "prompts": won["prompt"],
        "rounds": sorted(won["round"], key=lambda row: int(row["name"])),
    }
    return render("vocabulary", values)
