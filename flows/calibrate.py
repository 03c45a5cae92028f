"""axonym calibrate: learn from planted units how probable it is that a name is right, and test it on other worlds.

In: runs=[a,b,...], finished sweeps on nets of two drawn worlds or more; out=FOLDER (default: calibration); the config's
store. Out: in the folder calibration.json, learned from all of them, for neurons.calibration=; printed, and there as
reliability.svg, how far its probabilities hold: each world's units by what the other worlds teach.
"""

import sys
from pathlib import Path

import numpy as np

from flows.benchmark import planted_units
from flows.config import compose, flow_arguments
from flows.run import Run, load_run
from tasks.calibration import (
    calibration_error,
    error_interval,
    evidence,
    fit,
    held_out,
    reliability,
    save,
    together,
)
from tasks.charts import Axis, Point, chart
from tasks.world.judging import OFF, judge, wilson


def main(arguments: list[str]) -> int:
    own, overrides = flow_arguments(arguments, {"runs": str, "out": str}, out="calibration")
    store = compose(overrides).store
    runs = [load_run(store, name) for name in own["runs"].strip("[]").split(",")]
    scorers = sorted({run.config["scorer"]["name"] for run in runs})
    if len(scorers) > 1:
        raise ValueError(f"runs={own['runs']}: their scorers differ ({', '.join(scorers)}); margins cannot be compared")
    found = [(run.config["world"], planted(run)) for run in runs]
    units = {world: together([units for of, units in found if of == world]) for world, _ in found}
    if len(units) < 2:
        raise ValueError(f"runs={own['runs']}: all of one world; give runs of two worlds or more")
    folder = Path(own["out"])
    folder.mkdir(parents=True, exist_ok=True)
    print("\n".join(tested(units, scorers[0], folder)))
    learned = fit(*together([*units.values()]), scorers[0], [Path(world).name for world in units])
    save(learned, str(folder / "calibration.json"))
    print(f"learned from all {learned.units:,}: use it with  neurons.calibration={folder / 'calibration.json'}")
    return 0


def planted(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Evidence [U, F] of the run's planted units that have a name, and whether it is right, bool [U].

    Raises ValueError where the run has no such units or is not finished.
    """
    truth = planted_units(run.config["world"], run.config["target"]["checkpoint"])
    if truth is None:
        raise ValueError(f"runs={run.name}: not of a trained net of a drawn world")
    if len(run.folder("neurons").done() if "neurons" in run.stages else ()) < run.parts.get("neurons", 1):
        raise ValueError(f"runs={run.name}: the sweep is not finished; run the same command again")
    explanations = run.folder(run.last("explanations")).read_all("explanations")
    validation = run.folder("validation").read_all("validation")
    units = zip(validation["layer"].to_pylist(), validation["unit"].to_pylist(), strict=True)
    known = dict(zip(units, evidence(explanations, validation), strict=True))
    verdicts = [
        (known[v.truth["layer"], v.truth["unit"]], v.first and v.truth["kind"] != "noise")
        for v in judge(run.folder("neurons").read_all("neurons"), truth)
        if v.truth["kind"] not in OFF
    ]
    finite = [(found, right) for found, right in verdicts if np.isfinite(found).all()]
    return np.array([found for found, _ in finite]), np.array([right for _, right in finite], bool)


def tested(units: dict[str, tuple[np.ndarray, np.ndarray]], scorer: str, folder: Path) -> list[str]:
    """Each world by what the others teach: lines of text, and the picture in the folder."""
    probability, right = held_out(units, scorer)
    bins, (low, high) = reliability(probability, right), error_interval(probability, right)
    points = [Point(b.probability, b.right, "", *wilson(round(b.right * b.units), b.units)) for b in bins]
    title = f"{len(right):,} names of planted units of {len(units)} worlds, each by what the others teach"
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
