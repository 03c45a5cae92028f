"""Stage probing: whether each image of the listing can be read, and its split.

In: the listing, which is the fixed shard list (tasks/listing.py). Out: the images table.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from tasks.images import SPLITS, ImageReader
from tasks.pixels import BadImage, decode
from tasks.store import Folder, PartReport, refuse_secrets
from tasks.tables import make_table

EXTENSIONS = {
    "folder": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    "webdataset": (".tar",),
    "parquet": (".parquet",),
}


@dataclass
class ProbingSettings:
    uri: Any = None
    """A folder, file or glob, local or any fsspec URI; or a list of them."""
    format: str = "auto"
    """folder, webdataset, parquet, or auto: told from the file names."""
    labels: str | None = None
    """File with the label of each image, for flat folders: lines 'file label', or JSON {file: label}."""
    explain: float = 0.7
    select: float = 0.1
    validate: float = 0.2
    seed: int = 0
    """Another number splits the images anew."""
    half: int | None = None
    """0 or 1: of the explain images only this half is used. Names that both halves agree on are stable."""
    shard_size: int = 0
    """Images per shard: the unit of work and of resume. A multiple of batch_size; 0: an eighth of the images, at least
    128 and at most 1,024, so that a thousand photos keep eight workers busy."""
    batch_size: int = 32
    """Images per model call; every call has exactly this shape."""
    pooled_max: int = 10_000
    """Images per split whose pooled activations are stored."""
    max_skipped: float = 0.1
    """Share of unusable images above which the run fails."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the fsspec file system of the URIs. Keys come from the environment, never from here."""

    def __post_init__(self) -> None:
        if self.format not in ("auto", *EXTENSIONS):
            raise ValueError(f"probing.format={self.format}: allowed are auto, {', '.join(EXTENSIONS)}")
        shares = {split: getattr(self, split) for split in SPLITS}
        if min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6 or self.explain == 0:
            found = ", ".join(f"probing.{s}={v}" for s, v in shares.items())
            raise ValueError(f"{found}: shares must be at least 0, sum to 1, and explain must be above 0")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"probing.max_skipped={self.max_skipped}: must be a share, from 0 to 1")
        if self.half not in (None, 0, 1):
            raise ValueError(f"probing.half={self.half}: allowed are 0, 1 and null")
        if self.batch_size < 1:
            raise ValueError(f"probing.batch_size={self.batch_size}: must be at least 1")
        if self.pooled_max < 0:
            raise ValueError(f"probing.pooled_max={self.pooled_max}: must be at least 0")
        if self.shard_size < 0 or self.shard_size % self.batch_size:
            allowed = f"0, which is an eighth of the images, and multiples of probing.batch_size={self.batch_size}"
            raise ValueError(f"probing.shard_size={self.shard_size}: allowed are {allowed}")
        refuse_secrets("probing.options", self.options)

    @property
    def uris(self) -> list[str]:
        given = self.uri if isinstance(self.uri, list | tuple) else [] if self.uri is None else [self.uri]
        return [str(uri) for uri in given]  # a folder may be called 2024

    @property
    def drawn(self) -> bool:
        """Whether all images are scenes of the drawn world."""
        return bool(self.uris) and all(uri.startswith("world://") for uri in self.uris)

    def sharded(self, num_images: int) -> "ProbingSettings":
        """With the size of a shard chosen: from the number of images alone, never from that of the workers."""
        size = min(max(-(-num_images // 8), 128), 1024)
        return replace(self, shard_size=self.shard_size or -(-size // self.batch_size) * self.batch_size)


def split_of(content: str, explain: float, select: float, seed: int = 0, half: int | None = None) -> str:
    """Split of an image by the hash of its bytes: copies of one image fall into the same split."""
    digest = hashlib.sha256(f"{seed}:{content}".encode()).hexdigest() if seed else content
    place = int(digest[:13], 16) / 16**13
    if half is not None and place < explain and (place >= explain / 2) != half:
        return "unused"
    return SPLITS[0] if place < explain else SPLITS[1] if place < explain + select else SPLITS[2]


@dataclass
class ProbingJob:
    out: Folder
    listing: Folder
    settings: ProbingSettings


class ProbingWorker:
    """Reads and decodes every image of a shard once."""

    def __init__(self, job: ProbingJob) -> None:
        self.job = job
        self.reader = ImageReader(job.settings.options)

    def run(self, part: int) -> PartReport:
        report, size = PartReport(part), self.job.settings.shard_size
        with report.phase("read"):
            listing = self.job.listing.read("listing", 0).slice(part * size, size)
        with report.phase("compute"):
            found = [self._look(row) for row in listing.to_pylist()]
        columns = {name: listing[name].to_pylist() for name in listing.column_names}
        table = make_table("images", columns | {k: [row[k] for row in found] for k in found[0]})
        with report.phase("write"):
            self.job.out.write(part, {"images": table})
        report.rows = {"images": len(found)}
        report.skipped = dict(Counter(row["status"] for row in found if row["status"] != "ok"))
        return report

    def _look(self, row: dict) -> dict:
        settings, width, height, status, data = self.job.settings, 0, 0, "ok", b""
        try:
            data = self.reader.read(row["uri"], row["offset"], row["length"], row["row"])
            width, height = decode(data).size
        except BadImage as reason:
            status = str(reason)
        except PermissionError:  # other failures of a file that was there a moment ago may pass, and fail the part
            status = "unreadable"
        content = hashlib.sha256(data).hexdigest()
        split = split_of(content, settings.explain, settings.select, settings.seed, settings.half)
        return {"width": width, "height": height, "content": content, "split": split, "status": status}
