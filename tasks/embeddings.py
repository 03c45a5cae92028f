"""Stages embeddings and phrase_embeddings: CLIP vectors of the distinct crops, and of the phrases.

In: crops and images, or phrases. Out: one float16 vector of norm 1 each. Whole-image crops are not encoded again:
their vector is the image's own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F

from tasks.clip import Clip, ClipSettings
from tasks.columns import BOX
from tasks.crops import MAX_CROPS
from tasks.decoding import AHEAD, from_processes, prefetch
from tasks.forward import worker_device
from tasks.images import ImageList, covering, opened_there
from tasks.pixels import FILTERS, to_device
from tasks.store import Folder, PartReport
from tasks.tables import make_table

TEXTS_PER_PART = 1024
PHOTO_BYTES = 2**26
"""Of the memory in which a process hands over a photo, at most; larger ones, above 22 megapixels, go through a pipe."""


@dataclass
class EmbeddingsJob:
    out: Folder
    images: ImageList
    patches: Folder
    clip: ClipSettings
    threads: int


class EmbeddingsWorker:
    """Decodes each image of a shard once, cuts its crops and encodes them in full batches. Patches that need none,
    because another patch or the whole image has the same crop, are reported as skipped.

    Batches are cut on the number of a crop among all crops of the run, so each but the last is full and a crop's
    neighbours do not depend on the shard size. A batch that two shards share is computed for both.
    """

    def __init__(self, job: EmbeddingsJob) -> None:
        self.job, self.images, self.device = job, job.images, worker_device(job.threads)
        self.clip = Clip(job.clip, self.device, job.images.batch_size)
        # Cut and resized there: the same bits as by Pillow, later on a CPU.
        preprocess, is_gpu = self.clip.preprocess, self.device.type == "cuda"
        self.on_device = is_gpu and preprocess.interpolation in FILTERS and len(set(preprocess.size)) == 1

    @cached_property
    def crops(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all crops of the run that are no whole images, in order, and their boxes, int [n, 4]."""
        table = self.job.patches.read_all("crops", columns=["crop_id", *BOX])
        ids, boxes = table["crop_id"].to_numpy(), np.stack([table[c].to_numpy() for c in BOX], 1).astype(int)
        cut = ids % MAX_CROPS != 0
        return ids[cut], boxes[cut]

    def run(self, part: int) -> PartReport:
        report, shard, size = PartReport(part), self.images.shard(part), self.images.batch_size
        with report.phase("read"):
            ids, boxes = self.crops
            start, stop = np.searchsorted(ids, (shard.start * MAX_CROPS, shard.stop * MAX_CROPS)).tolist()
            patches = self.job.patches.read("patches", part, columns=["rank"]).num_rows
        with report.phase("compute"):
            starts = covering(start, stop, size)
            some = slice(starts.start, starts.start + len(starts) * size)
            found = [self.clip.vectors(batch) for batch in self._batches(ids[some] // MAX_CROPS, boxes[some])]
            vectors = torch.cat(found).cpu().numpy() if found else np.zeros((0, 1), np.float16)
            vectors = vectors[start - starts.start :][: stop - start]
        table = make_table("embeddings", {"crop_id": ids[start:stop], "embedding": vectors})
        with report.phase("write"):
            self.job.out.write(part, {"embeddings": table})
        report.rows, report.skipped = {"embeddings": stop - start}, {"repeated crops": patches - (stop - start)}
        return report

    def _batches(self, numbers: np.ndarray, boxes: np.ndarray) -> Iterator[torch.Tensor]:
        """uint8 [batch_size, H, W, 3] of the crops with these boxes, in order; zeros fill the last one up."""
        size = self.images.batch_size
        waiting = torch.zeros(0, *self.clip.preprocess.size, 3, dtype=torch.uint8, device=self.device)
        for crops_NHWC in self._crops(numbers, boxes):
            waiting = torch.cat([waiting, crops_NHWC])
            while len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]
        if len(waiting):
            yield F.pad(waiting, (0, 0, 0, 0, 0, 0, 0, size - len(waiting)))

    def _crops(self, numbers: np.ndarray, boxes: np.ndarray) -> Iterator[torch.Tensor]:
        """uint8 [n, H, W, 3] of the crops of each image, decoded ahead, beside a GPU in processes as ImageList.batches
        does; `numbers` are sorted."""
        preprocess, (images, firsts) = self.clip.preprocess, np.unique(numbers, return_index=True)
        boxes_of = dict(zip(images.tolist(), np.split(boxes, firsts)[1:], strict=True))

        def cut(image: int) -> np.ndarray:
            photo = self.images.open(image, self.images.reader)
            return np.stack([preprocess.pixels(photo.crop(tuple(box))) for box in boxes_of[image].tolist()])

        wanted = images.tolist()
        if self.on_device:
            sizes = self.images.column("width")[images].astype(int) * self.images.column("height")[images]
            largest = min(3 * int(sizes.max(initial=0)), PHOTO_BYTES)
            found = from_processes(partial(opened_there, self.images), wanted, largest)
        else:
            found = prefetch(cut, wanted, AHEAD)
        for image, loaded in zip(wanted, found, strict=True):
            pixels = to_device(loaded, self.device)
            yield preprocess.cut(pixels, boxes_of[image]) if self.on_device else pixels


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
