"""The report: every neuron once, hostile text harmless, boxes where the data says, the same bytes each time; and show."""

import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from playwright.sync_api import Page, sync_playwright
from PIL import Image

from flows.run import Run
from flows.show import show
from tasks import neurons, report
from tasks.crops import MAX_CROPS, crop_grid, snap, square
from tasks.images import ImageList
from tasks.layers import Layer, unit_blocks
from tasks.report import ReportJob, ReportSettings, ReportWorker, num_parts
from tasks.store import Folder, StoreSettings
from tasks.tables import SCHEMAS, make_table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
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
IDS = ["n01/plain 1.jpg", "a\"b'c/<i>2</i>.jpg", "javascript:alert(2)", "\u202ertl/\x1b]0;title\x07.jpg", "tar#x?.tar/5%20.jpg"]
FOLDERS = {
    "neurons": ("neurons",),
    "scores": ("scores",),
    "exemplars": ("exemplars",),
    "patches": ("patches", "crops"),
    "validation": ("validation",),
    "report": ("pages",),
}
SHARD, UNITS = 4, 300


def write_images(root: Path) -> ImageList:
    """Ten JPEGs of several shapes; every pixel tells which image it is of."""
    sizes = [(320, 240), (240, 320), (100, 100), (640, 80), (30, 40)] * 2
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (20 * i, 255 - 20 * i, 90)).save(root / f"{i}.jpg", comment=b"c" * 1000)
    return image_list(root, [root / f"{i}.jpg" for i in range(len(sizes))], [IDS[i % 5] + str(i // 5) for i in range(10)])


def image_list(root: Path, files: list[Path], ids: list[str]) -> ImageList:
    count, sizes = len(files), [Image.open(file).size for file in files]
    columns = {"image": range(count), "image_id": ids, "uri": [str(file) for file in files]}
    columns |= {name: [None] * count for name in ("offset", "length", "row", "label")}
    columns |= {"width": [w for w, _ in sizes], "height": [h for _, h in sizes], "content": ids}
    columns |= {"split": ["explain"] * count, "status": ["ok"] * count}
    folder = Folder(StoreSettings(str(root)), "probing", "0" * 16, ("images",))
    folder.write(0, {"images": make_table("images", columns)})
    return ImageList(folder, SHARD, SHARD, 100, {})


def write_run(root: Path, images: ImageList, layers: list[Layer], phrases: list[str], patches: int = 10) -> ReportJob:
    """Synthetic tables of a whole run: unit u has phrase u, status u, images u, u + 3, u + 6, ... (modulo)."""
    folders = {name: Folder(StoreSettings(str(root)), name, "0" * 16, tables) for name, tables in FOLDERS.items()}
    blocks, rng = unit_blocks(layers, UNITS), np.random.default_rng(0)
    found: list[list[dict]] = []  # patches of each block
    for part, block in enumerate(blocks):
        keys = [{"layer": block.layer, "unit": unit} for unit in range(block.start, block.stop)]
        has_map = next(x for x in layers if x.name == block.layer).layout != "vector"
        rows = [key | row for key in keys for row in patch_rows(images, key["unit"], patches, has_map, rng)]
        found.append(rows)
        names = [[phrases[(key["unit"] + 7 * i) % len(phrases)] for i in range(5)] for key in keys]
        write(folders["exemplars"], part, "exemplars", [{**row, "position": 0} for row in rows])
        scores = [
            {**key, "rank": i, "concept_id": str(i), "concept": name, "family": "object", "score": 1, "null_z": 9 - i, "share": 0.8}
            for key, five in zip(keys, names, strict=True)
            for i, name in enumerate(five)
        ]
        write(folders["scores"], part, "scores", scores)
        judged = [judge(key["unit"], five[0]) for key, five in zip(keys, names, strict=True)]
        more = {"weights": [0.4, 0.3, 0.15, 0.1, 0.05], "margin": 0.1, "exemplars": []}
        write(folders["neurons"], part, "neurons", [k | j | more | {"concepts": n} for k, j, n in zip(keys, judged, names, strict=True)])
        checks = {"images": 0 if block.layer == "head" else 50, "p": 0.1, "rival_gain": 3.0}
        rows = [k | j | checks | {"correlation": j["confidence"], "rival": n[1]} for k, j, n in zip(keys, judged, names, strict=True)]
        write(folders["validation"], part, "validation", rows)
    for shard in range(images.num_shards):
        inside = [[row for row in rows if row["image"] in images.shard(shard)] for rows in found]
        crops = {row["crop_id"]: row["grid"] | {"crop_id": row["crop_id"], "image": row["image"]} for rows in inside for row in rows}
        tables = {"crops": [crops[i] for i in sorted(crops)], "patches": [row for rows in inside for row in rows]}
        made = {name: make(name, rows) for name, rows in tables.items()}
        folders["patches"].write(shard, made, {"patches": [len(rows) for rows in inside]})
    settings, facts = ReportSettings(), {"target": "vit_<b>tiny</b>", "clip": HOSTILE[0]}
    return ReportJob(folders.pop("report"), images, layers=layers, blocks=blocks, settings=settings, run="night & <day>", facts=facts, **folders)


def judge(unit: int, phrase: str) -> dict:
    status = neurons.STATUSES[unit % 6]
    confidence = None if status == "dead" or unit % 7 == 3 else 0.9 - unit % 100 / 90
    interval = (None, None) if confidence is None else (confidence - 0.1, min(confidence + 0.1, 1))
    named = {"status": status, "phrase": None if status == "dead" else phrase, "confidence": confidence}
    return named | {"lower": interval[0], "upper": interval[1], "q": None if confidence is None else 0.01}


def patch_rows(images: ImageList, unit: int, patches: int, has_map: bool, rng: np.random.Generator) -> Iterator[dict]:
    for rank in range(min(patches, len(images))):
        number = (unit + 3 * rank) % len(images)
        size = np.array([images.column("width")[number], images.column("height")[number]])
        low = rng.uniform(0, 0.6, 2)
        box = np.concatenate([low, low + rng.uniform(0.1, 0.4, 2)]) * np.tile(size, 2) if has_map else np.array([0, 0, *size])
        crop = int(snap(square(box[None], 0.25), np.array([number]), size[None], [0.5, 0.25])[0]) if has_map else number * MAX_CROPS
        grid, levels = crop_grid(*size, [0.5, 0.25])
        place = crop % MAX_CROPS
        row = {"tail": "top", "rank": rank, "image": number, "image_id": images.ids[number], "crop_id": crop}
        row |= {"active_fraction": 0.1, "activation": 9 - rank * 0.5, "grid": corners(grid[place]) | {"level": levels[place]}}
        yield row | corners(box)
        if rank < 2:
            yield row | corners(box) | {"tail": "bottom"}


def corners(box: np.ndarray) -> dict[str, float]:
    return dict(zip(("x0", "y0", "x1", "y1"), box.tolist(), strict=True))


def make(table: str, rows: list[dict]):
    return make_table(table, {name: [row[name] for row in rows] for name in SCHEMAS[table].names})


def write(folder: Folder, part: int, table: str, rows: list[dict]) -> None:
    folder.write(part, {table: make(table, rows)})
