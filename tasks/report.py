"""Stage report: pages that open from disk or straight from a bucket, without a server.

In: the neurons and their evidence, the images. Out, below the stage's folder: index.html, layers.html, vocabulary.html,
where units were switched off classes.html, the pages of each layer (layers/), thumbnails (images/), and the table
pages. Parts: image shards (thumbnails), then layers, then the pages about all layers.
"""

import io
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from tasks.crops import MAX_CROPS
from tasks.decoding import prefetch
from tasks.images import ImageList, ImageReader
from tasks.layers import Block, Layer
from tasks.report_classes import classes_page, worst_classes
from tasks.report_layers import layers_page
from tasks.report_page import STATUSES, render
from tasks.report_vocabulary import vocabulary_page
from tasks.store import Folder, PartReport
from tasks.tables import make_table

FRAME = (180, 100)
"""Largest width and height of a patch on the page, CSS pixels; all but panoramas have this height."""
CLASSES = 3
"""Classes on a unit's card that it hurts most when it is switched off."""


@dataclass
class ReportSettings:
    patches: int = 8
    """Patches shown per neuron."""
    page_units: int = 250
    """Neurons per page."""
    thumbnail: int = 192
    """Longer side of the thumbnails in pixels."""

    def __post_init__(self) -> None:
        for key, least in (("patches", 1), ("page_units", 1), ("thumbnail", 16)):
            if getattr(self, key) < least:
                raise ValueError(f"report.{key}={getattr(self, key)}: must be at least {least}")


@dataclass
class ReportJob:
    out: Folder
    images: ImageList
    neurons: Folder
    scores: Folder
    exemplars: Folder
    patches: Folder
    validation: Folder
    traits: Folder
    """With the census of the layers: a page of its own."""
    layers: list[Layer]
    blocks: list[Block]
    settings: ReportSettings
    run: str
    """Name of the run."""
    facts: dict[str, str]
    """What was run on what: shown as they are at the top of the index."""
    drawn: Folder | None = None
    """Tests of the names on drawn scenes, where the run has them."""
    coverage: Folder | None = None
    """How well the vocabulary serves the units: a page of its own."""
    causes: Folder | None = None
    """What the model loses without single units, where the run has it: a page of its own, and lines on the cards."""
    ablation: Folder | None = None
    """What a class loses without many of them; there where causes is."""
    class_names: list[str] | None = None
    """Of the model's outputs, in order; None where they have none."""


class Page(NamedTuple):
    """A row of the pages table; a page about all layers belongs to none and shows no units."""

    layer: str | None
    path: str
    units: int


def num_parts(images: ImageList, layers: list[Layer]) -> int:
    return images.num_shards + len(layers) + 1


class ReportWorker:
    """Writes thumbnails of one image shard, the pages of one layer, or those about all layers."""

    def __init__(self, job: ReportJob) -> None:
        self.job = job
        self.pages = [page_names(i, layer, job.settings.page_units) for i, layer in enumerate(job.layers)]

    def run(self, part: int) -> PartReport:
        report, job, layer = PartReport(part), self.job, part - self.job.images.num_shards
        with report.phase("compute"):
            if layer < 0:
                files, rows = self._thumbnails(part), []
            elif layer < len(job.layers):
                files, rows = self._layer(layer)
            else:
                files = {"index.html": self._index(), "layers.html": self._compared()}
                if job.coverage:
                    files["vocabulary.html"] = vocabulary_page(job.run, job.coverage.read_all("coverage").to_pylist())
                if job.causes and job.ablation:
                    files["classes.html"] = self._classes(job.causes, job.ablation)
                rows = [Page(None, path, 0) for path in files]
        table = make_table("pages", {c: [getattr(row, c) for row in rows] for c in Page._fields})
        with report.phase("write"):
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda path: job.out.store.put(f"{job.out.name}/{path}", files[path]), files))
            job.out.write(part, {"pages": table})
        report.rows = {"pages": table.num_rows, "files": len(files)}
        return report

    def _thumbnails(self, part: int) -> dict[str, bytes]:
        images, side, reader = self.job.images, self.job.settings.thumbnail, ImageReader(self.job.images.options)
        found = self.job.patches.read("patches", part, columns=["image"], filters=self._shown)
        numbers = np.unique(found["image"].to_numpy()).tolist()
        data = prefetch(lambda i: thumbnail(images.open(i, reader), side), numbers, ahead=64)
        return {thumbnail_path(i): jpeg for i, jpeg in zip(numbers, data, strict=True)}

    def _layer(self, number: int) -> tuple[dict[str, bytes], list[Page]]:
        layer, size, paths = self.job.layers[number], self.job.settings.page_units, self.pages[number]
        neurons = [
            n for b, block in enumerate(self.job.blocks) if block.layer == layer.name for n in self._neurons(layer, b)
        ]
        pages = [neurons[i : i + size] for i in range(0, len(neurons), size)]
        spans = [(path, page[0]["unit"], page[-1]["unit"]) for path, page in zip(paths, pages, strict=True)]
        shared = {"run": self.job.run, "layer": layer, "pages": spans, "counts": count_statuses(neurons)}
        files = {
            path: render("layer", shared | {"number": i, "neurons": page})
            for i, (path, page) in enumerate(zip(paths, pages, strict=True))
        }
        return files, [Page(layer.name, path, len(page)) for path, page in zip(paths, pages, strict=True)]

    def _neurons(self, layer: Layer, part: int) -> list[dict[str, Any]]:
        """Rows of one unit block with everything a page shows about them."""
        job = self.job
        scores = job.scores.read("scores", part, columns=["unit", "concept", "null_z", "share"]).to_pylist()
        evidence = {(row["unit"], row["concept"]): row for row in scores}
        checks = job.validation.read("validation", part, columns=["unit", "images", "rival"]).to_pylist()
        validation = {row["unit"]: row for row in checks}
        frames = self._frames(layer, part)
        return [
            neuron
            | {
                "concepts": [
                    evidence.get((neuron["unit"], concept), {}) | {"concept": concept, "weight": weight}
                    for concept, weight in zip(neuron["concepts"], neuron["weights"], strict=True)
                ],
                "validation": validation[neuron["unit"]],
                "drawn": self._drawn.get((layer.name, neuron["unit"])),
                "hurts": self._hurts.get((layer.name, neuron["unit"]), []),
                "frames": frames.get(neuron["unit"], []),
            }
            for neuron in job.neurons.read("neurons", part).to_pylist()
        ]

    @cached_property
    def _drawn(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Rows of the drawn table that have an AUC, by layer and unit."""
        rows = self.job.drawn.read_all("drawn").to_pylist() if self.job.drawn else []
        return {(row["layer"], row["unit"]): row for row in rows if row["auc"] is not None}

    @cached_property
    def _hurts(self) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """Rows of causes, by layer and unit: the classes that each hurts most."""
        return worst_classes(self.job.causes.read_all("causes").to_pylist(), CLASSES) if self.job.causes else {}

    def _frames(self, layer: Layer, part: int) -> dict[int, list[dict[str, Any]]]:
        """By unit, strongest first: the thumbnail of each patch's image and where to draw its boxes, in percent."""
        job, width, height = self.job, self.job.images.column("width"), self.job.images.column("height")
        exemplars = job.exemplars.read("exemplars", part, columns=["unit", "rank", "activation"], filters=self._shown)
        activation = {(row["unit"], row["rank"]): row["activation"] for row in exemplars.to_pylist()}
        shards = [job.patches.read("patches", s, group=part) for s in range(job.images.num_shards)]
        frames: dict[int, list[dict[str, Any]]] = {}
        for row in pa.concat_tables(shards).sort_by([("unit", "ascending"), ("rank", "ascending")]).to_pylist():
            if row["tail"] != "top" or row["rank"] >= job.settings.patches:
                continue
            size, crop = (int(width[row["image"]]), int(height[row["image"]])), row["crop_id"]
            box = None if layer.layout == "vector" else percent([row[c] for c in ("x0", "y0", "x1", "y1")], size)
            frame = {c: row[c] for c in ("rank", "image_id")} | {"activation": activation[row["unit"], row["rank"]]}
            frame |= {"path": thumbnail_path(row["image"]), "size": fitted(size, FRAME), "box": box}
            frame["crop"] = percent(self._crop(crop), size) if crop % MAX_CROPS else None
            frames.setdefault(row["unit"], []).append(frame)
        return frames

    @property
    def _shown(self) -> list[tuple[str, str, Any]]:
        return [("tail", "==", "top"), ("rank", "<", self.job.settings.patches)]

    @cached_property
    def _crops(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted crop ids and their boxes [n, 4]."""
        crops = self.job.patches.read_all("crops", columns=["crop_id", "x0", "y0", "x1", "y1"])
        return crops["crop_id"].to_numpy(), np.stack([crops[c].to_numpy() for c in ("x0", "y0", "x1", "y1")], 1)

    def _crop(self, crop_id: int) -> list[float]:
        ids, boxes = self._crops
        return boxes[np.searchsorted(ids, crop_id)].tolist()

    def _index(self) -> bytes:
        columns = ["layer", "unit", "status", "phrase", "confidence", "negative"]
        neurons = self.job.neurons.read_all("neurons", columns=columns).to_pylist()
        of_layer: dict[str, list[dict]] = {layer.name: [] for layer in self.job.layers}
        for neuron in neurons:
            neuron["auc"] = self._drawn.get((neuron["layer"], neuron["unit"]), {}).get("auc")
            of_layer[neuron["layer"]].append(neuron)
        layers = [
            summary(rows) | {"name": layer, "pages": pages}
            for (layer, rows), pages in zip(of_layer.items(), self.pages, strict=True)
        ]
        job = self.job
        values = {"run": job.run, "facts": job.facts, "total": summary(neurons), "layers": layers}
        values |= {"images": int(job.images.ok.sum()), "statuses": STATUSES, "vocabulary": job.coverage is not None}
        values |= {"classes": job.causes is not None, "negative": any(n["negative"] is not None for n in neurons)}
        return render("index", values)

    def _classes(self, causes: Folder, ablation: Folder) -> bytes:
        of_layer = {layer.name: paths for layer, paths in zip(self.job.layers, self.pages, strict=True)}

        def card(layer: str, unit: int) -> str:
            return f"{of_layer[layer][unit // self.job.settings.page_units]}#unit-{unit}"

        return classes_page(
            self.job.run,
            causes.read_all("causes").to_pylist(),
            ablation.read_all("cumulative").to_pylist(),
            causes.read_all("agreement").to_pylist(),
            self.job.class_names or [],
            card,
        )

    def _compared(self) -> bytes:
        first = {layer.name: pages[0] for layer, pages in zip(self.job.layers, self.pages, strict=True)}
        return layers_page(self.job.run, self.job.traits.read_all("census").to_pylist(), first)


def page_names(number: int, layer: Layer, page_units: int) -> list[str]:
    """Paths of a layer's pages; the number keeps layers apart whose names are alike after cleaning."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", layer.name)[:80]
    return [f"layers/{number:03d}-{slug}-{i + 1}.html" for i in range(-(-layer.num_units // page_units))]


def thumbnail_path(image: int) -> str:
    return f"images/{image}.jpg"


def thumbnail(image: Image.Image, side: int) -> bytes:
    """JPEG whose longer side is `side`, or that of the image where it is shorter."""
    width, height = image.size
    small = (
        image
        if max(width, height) <= side
        else image.resize(fitted((width, height), (side, side)), Image.Resampling.LANCZOS)
    )
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82, optimize=True, comment=b"")  # Pillow would carry the file's own comment over
    return buffer.getvalue()


def fitted(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same shape that fits into the frame."""
    scale = min(frame[0] / size[0], frame[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def percent(box: list[float], size: tuple[int, int]) -> str:
    """CSS that lays an element over x0, y0, x1, y1 (pixels) of an image of that size."""
    x0, y0, x1, y1 = (100 * value / size[i % 2] for i, value in enumerate(box))
    return f"left:{x0:.2f}%;top:{y0:.2f}%;width:{x1 - x0:.2f}%;height:{y1 - y0:.2f}%"


def count_statuses(neurons: list[dict[str, Any]]) -> dict[str, int]:
    counts = Counter(neuron["status"] for neuron in neurons)
    return {status: counts[status] for status in STATUSES if counts[status]}


def summary(neurons: list[dict[str, Any]]) -> dict[str, Any]:
    """Number of units, counts by status, median confidence and AUC (None without any), five most frequent phrases."""
    known = {key: [n[key] for n in neurons if n[key] is not None] for key in ("confidence", "auc")}
    phrases = Counter(n["phrase"] for n in neurons if n["phrase"] is not None)
    return {
        "units": len(neurons),
        "counts": count_statuses(neurons),
        "median": {key: float(np.median(values)) if values else None for key, values in known.items()},
        "phrases": sorted(phrases.items(), key=lambda item: (-item[1], item[0]))[:5],
    }
