"""Stage image_embeddings: the CLIP vector of every image, of every split.

In: images, CLIP. Out: one vector per image; unreadable images have a zero vector.
"""

from dataclasses import dataclass

import numpy as np
import torch

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
        report, numbers = PartReport(part), np.array(self.images.shard(part))
        with report.phase("compute"):
            batches = self.images.batches(self.images.shard_batches(part), self.clip.preprocess)
            found = torch.cat([self.clip.vectors(pixels) for pixels in batches])  # a GPU is waited for once
            vectors = found[: len(numbers)].cpu().numpy() * self.images.ok[numbers][:, None]
        table = make_table("image_embeddings", {"image": numbers, "embedding": vectors.astype(np.float16)})
        with report.phase("write"):
            self.job.out.write(part, {"image_embeddings": table})
        report.rows = {"image_embeddings": table.num_rows}
        return report
