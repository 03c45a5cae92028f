"""axonym demo: the whole sweep on models whose neurons were planted, and how many of them it named right.

In: overrides of the config (vocabulary=world_lexicon, world=FOLDER, target=world_vit_registers, ...). Out: for a small
ResNet and a small ViT of the drawn world, named by a language model's vocabulary and checked against randomly
initialised twins: named neurons, the truth score by kind of planted unit, the time, and the report pages.
"""

import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq

from flows.config import compose, flow_arguments
from flows.show import plain
from flows.sweep import Sweep
from tasks.benchmark import LIVE
from tasks.store import Store
from tasks.world.judging import HEAD, Verdict, judge, scores

LAYERS = {"resnet": "[residual,logits]", "vit": "[mlp,logits]", "vit_registers": "[mlp,logits]"}
NETS = ("resnet", "vit")
EXAMPLES = 12
"""Planted units shown per net."""


def main(arguments: list[str]) -> int:
    own, rest = flow_arguments(arguments, {"target": str, "run": str}, target="", run="demo")
    nets = (own["target"].removeprefix("world_"),) if own["target"] else NETS
    if nets[0] not in LAYERS:
        allowed = ", ".join(f"world_{net}" for net in LAYERS)
        raise ValueError(f"target={own['target']}: the demo needs planted units; allowed are {allowed}")
    start, sweeps = time.monotonic(), {net: _sweep(net, own["run"], rest) for net in nets}
    for sweep in sweeps.values():
        sweep.run()
    for net, sweep in sweeps.items():
        print("\n" + "\n".join(_result(net, sweep)))
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(f"\n{minutes} min {seconds} s. Look at the pages:")
    for sweep in sweeps.values():
        print(f"  {Store(sweep.config.store).path(sweep.folder('report').name)}/index.html")
    return 0


def _sweep(net: str, run: str, overrides: list[str]) -> Sweep:
    own = [f"target=world_{net}", f"layers.names={LAYERS[net]}", "vocabulary=world", "neurons.twin=true"]
    config = compose(["experiment=world", *own, f"run={run}-{net}", *overrides])
    if not config.probing.drawn:
        raise ValueError(f"probing.uri={config.probing.uri}: the demo needs drawn scenes, such as world://mine/500")
    return Sweep(config)


def _result(net: str, sweep: Sweep) -> list[str]:
    planted = pq.read_table(f"{sweep.config.world}/planted.parquet", filters=[("net", "==", net)])
    verdicts = judge(sweep.folder("neurons").read_all("neurons"), planted)
    redrawn = {(r["layer"], r["unit"]): r["auc"] for r in sweep.folder("drawn").read_all("drawn").to_pylist()}
    lines = [f"{net}: some planted neurons, and what they were called", *_examples(verdicts, redrawn), ""]
    lines += [f"{net}: named right, of all that were planted (95 % intervals)", HEAD]
    lines += [score.text() for score in scores(verdicts)]
    if sweep.twin:
        status = sweep.twin.folder("neurons").read_all("neurons", columns=["status"])["status"]
        lines += ["", f"{net}, randomly initialised: {_explained(status)}"]
    return lines


def _examples(verdicts: list[Verdict], redrawn: dict[tuple[str, int], float | None]) -> list[str]:
    """The first unit of every kind and of every family, then the first that are wrong."""
    picked = {
        (v.truth["kind"], v.truth["family"] if v.truth["kind"] == "mono" else None): v for v in reversed(verdicts)
    }
    lines = []
    for v in sorted(picked.values(), key=verdicts.index)[: 2 * EXAMPLES]:
        t, n = v.truth, v.neuron
        auc = redrawn.get((t["layer"], t["unit"]))
        said = n["phrase"] if n["status"] in LIVE else None
        found = plain(f"{said or '-'} ({n['status']})")
        numbers = "" if n["confidence"] is None else f"confidence {n['confidence']:5.2f}"
        numbers += "" if n["probability"] is None else f"  probability {n['probability']:4.2f}"
        numbers += "" if auc is None else f"  redrawn AUC {auc:.2f}"
        mark = "right" if v.first else "wrong"
        truth = f"{t['kind']}: {' | '.join(t['concepts'])}" if t["concepts"] else t["kind"]
        lines.append(f"  {t['layer']:<16} {t['unit']:>4}  {truth:<40} {mark}  {found:<42} {numbers}")
    return lines


def _explained(status: pa.ChunkedArray) -> str:
    """Of the units that answer to images."""
    found = [one for one in status.to_pylist() if one in LIVE]
    explained = found.count("explained")
    return f"{explained} of {len(found)} live units explained ({explained / max(len(found), 1):.1%})"


if __name__ == "__main__":
    from flows.cli import run_flow

    sys.exit(run_flow(main, sys.argv[1:]))
