"""axonym bench: how fast it is beside the bare models, on this machine.

In: key=value for the fields of tasks/bench_settings.py (what=collection,memory model=vit_l images=64 out=FILE).
Out: a table, printed row by row and as Parquet, and the cost curves (what=curves) as a picture beside it, OUT.svg.
Needs neither Ray, Hydra and open_clip nor network; weights are random.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import fsspec

from tasks.bench import measure
from tasks.bench_figures import Figure, hardware, versions
from tasks.bench_runs import fresh
from tasks.bench_settings import BenchSettings
from tasks.charts import Axis, Point, chart, grid
from tasks.store import encode
from tasks.tables import SCHEMAS, make_table

HEADER = f"{'':<28} {'ratio':>7} {'least':>7} {'most':>7}  {'target':<8} {'':<6} {'base':>9} {'ours':>9}"


def main(arguments: list[str]) -> int:
    settings = parsed(arguments)
    rows: list[dict[str, Any]] = []
    for device in settings.devices:
        chosen = settings.on(device)
        about = {"device": device, "hardware": hardware(device), "threads": chosen.threads, "batch": chosen.batch}
        about |= {"dtype": chosen.dtype, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        about |= {"versions": versions()}
        print(
            f"{about['hardware']}, batches of {chosen.batch}, {chosen.dtype}, {about['versions']}\n\n{HEADER}",
            flush=True,
        )
        for name in chosen.what:
            for figure in _measured(name, chosen, apart=settings.devices != [device]):
                print(line(figure), flush=True)
                goal = {"target": None if figure.met is None else figure.target, "met": figure.met}
                rows.append(asdict(figure) | goal | about)
        print()
    with cast(Any, fsspec.open(settings.out, "wb")) as file:
        file.write(encode(make_table("bench", {c: [row[c] for row in rows] for c in SCHEMAS["bench"].names})))
    print(f"written to {settings.out}")
    if picture := picture_of(rows):
        place = str(Path(settings.out).with_suffix(".svg"))
        with cast(Any, fsspec.open(place, "w")) as file:
            file.write(picture)
        print(f"cost curves: {place}")
    return 0


def picture_of(rows: list[dict[str, Any]]) -> str | None:
    """A chart for each kind of cost curve, of the device measured last; None where none was measured."""
    charts = []
    for kind in ("images", "units", "concepts", "workers"):
        points = [
            row for row in rows if row["size"] and row["name"].endswith(kind) and row["device"] == rows[-1]["device"]
        ]
        if len(points) < 2:
            continue
        first, most = points[0]["size"], max(max(row["high"], row["size"] / points[0]["size"]) for row in points)
        seconds = "images per second" if kind == "workers" else "time"
        x, y = (
            Axis(f"{kind}, in multiples of {first:,.0f}", 0, most),
            Axis(f"{seconds}, in multiples of the first", 0, most),
        )
        found = [Point(row["size"] / first, row["value"], "", row["low"], row["high"]) for row in points]
        charts.append(chart(points[-1]["what"].partition(": ")[2] or "collection", x, y, found, diagonal=True))
    return grid(charts) if charts else None


def _measured(name: str, settings: BenchSettings, apart: bool) -> list[Figure]:
    """In this process; where there are two devices, in one that sees only its own."""
    if not apart:
        return measure(name, settings)
    with cast(ProcessPoolExecutor, fresh(settings.device)) as process:
        return process.submit(measure, name, settings).result()


def parsed(arguments: list[str]) -> BenchSettings:
    """Raises ValueError for a key that there is not or a value of the wrong kind."""
    known: dict[str, Any] = {f.name: f.type for f in fields(BenchSettings)}
    found: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in known or not equals:
            raise ValueError(f"{argument}: expected key=value; allowed keys are {', '.join(known)}")
        try:
            found[key] = value.strip("[]").split(",") if key == "what" else known[key](value)
        except ValueError:
            raise ValueError(f"{argument}: expected a {known[key].__name__}") from None
    return BenchSettings(**found)


def line(figure: Figure) -> str:
    f, sign = figure, ">=" if figure.at_least else "<="
    goal, met = ("", "") if f.met is None else (f"{sign} {f.target:.2f}", "met" if f.met else "missed")
    return (
        f"{f.name:<28} {f.value:>7.3f} {f.low:>7.3f} {f.high:>7.3f}  {goal:<8} {met:<6} {f.base:>9.2f} {f.ours:>9.2f}  "
        f"{f.what} ({f.model})"
    )


if __name__ == "__main__":
    from flows.cli import run_flow

    sys.exit(run_flow(main, sys.argv[1:], resumes=False))
