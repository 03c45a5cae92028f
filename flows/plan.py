"""axonym plan: what a sweep will cost, before anything is loaded, downloaded or written.

In: the overrides of axonym sweep; images=50000 instead of a look at the data; cpus=16 gpus=1 where it will run, or
workers=8 of each stage; rates and prices of the machines (cpu_gflops=60 gpu_tflops=300 gpu_hour=2.5 cpu_hour=0.05 ...,
see tasks/plan.py), or measure=true, which times the two models on this machine with random weights; out=plan.parquet.
Out: one line per stage, totals, what costs most.
"""

import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flows.causes import check_causes
from flows.config import Config, check_world, compose, flow_arguments
from tasks.cleaning import clean
from tasks.images import ImageReader
from tasks.listing import list_images
from tasks.phrases import check_number, listed
from tasks.pixels import BadImage, decode
from tasks.plan import Estimate, Facts, Rates, Work, answered, money, seconds
from tasks.plan_bytes import Words, made_up_words
from tasks.plan_models import TargetSketch, sketch_clip, sketch_target, timed
from tasks.plan_stages import Planner
from tasks.words import other_words

LOOKED = 32
"""Images whose sizes are looked at, evenly over the list."""
PHOTO = (500, 375)
"""Width and height of an image where there is none to look at."""
OWN: dict[str, type] = {"images": int, "workers": int, "cpus": int, "gpus": int, "measure": str, "out": str}
OWN |= {field.name: float for field in fields(Rates)}
HEAD = f"{'stage':<26} {'parts':>6} {'passes':>11} {'images':>10} {'TFLOP':>10} {'rows':>13} {'MB':>10} {'on':>3}"
HEAD += f" {'work':>9} {'wall':>9} {'GiB':>6} {'money':>9}"


@dataclass
class Line:
    """One stage with its time and money."""

    estimate: Estimate
    work: Work
    seconds: float
    """Of all workers together."""
    wall: float
    money: float


def main(arguments: list[str]) -> int:
    rates = {field.name: field.default for field in fields(Rates)}
    own, rest = flow_arguments(arguments, OWN, images=0, workers=0, cpus=0, gpus=1, measure="false", out="", **rates)
    if own["measure"] not in ("true", "false"):
        raise ValueError(f"measure={own['measure']}: allowed are true, false")
    for key, least in (("images", 0), ("workers", 0), ("cpus", 0), ("gpus", 1)):
        if own[key] < least:
            raise ValueError(f"{key}={own[key]}: must be at least {least}")
    config, chosen = compose(rest), Rates(**{name: own[name] for name in rates})
    facts = look(config, own["images"], own["measure"] == "true")
    config = replace(config, probing=config.probing.sharded(facts.images))
    lines = priced(config, Planner(config, facts, chosen).estimates(), facts, chosen, own)
    print("\n".join([f"plan of run {config.run}: {_subject(facts)}", HEAD, *map(_text, lines), *_totals(lines)]))
    print(f"assumed: {', '.join(f'{key}={value:g}' for key, value in asdict(chosen).items() if value)}")
    if own["out"]:
        try:
            pq.write_table(table(lines), own["out"])
        except OSError as error:
            raise ValueError(f"out={own['out']}: cannot be written: {error}") from None
    return 0


def look(config: Config, images: int = 0, measure: bool = False) -> Facts:
    """What the arithmetic needs beside the config. Raises ValueError for what makes a sweep refuse its config."""
    check_world(config)
    rows, sizes = _images(config, images)
    target, clip = sketch_target(config.target, config.layers), sketch_clip(config.clip)
    check_causes(config, target.layers, target.num_classes)
    judge = sketch_clip(config.judge) if config.judge else None
    names = _class_names(config, target, rows)
    prompts = [prompt.text for prompt in config.vocabulary.prompts(names)]
    concepts = _concepts(config, names, len(prompts))
    crops, text = config.patches.crops.sizes, prompts[0] if prompts else ""
    words = Words(rows, concepts, sizes, clip.width, crops, text, target.layers[0].name)
    against = config.vocabulary.against
    other = len(clean(other_words(against), 12)[0]) if against else None
    gpu = config.cluster.on_gpu("activations")
    dtypes = {"target": config.target.dtype, "clip": config.clip.dtype}
    dtypes |= {"judge": config.judge.dtype} if config.judge else {}
    half = tuple(model for model, dtype in dtypes.items() if gpu and dtype != "float32")
    spent = timed(config.target, config.clip, config.probing.batch_size, config.cluster.threads) if measure else ()
    facts = Facts(
        images or len(rows), config.probing.drawn, target, clip, judge, len(concepts), prompts, other, words, half
    )
    facts.seconds = dict(zip(("target", "clip"), spent, strict=False))
    return facts


def _images(config: Config, count: int) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """Rows of the listing, or made-up ones of that number, and the sizes of some images."""
    if count:
        place = {"uri": "file:///data/imagenet/val", "offset": None, "length": None, "row": None}
        folders = [f"n{number:08d}" for number in range(1000)]
        names = [f"{folders[i * 1000 // count]}/ILSVRC2012_val_{i:08d}.JPEG" for i in range(count)]
        uris = [{"image": i, "image_id": name, "label": name[:9]} for i, name in enumerate(names)]
        return [place | row | {"uri": f"{place['uri']}/{row['image_id']}"} for row in uris], [PHOTO]
    try:
        rows = list_images(config.probing)[0]
    except ValueError as error:
        raise ValueError(f"{error}; a plan without the data needs their number, such as images=50000") from None
    reader, sizes = ImageReader(config.probing.options), []
    for row in rows[:: -(-len(rows) // LOOKED)]:
        try:
            sizes.append(decode(reader.read(row["uri"], row["offset"], row["length"], row["row"])).size)
        except (BadImage, OSError):  # which the sweep leaves out
            continue
    return rows, sizes or [PHOTO]


def _class_names(config: Config, target: TargetSketch, rows: list[dict[str, Any]]) -> list[str]:
    if not config.vocabulary.uses_class_names:
        return []
    return target.class_names or sorted({row["label"] for row in rows if row["label"]})


def _concepts(config: Config, names: list[str], prompts: int) -> list[dict[str, Any]]:
    """The phrases that there will be; made-up ones for those that a language model is still to write."""
    settings = config.vocabulary
    found, skipped = clean(listed(settings, names), settings.max_words)
    if prompts:
        count = round(answered(prompts, settings.llm.max_tokens)) - len(found)
        found += made_up_words(max(count, 0), prompts)
    check_number(found, skipped, settings)
    return found


def _work(config: Config, stage: str, own: dict[str, Any]) -> Work:
    """Device and number of workers of a stage: as many as its own settings, the cluster's, the CPUs and GPUs allow."""
    cluster = config.cluster
    if not cluster.ray:
        return Work(0, 1, 1, cluster.threads)
    need, gpus, cores = cluster.resources(stage), own["gpus"], own["cpus"] or cluster.num_cpus or os.cpu_count() or 1
    most = gpus / need.num_gpus if need.num_gpus else cores / max(need.num_cpus, 1e-3)
    asked = need.workers or (1 if stage == "answers" else own["workers"] or cluster.default.workers or int(most))
    count = max(int(asked), 1)
    cpus = max(need.num_cpus, cores / count) if need.num_gpus else need.num_cpus  # decoding takes all that there are
    return Work(need.num_gpus, count, cpus, cluster.threads)


def priced(config: Config, estimates: list[Estimate], facts: Facts, rates: Rates, own: dict[str, Any]) -> list[Line]:
    """Time and money of each stage. Where a stage needs other resources than the one before, processes start anew."""
    lines, before = [], None
    for found in estimates:
        stage = found.stage.split()[-1].split("/")[0]
        work = _work(config, stage, own)
        spent = seconds(found, work, rates, facts)
        kind, used = config.cluster.resources(stage), min(found.parts, work.workers)
        fresh = rates.start if kind != before else 0.0
        before = kind
        held = spent + fresh * used
        lines.append(Line(found, work, spent, spent / max(used, 1) + fresh, _money(config, found, held, work, rates)))
    return lines


def _money(config: Config, found: Estimate, held: float, work: Work, rates: Rates) -> float:
    return money(found, held, work, rates, config.vocabulary.llm.prices)


def _subject(facts: Facts) -> str:
    units = sum(layer.num_units for layer in facts.target.layers)
    text = f"{facts.images:,} images, {units:,} units of {len(facts.target.layers)} layers, {facts.phrases:,} phrases"
    cost, clip = facts.target.cost, facts.clip.image
    text += f"; target {cost.flops / 1e9:.3g} GFLOP an image, {cost.parameters / 1e6:.3g} M parameters"
    text += f"; CLIP {clip.flops / 1e9:.3g} GFLOP"
    timed_ = [f"{name} {1e3 * s:.3g} ms an image (measured)" for name, s in facts.seconds.items()]
    return "; ".join([text, *timed_])


def _text(line: Line) -> str:
    e = line.estimate
    return (
        f"{e.stage:<26} {e.parts:>6,} {e.passes:>11,.0f} {e.images:>10,.0f} {e.flops / 1e12:>10,.2f}"
        f" {sum(e.rows.values()):>13,.0f} {sum(e.bytes.values()) / 1e6:>10,.2f} {'gpu' if line.work.gpu else 'cpu':>3}"
        f" {_time(line.seconds):>9} {_time(line.wall):>9} {e.memory / 2**30:>6.1f} {line.money:>9,.2f}"
    )


def _time(spent: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if spent >= 2 * length:
            return f"{spent / length:,.1f} {unit}"
    return f"{spent:,.1f} s"


def _totals(lines: list[Line]) -> list[str]:
    all_of = [line.estimate for line in lines]
    sizes = {f"{e.stage}: {name}": size for e in all_of for name, size in e.bytes.items()}
    on = {gpu: _time(sum(x.seconds for x in lines if x.work.gpu == gpu)) for gpu in (False, True)}
    work, stored = sum(x.seconds for x in lines), sum(sizes.values())
    first, fullest = max(lines, key=lambda x: x.seconds), max(all_of, key=lambda e: e.memory)
    largest = max(sizes, key=lambda name: sizes[name])
    found = [
        f"total: {sum(e.passes for e in all_of):,.0f} model passes, {sum(e.flops for e in all_of) / 1e15:,.3g} PFLOP,"
        f" {sum(sum(e.rows.values()) for e in all_of):,.0f} rows, {stored / 1e9:,.3g} GB to store",
        f"time: {on[False]} of CPU workers, {on[True]} of GPU workers, {_time(sum(x.wall for x in lines))} in all",
        f"largest cost: {first.estimate.stage}, {first.seconds / work:.0%} of the work",
        f"largest table: {largest}, {sizes[largest] / 1e9:,.3g} GB, {sizes[largest] / stored:.0%} of the store",
        f"fullest worker: {fullest.stage}, {fullest.memory / 2**30:.1f} GiB of memory; none needs a disk of its own",
    ]
    if any(e.said for e in all_of):
        asked, said = sum(e.asked for e in all_of), sum(e.said for e in all_of)
        found.append(f"language model: {asked:,.0f} tokens of prompts, {said:,.0f} of answers")
    if any(x.money for x in lines):
        found.append(f"money: {sum(x.money for x in lines):,.2f}")
    return found


def table(lines: list[Line]) -> pa.Table:
    """One row a stage; `tables`, `table_rows` and `table_bytes` are lists of equal length."""
    rows = []
    for line in lines:
        found = asdict(line.estimate)
        sizes = found.pop("rows"), found.pop("bytes")
        found |= {"tables": list(sizes[0]), "table_rows": [*sizes[0].values()]}
        found |= {"files": list(sizes[1]), "file_bytes": [*sizes[1].values()]}
        rows.append(found | {"gpu": line.work.gpu, "seconds": line.seconds, "wall": line.wall, "money": line.money})
    return pa.Table.from_pylist(rows)


if __name__ == "__main__":
    from flows.cli import run_flow

    sys.exit(run_flow(main, sys.argv[1:]))
