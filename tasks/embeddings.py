"""Stages embeddings and phrase_embeddings: CLIP vectors of the distinct crops, and of the phrases.

In: crops and images, or phrases. Out: one float16 vector of norm 1 each. Whole-image crops are not encoded again:
their vector is the image's own.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from tasks.clip import Clip, ClipSettings
from tasks.crops import MAX_CROPS
from tasks.forward import worker_device
from tasks.images import ImageList, ImageReader, prefetch
from tasks.store import Folder, PartReport
from tasks.tables import make_table

TEXTS_PER_PART = 1024


@dataclass
class EmbeddingsJob:
    out: Folder
    images: ImageList
    patches: Folder
    clip: ClipSettings
    threads: int


class EmbeddingsWorker:
    """Decodes each image of a shard once, cuts its crops and encodes them in full batches.

    Batches are cut inside the crops of one batch of images, so a crop's neighbours do not depend on the shard size.
    """

    def __init__(self, job: EmbeddingsJob) -> None:
        self.job, self.images = job, job.images
        self.clip = Clip(job.clip, worker_device(job.threads), job.images.batch_size)

    def run(self, part: int) -> PartReport:
        report, size = PartReport(part), self.images.batch_size
        with report.phase("read"):
            crops = self.job.patches.read("crops", part)
            ids = crops["crop_id"].to_numpy()
            boxes = np.stack([crops[c].to_numpy() for c in ("x0", "y0", "x1", "y1")], 1).astype(int)
            cut = ids % MAX_CROPS != 0
            ids, boxes = ids[cut], boxes[cut]
        with report.phase("compute"):
            numbers = ids // MAX_CROPS
            starts = np.unique(np.concatenate([np.flatnonzero(np.diff(numbers // size, prepend=-1)), [len(ids)]]))
            pixels = self._pixels(numbers, boxes)
            found = [self._encode(pixels, stop - start) for start, stop in pairwise(starts)]
            vectors = np.concatenate(found) if found else np.zeros((0, 1), np.float16)
        table = make_table("embeddings", {"crop_id": ids, "embedding": vectors})
        with report.phase("write"):
            self.job.out.write(part, {"embeddings": table})
        report.rows = {"embeddings": len(ids)}
        return report

    def _pixels(self, numbers: np.ndarray, boxes: np.ndarray):
        """Iterator over uint8 [H, W, 3] of all crops, in order."""
        reader = ImageReader(self.images.options)

        def cut(image: int) -> list[np.ndarray]:
            photo = self.images.open(image, reader)
            return [self.clip.preprocess.pixels(photo.crop(tuple(box))) for box in boxes[numbers == image].tolist()]

        for crops in prefetch(cut, np.unique(numbers).tolist(), self.images.batch_size):
            yield from crops

    def _encode(self, pixels, count: int) -> np.ndarray:
        size, found = self.images.batch_size, []
        for start in range(0, count, size):
            batch = np.zeros((size, *self.clip.preprocess.size, 3), np.uint8)
            length = min(size, count - start)
            for slot in range(length):
                batch[slot] = next(pixels)
            found.append(self.clip.images(torch.from_numpy(batch))[:length])
        return np.concatenate(found)


@dataclass
class PhraseEmbeddingsJob:
    out: Folder
    phrases: Folder
    """Of the table phrases, or of concepts."""
    clip: ClipSettings
    batch_size: int
    threads: int


class PhraseEmbeddingsWorker:
    """Encodes one slice of the phrases through the templates."""

    def __init__(self, job: PhraseEmbeddingsJob) -> None:
        self.job = job
        self.clip = Clip(job.clip, worker_device(job.threads), job.batch_size)

    def run(self, part: int) -> PartReport:
        report = PartReport(part)
        with report.phase("read"):
            table = "phrases" if "phrases" in self.job.phrases.tables else "concepts"
            phrases = self.job.phrases.read_all(table, columns=["concept_id", "concept"])
            phrases = phrases.slice(part * TEXTS_PER_PART, TEXTS_PER_PART)
        with report.phase("compute"):
            vectors = self.clip.concepts(phrases["concept"].to_pylist())
        table = make_table("phrase_embeddings", {"concept_id": phrases["concept_id"].to_pylist(), "embedding": vectors})
        with report.phase("write"):
            self.job.out.write(part, {"phrase_embeddings": table})
        report.rows = {"phrase_embeddings": table.num_rows}
        return report
