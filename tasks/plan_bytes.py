"""How many bytes a table will take: rows like those to come are made up and encoded as the stages encode theirs.

In: the listing, the words and the sizes that a config gives. Out: bytes of one Parquet object. Nothing is read from a
store. What Parquet and its compression make of a table hangs on how varied its columns are, so they are made up with
as much variety as measured tables have: normal activations, images and concepts of which few are chosen often.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.columns import F16, F64, STR
from tasks.crops import MAX_CROPS, crop_grid
from tasks.moments import BINS
from tasks.signs import RECTIFIED
from tasks.store import encode
from tasks.tables import SCHEMAS, make_table

NAMES = 5
"""Concepts in an explanation (tasks/explanations.py keeps as many)."""
SHOWN = 20
"""Exemplars that an explanation lists."""
PHRASES = 32
"""Of one part of drawn (tasks/drawn.py)."""
POPULAR = 0.45
"""Shape of the gamma distribution that says how often concepts become names: see tasks.plan.distinct."""
CHOSEN = 0.35
"""The same of how often images are exemplars."""
SILENT = 0.6
"""Mean of an activation in its deviations, before a function that cuts off what is below zero."""
MOST = 2**20
"""Values of a made-up table at most; a larger one is taken to grow in proportion."""


@dataclass(frozen=True)
class Shape:
    """What the columns of a table look like; what it does not have is left alone."""

    rows: int
    units: int = 1
    """Units that the rows are about."""
    per_unit: int = 1
    """Rows of one unit in a row."""
    entries: int = 0
    """Length of the lists of candidates, pooled activations, and sums of classes."""
    images: int = 1
    """Images that the rows choose from."""
    positions: int = 1
    kind: str = "free"
    """Of the activations: free, bounded (the lowest ones behind a function such as GELU, nearly all the same), or
    never (below zero)."""
    negative: bool = False
    """Whether the layer has negative sides (tasks.signs)."""
    prefix: bool = False


@dataclass
class Words:
    """What the texts in tables look like."""

    listing: list[dict[str, Any]]
    """Rows of the listing, or of a made-up one."""
    concepts: list[dict[str, Any]]
    """Rows of phrases, real or made up: concept, family, sources, prompt_id."""
    sizes: list[tuple[int, int]]
    """Widths and heights of a few images."""
    width: int
    """Of CLIP vectors."""
    crops: list[float]
    """Sizes of the crop grid."""
    text: str = ""
    """Of a prompt."""
    layer: str = "blocks.0.mlp.act"
    found: dict[tuple[str, Shape], float] = field(default_factory=dict)

    def bytes_of(self, table: str, shape: Shape) -> float:
        """Of a Parquet object with that table in one row group."""
        shape = replace(shape, rows=max(shape.rows, 0))
        if (table, shape) not in self.found:
            units = max(MOST // (self._values(table, shape) * shape.per_unit), 1)
            part = replace(shape, rows=min(shape.rows, units * shape.per_unit))
            size = len(encode(made(table, part, self)))
            self.found[table, shape] = size * max(shape.rows / max(part.rows, 1), 1)
        return self.found[table, shape]

    def group_of(self, table: str, shape: Shape) -> float:
        """Of one row group more in an object that has others."""
        return self.bytes_of(table, shape) - self.empty(table)

    def empty(self, table: str) -> float:
        """Of an object without row groups: what its schema takes."""
        return len(encode(SCHEMAS[table].empty_table(), []))

    def _values(self, table: str, shape: Shape) -> int:
        """Of one row."""
        lists = [f.name for f in SCHEMAS[table] if pa.types.is_list(f.type)]
        return len(SCHEMAS[table]) + sum(_length(table, name, shape, self) for name in lists)


def made(table: str, shape: Shape, words: Words) -> pa.Table:
    """A table of made-up rows, the same whenever it is asked for."""
    rows = Rows(table, shape, words)
    return make_table(table, {f.name: rows.column(f.name, f.type) for f in SCHEMAS[table]})


class Rows:
    """Columns of a made-up table; those that hang together (an image and its id) agree."""

    def __init__(self, table: str, shape: Shape, words: Words) -> None:
        self.table, self.shape, self.words, self.n = table, shape, words, shape.rows
        self.rng = np.random.default_rng(0)
        self.image = self._images(self.n)
        self.unit = np.arange(self.n) // shape.per_unit % max(shape.units, 1)
        self.concept = self.concepts(self.n)

    def _images(self, count: int) -> np.ndarray:
        """Each image once where there is a row for each; else few of them often."""
        images = max(self.shape.images, 1)
        if self.table in ("listing", "images", "image_embeddings"):
            return np.arange(count) % images
        if self.table in ("crops", "embeddings"):
            return np.sort(self.rng.integers(0, images, count))
        weights = self.rng.gamma(CHOSEN, size=images) + 1e-12
        if self.table == "exemplars" and images < 4 * self.shape.per_unit:  # of one unit all different
            keys = self.rng.exponential(size=(-(-count // self.shape.per_unit), images)) / weights
            return keys.argsort(1)[:, : self.shape.per_unit].reshape(-1)[:count]
        return self.rng.choice(images, count, p=weights / weights.sum())

    def concepts(self, count: int) -> np.ndarray:
        known = len(self.words.concepts)
        if self.table in ("phrases", "phrase_embeddings", "concepts", "concept_embeddings"):
            return np.arange(count) % known
        weights = self.rng.gamma(POPULAR, size=known) + 1e-12
        return self.rng.choice(known, count, p=weights / weights.sum())

    def column(self, name: str, dtype: pa.DataType) -> Any:
        make = COLUMNS.get(f"{self.table}.{name}") or COLUMNS.get(name)
        if make is not None:
            return make(self)
        if pa.types.is_list(dtype):
            return self.lists(name, dtype.value_type)
        if dtype == STR:
            return [None] * self.n
        if pa.types.is_boolean(dtype):
            return self.rng.random(self.n) < 0.1
        if pa.types.is_integer(dtype):
            return np.full(self.n, self.shape.images)
        return self.rng.standard_normal(self.n).astype(np.float64 if dtype == F64 else np.float32)

    def lists(self, name: str, kind: pa.DataType) -> Any:
        length = _length(self.table, name, self.shape, self.words)
        if kind == STR:
            flat = self.text(self.concepts(self.n * length))
            return [flat[row * length : (row + 1) * length] for row in range(self.n)]
        if pa.types.is_integer(kind):
            return self.rng.poisson(self._histogram(), (self.n, BINS))
        known = self.table in ("candidates", "pooled")
        values = self.activations(length) if known else self.normal(self.n, length)
        return values.astype(np.float16 if kind == F16 else np.float32)

    def negative(self) -> np.ndarray:
        """float16 [rows, images]."""
        values = self.normal(self.n, self.shape.entries).astype(np.float16)
        return np.where(self.shape.negative & (values < RECTIFIED), -values, np.float16(0))

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape)

    def activations(self, length: int) -> np.ndarray:
        """float [rows, length]: pooled as they come, candidates and exemplars from the strongest to the weakest."""
        rows = self.n if self.table != "exemplars" else -(-self.n // length)
        values = self.normal(rows, length)
        if self.table == "pooled":
            return np.maximum(values + SILENT, 0) if self.shape.kind == "never" else values
        values = -np.sort(-np.abs(values), 1)
        near = 1e-4 if self.table == "candidates" else 1e-6  # the lowest of many images nearly touch the bound
        return -0.17 + near * values**2 if self.shape.kind == "bounded" else values

    def _histogram(self) -> np.ndarray:
        """Mean count in each bin: half of the mass in a dozen of them."""
        place = np.arange(BINS) - BINS * 0.75
        return self.shape.images / 12 * np.exp(-((place / 6) ** 2))

    def text(self, concepts: np.ndarray) -> list[str]:
        return [self.words.concepts[i]["concept"] for i in concepts.tolist()]

    def listed(self, key: str) -> list[Any]:
        rows = self.words.listing
        return [rows[i % len(rows)][key] for i in self.image.tolist()]

    def hexadecimal(self, digits: int, of: np.ndarray | None = None) -> list[str]:
        """Hashes: the same for the same number where numbers are given."""
        numbers = np.arange(self.n) if of is None else of
        names = [self.rng.bytes(digits // 2).hex() for _ in range(int(numbers.max(initial=0)) + 1)]
        return [names[i] for i in numbers.tolist()]

    def sizes(self, axis: int) -> list[int]:
        return [self.words.sizes[i % len(self.words.sizes)][axis] for i in self.image.tolist()]

    @property
    def positives(self) -> int:
        """Images of a split that are a unit's or a name's strongest, a twentieth."""
        return max(self.shape.images // 20, 1)

    def shares(self, parts: int) -> np.ndarray:
        """Fractions of so many parts: measures over few images have few values."""
        return self.rng.integers(0, parts + 1, self.n) / max(parts, 1)

    def of_concepts(self, key: str) -> list[Any]:
        return [self.words.concepts[i][key] for i in self.concept.tolist()]

    def chosen(self, options: list[Any], shares: list[float]) -> list[Any]:
        return [options[i] for i in self.rng.choice(len(options), self.n, p=shares)]

    @cached_property
    def cells(self) -> np.ndarray:
        """A crop of each row's image: its number, level and box."""
        sizes = zip(self.sizes(0), self.sizes(1), strict=True)
        grids = [crop_grid(width, height, self.words.crops) for width, height in sizes]
        picked = (self.rng.random(self.n) ** 1.5 * [len(boxes) for boxes, _ in grids]).astype(int)
        picked = picked[np.lexsort((picked, self.image))] if self.table in ("crops", "embeddings") else picked
        found = [[p, levels[p], *boxes[p]] for (boxes, levels), p in zip(grids, picked.tolist(), strict=True)]
        return np.array(found).reshape(-1, 6)

    def edge(self, axis: int, low: int, high: int) -> np.ndarray:
        """Of the crop; of a patch, on the grid of the layer's map."""
        if self.table == "crops":
            return self.cells[:, 2 + axis]
        side = max(round(self.shape.positions**0.5), 1)
        place = self.rng.integers(round(low * side / 8), max(round(high * side / 8), 1) + 1, self.n)
        return place * np.array(self.sizes(axis % 2)) / side

    def images_of_lists(self, ids: bool) -> Any:
        """Exemplars: of each unit different images."""
        length = _length(self.table, "image", self.shape, self.words)
        found = self._images(self.n * length).reshape(self.n, length)
        if not ids:
            return pa.array(found.astype(np.int32).tolist(), pa.list_(pa.int32()))
        names = [row["image_id"] for row in self.words.listing]
        return pa.array([[names[i % len(names)] for i in row] for row in found.tolist()])


COLUMNS: dict[str, Callable[[Rows], Any]] = {
    "layer": lambda r: [r.words.layer] * r.n,
    "unit": lambda r: r.unit,
    "drawn.unit": lambda r: r.rng.integers(0, 4 * r.n, r.n),  # those of a few phrases, of all layers
    "tail": lambda r: ["top"] * r.n,
    "rank": lambda r: np.arange(r.n) % r.shape.per_unit,
    "image": lambda r: r.image,
    "image_id": lambda r: r.listed("image_id"),
    "uri": lambda r: r.listed("uri"),
    "offset": lambda r: r.listed("offset"),
    "length": lambda r: r.listed("length"),
    "row": lambda r: r.listed("row"),
    "label": lambda r: r.listed("label"),
    "width": lambda r: r.sizes(0),
    "height": lambda r: r.sizes(1),
    "content": lambda r: r.hexadecimal(64),
    "split": lambda r: r.chosen(["explain", "select", "validate"], [0.7, 0.1, 0.2]),
    "images.status": lambda r: ["ok"] * r.n,
    "answers.status": lambda r: ["ok"] * r.n,
    "neurons.status": lambda r: r.chosen(["explained", "unexplained", "ambiguous"], [0.6, 0.35, 0.05]),
    "concept": lambda r: r.text(r.concept),
    "phrase": lambda r: r.text(r.concept),
    "drawn.phrase": lambda r: r.text(r.rng.integers(0, min(PHRASES, len(r.words.concepts)), r.n)),
    "rival": lambda r: r.text(r.concept),
    "chance.concept": lambda r: r.text(np.arange(r.n) % len(r.words.concepts)),
    "concept_id": lambda r: r.hexadecimal(16, r.concept),
    "family": lambda r: r.of_concepts("family"),
    "sources": lambda r: r.of_concepts("sources"),
    "prompt_id": lambda r: r.of_concepts("prompt_id"),
    "answers.prompt_id": lambda r: r.hexadecimal(16),
    "prompt": lambda r: [f"{r.words.text} {text}" for text in r.text(r.concept)],
    "answer": lambda r: [", ".join(r.text(r.concepts(r.shape.entries))) for _ in range(r.n)],
    "synonyms": lambda r: [[]] * r.n,
    "candidates.image": lambda r: r.images_of_lists(ids=False),
    "candidates.position": lambda r: r.rng.integers(0, r.shape.positions, (r.n, r.shape.entries)).astype(np.int32),
    "pooled.negative": lambda r: r.negative(),
    "position": lambda r: r.rng.integers(0, r.shape.positions, r.n),
    "exemplars.activation": lambda r: r.activations(r.shape.per_unit).reshape(-1)[: r.n],
    "exemplars": lambda r: r.images_of_lists(ids=True),
    "meanings": lambda r: [row[:2] for row in r.lists("concepts", STR)],
    "shares": lambda r: np.round(r.rng.random((r.n, 2)) * 10).astype(np.float32) / 10,
    "crop_id": lambda r: r.image * MAX_CROPS + r.cells[:, 0],
    "level": lambda r: r.cells[:, 1],
    "active_fraction": lambda r: r.rng.integers(1, 40, r.n) / np.float32(max(r.shape.positions, 40)),
    "prefix_maximum": lambda r: r.normal(r.n) if r.shape.prefix else pa.nulls(r.n, pa.float32()),
    "count": lambda r: np.full(r.n, r.shape.images),
    "low": lambda r: np.full(r.n, -0.17, np.float32),
    "share": lambda r: np.round(r.rng.random(r.n) * 10).astype(np.float32) / 10,
    "adds": lambda r: r.rng.random(r.n) < 0.08,
    "meaning": lambda r: pa.array(np.where(r.rng.random(r.n) < 0.15, 1.0, np.nan), pa.float32(), from_pandas=True),
    "x0": lambda r: r.edge(0, 0, 5),
    "y0": lambda r: r.edge(1, 0, 5),
    "x1": lambda r: r.edge(2, 3, 8),
    "y1": lambda r: r.edge(3, 3, 8),
    "what": lambda r: ["prompt"] * r.n,
    "name": lambda r: r.text(r.concept),
    "path": lambda r: [f"layers/000-{r.words.layer}-{i}.html" for i in range(r.n)],
    "drawn.auc": lambda r: np.floor(2 * r.shape.images**2 * (1 - r.rng.random(r.n) ** 3)) / (2 * r.shape.images**2),
    "auc": lambda r: r.shares(r.positives * (r.shape.images - r.positives)),
    "f1": lambda r: r.shares(r.positives),
    "iou": lambda r: r.shares(r.positives),
    "truth.auc": lambda r: r.shares(r.shape.images**2 // 8),  # of as many scenes as show the name, one in twelve
    "truth.f1": lambda r: r.shares(r.shape.images**2 // 100),
    "truth.iou": lambda r: r.shares(r.shape.images**2 // 100),
    "truth.shown": lambda r: r.rng.integers(0, r.shape.images // 12 + 1, r.n),
    "truth.absent": lambda r: r.rng.integers(0, r.shape.images // 12 + 1, r.n),
    "bar": lambda r: np.round(r.rng.random(r.n), 2).astype(np.float32),
    "alike": lambda r: r.rng.integers(0, max(r.shape.units, 1), r.n),
}
"""What fills a column, by `table.column` or by the column alone; the rest is normal numbers, or lists of them."""


def _length(table: str, column: str, shape: Shape, words: Words) -> int:
    """Of a list column."""
    if table in ("candidates", "pooled", "screen"):
        return shape.entries
    if "histogram" in column:
        return BINS
    if column == "image" or column == "exemplars":
        return SHOWN
    if table == "census":
        return 4
    return NAMES if table in ("explanations", "neurons") else words.width


def made_up_words(count: int, prompts: int) -> list[dict[str, Any]]:
    """Phrases of two words, as if a language model had written them in answer to so many prompts."""
    rng = np.random.default_rng(0)
    letters, families = np.array(list("abcdefghijklmnoprstuvwy")), ("colour", "texture", "object", "scene")
    known = ["".join(rng.choice(letters, 6)) for _ in range(max(count // 4, 8))]
    ids = [f"level-{rng.bytes(8).hex()}" for _ in range(prompts)]
    rows = []
    for number in range(count):
        first, second, prompt = rng.integers(0, (len(known), len(known), len(ids)))
        said = [ids[i] for i in np.unique(rng.integers(0, len(ids), 1 + number % 3))]
        row = {"concept": f"{known[first]} {known[second]}", "family": families[number % 4], "sources": said}
        rows.append(row | {"prompt_id": ids[prompt]})
    return rows
