"""axonym status run=NAME: how far a run is, read from the store alone.

In: the run's name and the store's config. Out: one line per stage with finished and planned parts, rows and seconds.
"""

import sys

from flows.config import compose, flow_arguments
from flows.run import load_run, spent
from tasks.store import Folder


def main(arguments: list[str]) -> int:
    own, overrides = flow_arguments(arguments, {"run": str})
    run = load_run(compose(overrides).store, own["run"])
    print(f"run {run.name}")
    for stage, parts in run.parts.items():
        folder = run.folder(stage)
        done = len(folder.done())
        mark = "done" if done >= parts else "open"
        print(f"  {stage:<23} {done:>4} of {parts:<4} {mark}  {folder.name}  {_statistics(folder)}")
        if stage in run.changes:
            print(f"  {'':<23} a new folder, because of {run.changes[stage]}")
    return 0


def _statistics(folder: Folder) -> str:
    found = spent(folder)
    text = [f"{what} {value:.1f} s" for what, value in found["seconds"].items()]
    return " ".join(text + [f"skipped {value} {what}" for what, value in found["skipped"].items()])


if __name__ == "__main__":
    from flows.cli import run_flow

    sys.exit(run_flow(main, sys.argv[1:]))
