"""Synthetic tables of a run, written through the real store: what the report and `show` read.

Hostile on purpose: layers, concepts and image ids are full of markup, quotes, control and bidi characters.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from tasks.crops import MAX_CROPS, crop_grid, snap, square
from tasks.images import ImageList
from tasks.layers import Layer, unit_blocks
from tasks.neurons import STATUSES
from tasks.report import ReportJob, ReportSettings
from tasks.store import Folder, StoreSettings
from tasks.tables import SCHEMAS, make_table

LAYERS = [
    Layer("blocks.0.mlp/act <b>\"odd\" & '../../x'", 1000, "tokens", (14, 14), 1),
    Layer("blocks.0.mlp_act _b_ _odd_ _ _.._.._x_", 3, "chw", (7, 7)),  # nearly the same file name
    Layer("head", 12, "vector"),
]
HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>' onmouseover='alert(1)",
    "javascript:alert(1)",
    "</style></script><!-- {{ 7 * 7 }} ${1} &amp; &#x3c;",
    "very " * 60 + "long" + "g" * 400,
    "caf\u00e9 \u7f8e\u672f \U0001f98a",
    "\u05d0\u05d1\u05d2 \u202egnp.exe",
    "\x1b[31mred\x07",
]
IDS = [
    "n01/plain 1.jpg",
    "a\"b'c/<i>2</i>.jpg",
    "javascript:alert(2)",
    "\u202ertl/\x1b]0;title\x07.jpg",
    "tar#x?.tar/5%20.jpg",
]
FOLDERS = {
    "neurons": ("neurons",),
    "scores": ("scores",),
    "exemplars": ("exemplars",),
    "patches": ("patches", "crops"),
    "validation": ("validation",),
    "drawn": ("drawn",),
    "traits": ("traits", "census"),
    "coverage": ("coverage",),
    "causes": ("causes", "agreement"),
    "ablation": ("ablation", "cumulative"),
    "report": ("pages",),
}
SHARD = 4
"""Images per shard."""
UNITS = 300
"""Units per block; pages end elsewhere."""
SIZES = [0.5, 0.25]
"""Of the crop grid."""


def write_images(root: Path) -> ImageList:
    """Ten JPEGs of several shapes; the colour tells which image it is."""
    files, sizes = [root / f"{i}.jpg" for i in range(10)], [(320, 240), (240, 320), (100, 100), (640, 80), (30, 40)]
    for i, file in enumerate(files):
        Image.new("RGB", sizes[i % 5], (20 * i, 255 - 20 * i, 90)).save(file, comment=b"c" * 1000)
    return image_list(root, files, [IDS[i % 5] + str(i // 5) for i in range(10)])


def image_list(root: Path, files: list[Path], ids: list[str]) -> ImageList:
    count, sizes = len(files), [Image.open(file).size for file in files]
    columns = {"image": range(count), "image_id": ids, "uri": [str(file) for file in files], "content": ids}
    columns |= {name: [None] * count for name in ("offset", "length", "row", "label")}
    columns |= {"width": [w for w, _ in sizes], "height": [h for _, h in sizes]}
    columns |= {"split": ["explain"] * count, "status": ["ok"] * count}
    folder = Folder(StoreSettings(str(root)), "probing", "0" * 16, ("images",))
    folder.write(0, {"images": make_table("images", columns)})
    return ImageList(folder, SHARD, SHARD, 100, {})


def write_run(root: Path, images: ImageList, layers: list[Layer], phrases: list[str], patches: int = 10) -> ReportJob:
    """The tables of a whole run, ready for the report."""
    folders = {name: Folder(StoreSettings(str(root)), name, "0" * 16, tables) for name, tables in FOLDERS.items()}
    blocks, rng, layouts = unit_blocks(layers, UNITS), np.random.default_rng(0), {x.name: x.layout for x in layers}
    shown: list[list[dict]] = []  # patches of each block
    for part, block in enumerate(blocks):
        units = [unit_row(block.layer, unit, phrases) for unit in range(block.start, block.stop)]
        boxes = layouts[block.layer] != "vector"
        shown.append([u | row for u in units for row in patch_rows(images, u["unit"], patches, boxes, rng)])
        scores = [u | score_row(i, concept) for u in units for i, concept in enumerate(u["concepts"])]
        named = [u for u in units if u["phrase"] is not None]
        rows = {"neurons": units, "validation": units, "scores": scores, "exemplars": shown[-1], "drawn": named}
        for name, found in rows.items():
            folders[name].write(part, {name: make(name, found)})
    for part, layer in enumerate(layers):
        written = {"census": make("census", [census_row(layer, part, phrases)]), "traits": make("traits", [])}
        folders["traits"].write(part, written)
    causes = list(cause_rows(layers, phrases))
    told = {"causes": make("causes", causes), "agreement": make("agreement", AGREEMENT)}
    folders["causes"].write(0, told)
    curves = make("cumulative", list(cumulative_rows()))
    folders["ablation"].write(0, {"ablation": make("ablation", causes), "cumulative": curves})
    folders["coverage"].write(0, {"coverage": make("coverage", list(coverage_rows(layers, phrases)))})
    for shard in range(images.num_shards):
        inside = [[row for row in block if row["image"] in images.shard(shard)] for block in shown]
        rows = [row for block in inside for row in block]
        crops = {row["crop_id"]: row | row["crop"] for row in rows}
        written = {"patches": make("patches", rows), "crops": make("crops", [crops[i] for i in sorted(crops)])}
        folders["patches"].write(shard, written, {"patches": [len(block) for block in inside]})
    facts = {"target": "vit_<b>tiny</b>", "clip": HOSTILE[0]}
    job = {"layers": layers, "blocks": blocks, "settings": ReportSettings(), "run": "night & <day>", "facts": facts}
    job["class_names"] = HOSTILE
    return ReportJob(folders.pop("report"), images, **folders, **job)


def make(table: str, rows: list[dict]) -> pa.Table:
    return make_table(table, {name: [row[name] for row in rows] for name in SCHEMAS[table].names})


def unit_row(layer: str, unit: int, phrases: list[str]) -> dict[str, Any]:
    """What neurons and validation say: statuses and phrases in turn, confidence falling, some without one."""
    status, concepts = STATUSES[unit % 6], [phrases[(unit + 7 * i) % len(phrases)] for i in range(5)]
    r = None if status == "dead" or unit % 7 == 3 else 0.9 - unit % 100 / 90
    return {
        "layer": layer,
        "unit": unit,
        "status": status,
        "phrase": None if status == "dead" else concepts[0],
        "concepts": concepts,
        "weights": [0.4, 0.3, 0.15, 0.1, 0.05],
        "margin": 0.1,
        "meanings": concepts[: 1 + unit % 2],
        "shares": [0.7, 0.3][: 1 + unit % 2],
        "confidence": r,
        "correlation": r,
        "lower": None if r is None else r - 0.1,
        "upper": None if r is None else min(r + 0.1, 1),
        "probability": r and 0.9 * r,
        "bar": 0.05,
        "p": None if r is None else 0.001,
        **dict.fromkeys(("auprc", "auc", "f1", "iou", "mad"), r),
        "q": None if r is None else 0.01,
        "images": 0 if layer == "head" else 50,
        "rival": concepts[1],
        "rival_gain": 3.0,
        "exemplars": [],
        "negative": None if status == "dead" or unit % 4 == 0 else concepts[2],
        "negative_confidence": None if status == "dead" or unit % 4 != 1 else 0.3,
        "auc": None if unit % 5 == 4 else 0.97,
        "shown": 0 if unit % 5 == 4 else 48,
        "absent": 0 if unit % 5 == 4 else 47,
    }


AGREEMENT = [{"what": "screen & drop", "value": 0.75, "rows": 9}, {"what": "too little", "value": None, "rows": 0}]


def cause_rows(layers: list[Layer], phrases: list[str]) -> Iterator[dict[str, Any]]:
    """Units 0 to 11 of the last layer for class 0, the last one for the others too; class 2 has unit 2 of the first.

    Of class 1 there are no name and no controls, and no image changes sides. Of class 7 nothing is lost."""
    for rank, own in enumerate([0] * 12 + list(range(1, len(HOSTILE)))):
        drop, last = -0.5 if own == 7 else 3 - rank / 8, layers[-1]
        unit = min(rank, last.num_units - 1)
        yield {
            "rank": rank,
            "layer": layers[0].name if own == 2 else last.name,
            "unit": 2 if own == 2 else unit,
            "status": STATUSES[0],
            "phrase": None if own == 1 else phrases[rank % len(phrases)],
            "class": HOSTILE[own],
            "class_index": own,
            "screen": drop + 1,
            "images": 12,
            "logit_drop": drop,
            "logit_lower": drop - 1,
            "logit_upper": drop + 1,
            "accuracy_drop": drop / 4,
            "accuracy_lower": drop / 4 - (own != 1) / 10,
            "accuracy_upper": drop / 4 + (own != 1) / 10,
            "other_logit_drop": 0.01,
            "other_accuracy_drop": 0.0,
            "controls": 0 if own == 1 else 20,
            "control_logit_drop": None if own == 1 else 0.25,
            "control_accuracy_drop": None if own == 1 else 0.02,
            "control_share": None if own == 1 else 1 - rank / 40,
            "cosine": None if own == 1 else 0.8,
            "cosine_chance": None if own == 1 else 0.4,
        }


def cumulative_rows() -> Iterator[dict[str, Any]]:
    """Of class 0, and of one that no pair is about; too few random units for the last row."""
    for own in (0, 999):
        for number, units in enumerate((0, 1, 2, 4, 6)):
            control = None if units == 6 else 1 - number / 20
            yield {
                "class_index": own,
                "units": units,
                "images": 12,
                "logit": 5.0 - units,
                "accuracy": 1 - number / 4,
                "control_logit": control,
                "control_accuracy": control,
            }


def coverage_rows(layers: list[Layer], phrases: list[str]) -> Iterator[dict[str, Any]]:
    """Figures of all layers and each; every phrase is a hub, a prompt, one of a pair, or never used."""
    for layer in (None, *(layer.name for layer in layers)):
        for what in ("above the null", "explained", "distinct names", "confidence", "gain"):
            yield {"what": what, "layer": layer, "name": None, "value": 0.5, "units": 10}
    yield {"what": "near-duplicates", "layer": None, "name": None, "value": 0.5, "units": 3}
    for what in ("hub", "never used", "near-duplicate", "prompt"):
        for i, name in enumerate(phrases):
            yield {"what": what, "layer": None, "name": name, "value": 0.95, "units": 9 - i}
    for number in ("0", "1"):
        yield {"what": "round", "layer": None, "name": number, "value": 0.1, "units": 7}


def census_row(layer: Layer, depth: int, phrases: list[str]) -> dict[str, Any]:
    """Every phrase is a family; the second layer explains nothing and has no figures."""
    statuses = STATUSES[2:] if depth == 1 else STATUSES
    families = [] if depth == 1 else phrases
    figures = {"confidence": 0.5, "monosemanticity": -0.02, "clarity": 0.25, "redundancy": 0.9, "names": 0.5}
    figures = {name: value / (depth + 1) for name, value in figures.items()}
    return {
        "layer": layer.name,
        "units": layer.num_units,
        "statuses": statuses,
        "status_shares": [1 / len(statuses)] * len(statuses),
        "families": families,
        "family_shares": [1 / len(families) for _ in families],
        **(dict.fromkeys(figures) if depth == 1 else figures),
    }


def score_row(rank: int, concept: str) -> dict[str, Any]:
    evidence = {
        "score": 1.0,
        "lead": 1.0,
        "null_z": 9.0 - rank,
        "share": 0.8,
        "adds": rank == 1,
        "meaning": (0.7, 0.3, None)[min(rank, 2)],
    }
    return {"rank": rank, "concept_id": str(rank), "concept": concept, "family": "object"} | evidence


def patch_rows(images: ImageList, unit: int, patches: int, boxes: bool, rng: np.random.Generator) -> Iterator[dict]:
    """Images unit, unit + 3, unit + 6, ... (modulo) with random boxes, or the whole images; two of the other tail."""
    for rank in range(min(patches, len(images))):
        number = (unit + 3 * rank) % len(images)
        size, low = np.array([images.column(c)[number] for c in ("width", "height")]), rng.uniform(0, 0.6, 2)
        box = np.array([0, 0, *size])
        if boxes:
            box = np.concatenate([low, low + rng.uniform(0.1, 0.4, 2)]) * np.tile(size, 2)
        place = snap(square(box[None], 0.25), np.zeros(1, int), size[None], SIZES)[0] if boxes else 0
        grid, levels = crop_grid(int(size[0]), int(size[1]), SIZES)
        row = {"rank": rank, "image": number, "image_id": images.ids[number], "crop_id": number * MAX_CROPS + place}
        row |= {"activation": 9 - rank / 2, "position": 0, "active_fraction": 0.1}
        row |= corners(box) | {"crop": corners(grid[place]) | {"level": levels[place]}}
        yield row | {"tail": "top"}
        if rank < 2:
            yield row | {"tail": "bottom"}


def corners(box: np.ndarray) -> dict[str, float]:
    return dict(zip(("x0", "y0", "x1", "y1"), box.tolist(), strict=True))
