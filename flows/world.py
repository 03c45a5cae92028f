"""axonym world: make the drawn world's models from nothing.

In: out=FOLDER (default: world), seed=N, effort=SHARE of the training steps, and the config's store and cluster. Out: in
the folder, a CLIP, three nets with planted units, a language model, their words, planted.parquet (the truth) and
measures.parquet (what each model can do on scenes that it has not seen, printed too).
"""

import sys
from pathlib import Path

import pyarrow.parquet as pq

from flows.config import compose, flow_arguments, make_folder
from flows.run import Run
from flows.stage import Work, run_stage
from tasks.store import Folder
from tasks.world.building import PARTS, WorldJob, write_words
from tasks.world.files import VERSION

LIBRARIES = ("torch", "timm", "open-clip-torch", "transformers", "tokenizers", "pillow", "numpy")


def main(arguments: list[str]) -> int:
    own, overrides = flow_arguments(
        arguments, {"out": str, "seed": int, "effort": float}, out="world", seed=0, effort=1.0
    )
    config = compose(overrides)
    folder = Path(own["out"]).absolute()
    if not 0 < own["effort"] <= 1:
        raise ValueError(f"effort={own['effort']}: allowed is a share of the training steps, above 0 and up to 1")
    own["out"] = str(folder)
    make_folder(own["out"])
    run = Run(f"world-{folder.name}-{own['seed']}", config.store, own)
    done = run.plan("world", own | {"threads": config.cluster.threads, "drawing": VERSION}, len(PARTS), LIBRARIES)
    job = WorldJob(done, own["out"], own["seed"], own["effort"], config.cluster.threads)
    _check_models(folder, done)
    run_stage(Work(done, "tasks.world.building:WorldWorker", job, len(PARTS), len(PARTS), "part"), config.cluster)
    run.save()
    write_words(folder)
    for table in ("planted", "measures"):
        pq.write_table(done.read_all(table), folder / f"{table}.parquet")
    for row in done.read_all("measures").to_pylist():
        print(f"{row['model']:<14} {row['value']:8.3f}  {row['measure']}")
    print(f"use it with  axonym demo world={folder}")
    return 0


def _check_models(folder: Path, done: Folder) -> None:
    """Raises ValueError where a model that was made is gone: the store says that its part is done."""
    made = [name for part in sorted(done.done()) for name in PARTS[part]]
    if lost := [m for m in made if not (folder / m).is_dir() and not (folder / f"{m}.safetensors").is_file()]:
        place = done.store.path(done.name)
        raise ValueError(f"out={folder}: {', '.join(lost)} was made and is gone; delete {place} to make all anew")


if __name__ == "__main__":
    from flows.cli import run_flow

    sys.exit(run_flow(main, sys.argv[1:]))
