"""One neuron as text for the terminal.

In: a run, a layer and a unit. Out: what the stored tables say about it: name, status, confidence, concepts, exemplars.
"""

import difflib
import sys
from typing import Any

import pyarrow.compute as pc

from flows.config import compose, flow_arguments
from flows.run import Run, load_run
from tasks.store import Folder

EXEMPLARS = 10
"""Exemplars listed, strongest first."""
BAR = 20
"""Characters of a full bar."""


def main(arguments: list[str]) -> int:
    own, overrides = flow_arguments(arguments, {"run": str, "layer": str, "unit": int})
    print(show(load_run(compose(overrides).store, own["run"]), own["layer"], own["unit"]), end="")
    return 0


def show(run: Run, layer: str, unit: int) -> str:
    """Raises ValueError where the run has no such layer or unit, or its neurons are not finished."""
    part = _part(run, layer, unit)
    wanted: dict[str, Any] = {"filters": [("layer", "==", layer), ("unit", "==", unit)]}
    neuron = run.folder("neurons").read("neurons", part, **wanted).to_pylist()[0]
    check = run.folder("validation").read("validation", part, **wanted).to_pylist()[0]
    scores = {row["concept"]: row for row in run.folder(run.last("scores")).read("scores", part, **wanted).to_pylist()}
    lines = [plain(f"{layer}, neuron {unit}: {neuron['phrase'] or 'no name'}"), "", *_verdict(neuron, check)]
    lines += [*_negative(neuron), *_redrawn(run, wanted), ""]
    lines += _concepts(neuron, scores) + _exemplars(run, part, unit)
    return "\n".join(lines).rstrip() + "\n"


def plain(text: str) -> str:
    """The text with all that a terminal could act on (control, format and bidi characters) written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _part(run: Run, layer: str, unit: int) -> int:
    """Number of the unit block that holds the unit."""
    done = run.folder("neurons").done() if "neurons" in run.stages else set()
    if not done or len(done) < run.parts["neurons"]:
        of = f"{len(done)} of {run.parts['neurons']} parts" if done else "none"
        raise ValueError(f"run={run.name}: the neurons are not finished ({of} there); run the sweep to its end first")
    units: dict[str, dict[int, int]] = {}  # layer -> unit -> part
    for part in sorted(done):
        keys = run.folder("neurons").read("neurons", part, columns=["layer", "unit"]).to_pydict()
        for name, number in zip(keys["layer"], keys["unit"], strict=True):
            units.setdefault(name, {})[number] = part
    if layer not in units:
        near = ", ".join(difflib.get_close_matches(layer, units, n=8, cutoff=0))
        raise ValueError(plain(f"layer={layer}: not in this run; allowed are {near}"))
    if unit not in units[layer]:
        raise ValueError(f"unit={unit}: allowed are {min(units[layer])} to {max(units[layer])}")
    return units[layer][unit]


def _verdict(neuron: dict[str, Any], check: dict[str, Any]) -> list[str]:
    lines = [f"status      {neuron['status']}"]
    if neuron["confidence"] is None:
        why = f"cannot be computed on {check['images']} held-out images" if check["images"] else "no validate split"
        return [*lines, f"confidence  none: {why}"]
    found = f"confidence  {neuron['confidence']:.2f} on {check['images']} held-out images"
    if neuron["lower"] is not None and neuron["upper"] is not None:
        found += f", 95% interval {neuron['lower']:.2f} to {neuron['upper']:.2f}"
    lines.append(found + ("" if neuron["q"] is None else f", q = {neuron['q']:.2g}"))
    if neuron["probability"] is not None:
        lines.append(f"probability {neuron['probability']:.2f} that the name is right")
    lines.append(f"bar         {neuron['bar']:.2f}: the interval must lie above it")
    if neuron["status"] == "ambiguous" and check["rival"] is not None:
        lines.append(plain(f"rival name  {check['rival']}"))
    return lines


def _negative(neuron: dict[str, Any]) -> list[str]:
    """What the unit says below zero; nothing where it does not go there."""
    known = neuron["negative_confidence"]
    found = "none" if known is None else f"{known:.2f}"
    return [plain(f"negative    {neuron['negative']} ({found})")] if neuron["negative"] is not None else []


def _redrawn(run: Run, wanted: dict[str, Any]) -> list[str]:
    """The test on drawn scenes; nothing where the run has none of this unit, or its name cannot be drawn."""
    folder = run.folder("drawn") if "drawn" in run.stages else None
    rows = [r for part in folder.done() for r in folder.read("drawn", part, **wanted).to_pylist()] if folder else []
    return [
        f"redrawn AUC {row['auc']:.2f} on {row['shown']} drawn scenes that show the name, {row['absent']} that do not"
        for row in rows
        if row["auc"] is not None
    ]


def _concepts(neuron: dict[str, Any], scores: dict[str, dict[str, Any]]) -> list[str]:
    """The concepts with their weights; none for a unit without a name."""
    if neuron["phrase"] is None:
        return []
    means = ", ".join(f"{m} ({s:.0%})" for m, s in zip(neuron["meanings"], neuron["shares"], strict=True))
    lines = [plain(f"means       {means} of its patches"), ""] if len(neuron["meanings"]) > 1 else []
    lines += [f"weight  {'':{BAR}}  null z  share  concept"]
    for concept, weight in zip(neuron["concepts"], neuron["weights"], strict=True):
        score = scores.get(concept)
        evidence = f"{score['null_z']:6.1f}  {score['share']:5.0%}" if score else f"{'-':>6}  {'-':>5}"
        lines.append(f"{weight:6.2f}  {'#' * round(weight * BAR):.<{BAR}}  {evidence}  {plain(concept)}")
    return [*lines, ""]


def _exemplars(run: Run, part: int, unit: int) -> list[str]:
    """The strongest images with activation and, where the exemplar became a patch, the box in pixels."""
    first: list[tuple[str, str, Any]] = [("unit", "==", unit), ("tail", "==", "top"), ("rank", "<", EXEMPLARS)]
    exemplars = run.folder("exemplars").read("exemplars", part, filters=first).sort_by("rank").to_pylist()
    boxes = {
        row["rank"]: [round(row[c]) for c in ("x0", "y0", "x1", "y1")]
        for row in _patches(run.folder("patches"), part, unit)
    }
    if not exemplars:
        return ["no exemplars"]
    lines = [f"activation  {'box x0 y0 x1 y1':>19}  image"]
    for row in exemplars:
        box = " ".join(f"{value:>4}" for value in boxes.get(row["rank"], ["-"] * 4))
        lines.append(f"{row['activation']:10.4g}  {box}  {plain(row['image_id'])}")
    return lines


def _patches(folder: Folder, part: int, unit: int) -> list[dict[str, Any]]:
    patches = folder.read_all("patches", group=part)  # row groups are unit blocks
    return patches.filter((pc.field("unit") == unit) & (pc.field("tail") == "top")).to_pylist()


if __name__ == "__main__":
    from flows.cli import run_flow

    sys.exit(run_flow(main, sys.argv[1:]))
