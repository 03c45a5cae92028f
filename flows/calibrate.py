"""axonym calibrate: learn how probable it is that a name is right from units whose truth is known, and test it.

In: runs=[a,b,...], finished sweeps of two sources or more; out=FOLDER (default: calibration); the config's store. A
source is a drawn world, whose planted units are known, or a target, whose final layer's units are its classes.
Out: in the folder calibration.json, learned from all of them, for neurons.calibration=; printed, and there as
reliability.svg, how far its probabilities hold: each source's units by what the others teach.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from flows.benchmark import planted_units
from flows.config import compose, flow_arguments, make_folder
from flows.run import Run, load_run
from tasks.calibration import (
    calibration_error,
    class_units,
    error_interval,
    evidence,
    fit,
    held_out,
    reliability,
    save,
    together,
)
from tasks.charts import Axis, Point, chart
from tasks.target import TargetSettings, load_target
from tasks.world.judging import OFF, judge, wilson


def main(arguments: list[str]) -> int:
    own, overrides = flow_arguments(arguments, {"runs": str, "out": str}, out="calibration")
    store = compose(overrides).store
    runs = [load_run(store, name) for name in own["runs"].strip("[]").split(",")]
    if other := [run.name for run in runs if "scorer" not in run.config]:
        raise ValueError(f"runs={own['runs']}: {other[0]} is not the run of a sweep")
    scorers = sorted({run.config["scorer"]["name"] for run in runs})
    if len(scorers) > 1:
        raise ValueError(f"runs={own['runs']}: their scorers differ ({', '.join(scorers)}); margins cannot be compared")
    found = [known(run) for run in runs]
    units = {source: together([u for of, u in found if of == source]) for source, _ in found}
    if len(units) < 2:
        raise ValueError(f"runs={own['runs']}: all of {next(iter(units))}; give runs of two worlds or targets")
    folder = make_folder(own["out"])
    print("\n".join(tested(units, scorers[0], folder)))
    learned = fit(*together([*units.values()]), scorers[0], [Path(source).name for source in units])
    save(learned, str(folder / "calibration.json"))
    print(f"learned from all {learned.units:,}: use it with  neurons.calibration={folder / 'calibration.json'}")
    return 0


def known(run: Run) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
    """The run's source; evidence [U, F] of its named units whose truth is known, and whether the names are right [U].

    Raises ValueError where the run has no such units or is not finished.
    """
    if len(run.folder("neurons").done() if "neurons" in run.stages else ()) < run.parts.get("neurons", 1):
        raise ValueError(f"runs={run.name}: the sweep is not finished; run the same command again")
    config = run.config
    explanations = run.folder(run.last("explanations")).read_all("explanations")
    validation = run.folder("validation").read_all("validation")
    truth = planted_units(config["world"], config["target"]["checkpoint"])
    if truth is not None:
        source, (found, right) = config["world"], planted(run, truth, explanations, validation)
    else:
        source, names = config["target"]["name"], load_target(TargetSettings(**config["target"]), False).class_names
        found, right = class_units(explanations, validation, names or [], run.folder("vocabulary"))
    finite = np.isfinite(found).all(1)
    if not finite.any():
        wanted = "neither of a trained net of a drawn world nor with a layer whose units are the target's class names"
        raise ValueError(f"runs={run.name}: {wanted}")
    return source, (found[finite], right[finite])


def planted(run: Run, truth: pa.Table, explanations: pa.Table, validation: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Evidence of planted units; right is what names the unit's concept, and nothing about noise."""
    units = zip(validation["layer"].to_pylist(), validation["unit"].to_pylist(), strict=True)
    row_of = {unit: row for row, unit in enumerate(units)}
    verdicts = [
        (row_of[v.truth["layer"], v.truth["unit"]], v.first and v.truth["kind"] != "noise")
        for v in judge(run.folder("neurons").read_all("neurons"), truth)
        if v.truth["kind"] not in OFF
    ]
    rows, right = np.array([row for row, _ in verdicts], int), np.array([right for _, right in verdicts], bool)
    return evidence(explanations, validation)[rows], right


def tested(units: dict[str, tuple[np.ndarray, np.ndarray]], scorer: str, folder: Path) -> list[str]:
    """Each source by what the others teach: lines of text, and the picture in the folder."""
    probability, right = held_out(units, scorer)
    bins, (low, high) = reliability(probability, right), error_interval(probability, right)
    points = [Point(b.probability, b.right, "", *wilson(round(b.right * b.units), b.units)) for b in bins]
    title = f"{len(right):,} names of {len(units)} sources, each by what the others teach"
    picture = chart(
        title, Axis("probability that the name is right", 0, 1), Axis("share that is right", 0, 1), points, True
    )
    (folder / "reliability.svg").write_text(picture)
    lines = [title, f"{'units':>6} {'probability':>12} {'right':>6}"]
    lines += [f"{b.units:>6} {b.probability:>12.3f} {b.right:>6.3f}" for b in bins]
    error = calibration_error(probability, right)
    return [*lines, f"expected calibration error {error:.3f} (95 % interval {low:.3f} to {high:.3f})", ""]


if __name__ == "__main__":
    from flows.cli import run_flow

    sys.exit(run_flow(main, sys.argv[1:]))
