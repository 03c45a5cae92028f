"""Stage image_embeddings: the CLIP vector of every image, of every split.

In: images, CLIP. Out: one vector per image; unreadable images have a zero vector.
"""

from dataclasses import dataclass

import numpy as np

from tasks.clip import Clip, ClipSettings
from tasks.forward import worker_device
from tasks.images import ImageList
from tasks.store import Folder, PartReport
from tasks.tables import make_table


@dataclass
class ImageEmbeddingsJob:
    out: Folder
    images: ImageList
    clip: ClipSettings
    threads: int


class ImageEmbeddingsWorker:
    """One encode_image per image of a shard."""

    def __init__(self, job: ImageEmbeddingsJob) -> None:
        self.job, self.images = job, job.images
        self.clip = Clip(job.clip, worker_device(job.threads), job.images.batch_size)

    def run(self, part: int) -> PartReport:
        report, vectors = PartReport(part), []
        batches = self.images.shard_batches(part)
        with report.phase("compute"):
            for numbers, pixels in zip(batches, self.images.batches(batches, self.clip.preprocess), strict=True):
                vectors.append(self.clip.images(pixels)[: len(numbers)] * self.images.ok[numbers][:, None])
        numbers = np.array(self.images.shard(part))
        table = make_table(
            "image_embeddings", {"image": numbers, "embedding": np.concatenate(vectors).astype(np.float16)}
        )
        with report.phase("write"):
            self.job.out.write(part, {"image_embeddings": table})
        report.rows = {"image_embeddings": table.num_rows}
        return report
