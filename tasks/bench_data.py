"""What `axonym bench` works on: drawn JPEG files, a CLIP without words, and the jobs of every stage over them.

In: sizes and a seed. Out: the same jobs that flows/sweep.py makes, without a config, a manifest, open_clip or network.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from tasks.activations import ActivationsJob, ActivationsSettings, ActivationsWorker
from tasks.clip import ClipSettings, LoadedClip
from tasks.crops import CropSettings, crop_grid
from tasks.embeddings import EmbeddingsJob, EmbeddingsWorker
from tasks.exemplars import ExemplarsJob, ExemplarsWorker
from tasks.explanations import ExplanationsJob, ExplanationsWorker
from tasks.forward import TargetPass
from tasks.image_embeddings import ImageEmbeddingsJob, ImageEmbeddingsWorker
from tasks.images import ImageList
from tasks.layers import Layer, unit_blocks
from tasks.listing import list_images
from tasks.neurons import NeuronsJob, NeuronsSettings, NeuronsWorker
from tasks.patches import PatchesJob, PatchesSettings, PatchesWorker
from tasks.pixels import Preprocess
from tasks.probing import ProbingJob, ProbingSettings, ProbingWorker
from tasks.scorers import ScorerSettings
from tasks.scores import ScoresJob, ScoresWorker
from tasks.store import Folder, StoreSettings
from tasks.tables import SCHEMAS, make_table
from tasks.target import TargetSettings, load_target
from tasks.validation import ValidationJob, ValidationWorker
from tasks.words import read_concepts

WIDTH = 512
"""Of CLIP's vectors."""
UNIT_BLOCK = 2048
"""The default of the config."""
PATCHES = PatchesSettings(crops=CropSettings([0.5]))
DISTINCT = 256
"""Pictures that are drawn; further files repeat them, each with bytes of its own behind the end of the picture."""


class Tower(ClipSettings):
    """The image side of a CLIP by its name in timm, with random weights: it costs what a trained one costs."""

    def load(self) -> LoadedClip:
        target = load_target(TargetSettings("timm", self.name, pretrained=False, kwargs={"num_classes": WIDTH}))
        model: Any = target.model
        model.encode_image = model.forward
        return LoadedClip(model, target.preprocess, tokenizer=None, context_length=0)


@dataclass
class Decoded(ImageList):
    """Images that are in memory as the model's input; batches are slices of them."""

    pixels_NHWC: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    """uint8, whole batches."""

    def batches(self, groups: list[np.ndarray], preprocess: Preprocess) -> Iterator[torch.Tensor]:
        for numbers in groups:
            yield self.pixels_NHWC[numbers[0] : numbers[0] + self.batch_size]

    @classmethod
    def of(cls, images: ImageList, preprocess: Preprocess) -> "Decoded":
        groups = [batch for part in range(images.num_shards) for batch in images.shard_batches(part)]
        pixels_NHWC = torch.cat(list(images.batches(groups, preprocess)))
        pixels_NHWC = pixels_NHWC.pin_memory() if torch.cuda.is_available() else pixels_NHWC
        return cls(**images.__getstate__(), pixels_NHWC=pixels_NHWC)


def draw_files(folder: Path, count: int, side: int, seed: int) -> Path:
    """`count` JPEG files, `side` x 3/4 `side` pixels, each of other bytes: smooth grounds, shapes, a little noise."""
    folder.mkdir(parents=True)
    drawn = [_picture(np.random.default_rng((seed, number)), side) for number in range(min(count, DISTINCT))]
    for number in range(count):
        (folder / f"{number:06d}.jpg").write_bytes(drawn[number % len(drawn)] + number.to_bytes(4, "big"))
    return folder


def _picture(rng: np.random.Generator, side: int) -> bytes:
    size = side, side * 3 // 4
    ground = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(ground)
    for shape in (pen.ellipse, pen.rectangle, pen.ellipse, pen.rectangle):
        x, y, length = (int(n) for n in rng.integers(0, side // 2, 3))
        shape((x, y, x + length, y + length // 2), fill=tuple(int(n) for n in rng.integers(0, 256, 3)))
    noise = rng.integers(-12, 13, (size[1], size[0], 1))
    found, picture = io.BytesIO(), Image.fromarray((np.asarray(ground) + noise).clip(0, 255).astype(np.uint8))
    picture.save(found, "JPEG", quality=90)
    return found.getvalue()


@dataclass
class Chain:
    """Every stage of a sweep over one folder of images, in the order in which they run."""

    root: str
    probing: ProbingSettings
    target: TargetSettings
    layers: list[Layer]
    clip: ClipSettings
    dtype: str
    threads: int

    def __post_init__(self) -> None:
        self.blocks = unit_blocks(self.layers, UNIT_BLOCK)
        rows = list_images(self.probing)[0]
        self.probing = self.probing.sharded(len(rows))
        self.shards = -(-len(rows) // self.probing.shard_size)
        self.listing = self.folder("listing")
        self.listing.write(0, {"listing": make_table("listing", {c: [row[c] for row in rows] for c in rows[0]})})

    def folder(self, stage: str, *tables: str) -> Folder:
        return Folder(StoreSettings(self.root), stage, "bench", tables or (stage,))

    @property
    def images(self) -> ImageList:
        """A new one: what it reads of the table it keeps."""
        p = self.probing
        return ImageList(self.folder("probing", "images"), p.shard_size, p.batch_size, p.pooled_max, p.options)

    @property
    def model(self) -> TargetPass:
        return TargetPass(self.images, self.target, self.layers, self.dtype, self.threads)

    @property
    def activations(self) -> ActivationsJob:
        out = self.folder("activations", "candidates", "stats", "pooled")
        read = self.folder("image_embeddings")
        return ActivationsJob(out, self.model, read, self.blocks, "max", ActivationsSettings())

    @property
    def embeddings(self) -> EmbeddingsJob:
        crops = self.folder("patches", "patches", "crops")
        return EmbeddingsJob(self.folder("embeddings"), self.images, crops, self.clip, self.threads)

    def probe(self) -> None:
        worker = ProbingWorker(ProbingJob(self.folder("probing", "images"), self.listing, self.probing))
        for part in range(self.shards):
            worker.run(part)

    def random_embeddings(self) -> None:
        """Image embeddings that no model made."""
        images, rng = self.images, np.random.default_rng(self.probing.seed)
        for part in range(self.shards):
            columns = {"image": np.array(images.shard(part)), "embedding": unit_vectors(len(images.shard(part)), rng)}
            self.folder("image_embeddings").write(part, {"image_embeddings": make_table("image_embeddings", columns)})

    def some_crops(self, per_image: int) -> int:
        """Crops that no patches asked for; how many there are."""
        images, rng, found = self.images, np.random.default_rng(self.probing.seed), 0
        out = Folder(StoreSettings(self.root), "patches", "bench", ("patches", "crops"))
        none = make_table("patches", {name: [] for name in SCHEMAS["patches"].names})
        for part in range(self.shards):
            rows = []
            for image in images.shard(part):
                sizes = int(images.column("width")[image]), int(images.column("height")[image])
                boxes, levels = crop_grid(*sizes, CropSettings().sizes)
                for place in np.sort(rng.choice(np.arange(1, len(boxes)), min(per_image, len(boxes) - 1), False)):
                    rows.append((image * 64 + place, image, levels[place], *boxes[place]))
            names = ("crop_id", "image", "level", "x0", "y0", "x1", "y1")
            columns = {name: np.array([row[i] for row in rows]) for i, name in enumerate(names)}
            out.write(part, {"patches": none, "crops": make_table("crops", columns)})
            found += len(rows)
        return found

    def vocabulary(self, count: int = 0) -> Folder:
        """The shipped word list, or as many words as are asked for, with vectors that no model made."""
        words = list({raw.concept: raw for raw in read_concepts(None) if raw.concept}.values())
        concepts = [f"word {number}" for number in range(count)] or [w.concept for w in words]
        ids = [f"{number:016x}" for number in range(len(concepts))]
        none = [None] * len(concepts)
        columns = {"concept_id": ids, "concept": concepts, "family": none if count else [w.family for w in words]}
        columns |= {"prompt_id": none, "llm": none, "broader": none, "parent": none, "round": [0] * len(concepts)}
        columns |= {"sources": [[]] * len(concepts), "synonyms": [[]] * len(concepts)}
        vectors = unit_vectors(len(concepts), np.random.default_rng(self.probing.seed))
        tables = {"concepts": make_table("concepts", columns)}
        tables["concept_embeddings"] = make_table("concept_embeddings", {"concept_id": ids, "embedding": vectors})
        folder = Folder(
            StoreSettings(self.root), "vocabulary", str(count or "bench"), ("concepts", "concept_embeddings")
        )
        folder.write(0, tables)
        return folder

    def scores(self, vocabulary: Folder) -> ScoresJob:
        """By the concepts of this vocabulary."""
        exemplars, embeddings = self.folder("exemplars", "exemplars", "unit_stats"), self.embeddings
        read = (self.activations.out, exemplars, embeddings.patches, embeddings.out, self.folder("image_embeddings"))
        k = ActivationsSettings().k, PATCHES.k
        out = self.folder("scores")
        return ScoresJob(out, self.images, *read, vocabulary, self.blocks, ScorerSettings(), *k, self.threads)

    def workers(self):
        """(stage, its worker, its parts) in order; each worker is made when it is asked for."""
        images, units, k = self.images, len(self.blocks), ActivationsSettings().k
        activations, embeddings = self.activations, self.embeddings
        patches, image_embeddings = embeddings.patches, self.folder("image_embeddings")
        exemplars, vocabulary = (
            self.folder("exemplars", "exemplars", "unit_stats"),
            self.folder("vocabulary", "concepts", "concept_embeddings"),
        )
        scores, explanations, validation = (self.folder(s) for s in ("scores", "explanations", "validation"))
        yield "probing", ProbingWorker(ProbingJob(images.folder, self.listing, self.probing)), self.shards
        job = ImageEmbeddingsJob(image_embeddings, images, self.clip, self.threads)
        yield "image_embeddings", ImageEmbeddingsWorker(job), self.shards
        yield "activations", ActivationsWorker(activations), self.shards
        yield "exemplars", ExemplarsWorker(ExemplarsJob(exemplars, images, activations.out, self.blocks, k)), units
        job = PatchesJob(patches, self.model, exemplars, self.blocks, PATCHES)
        yield "patches", PatchesWorker(job), self.shards
        yield "embeddings", EmbeddingsWorker(embeddings), self.shards
        yield "scores", ScoresWorker(self.scores(vocabulary)), units
        job = ExplanationsJob(explanations, scores, exemplars, self.blocks, self.threads)
        yield "explanations", ExplanationsWorker(job), units
        read = (activations.out, image_embeddings, vocabulary, explanations)
        yield "validation", ValidationWorker(ValidationJob(validation, images, *read, self.blocks, self.threads)), units
        job = NeuronsJob(self.folder("neurons"), exemplars, explanations, validation, self.blocks, NeuronsSettings())
        yield "neurons", NeuronsWorker(job), units


def unit_vectors(count: int, rng: np.random.Generator) -> np.ndarray:
    """float16 [count, WIDTH] of norm 1."""
    vectors = rng.normal(size=(count, WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
