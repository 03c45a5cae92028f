"""The stages that find what excites each unit: images, activations, exemplars, patches and their CLIP vectors.

In: a config, its images listed and its target described. Out: one folder of Parquet parts per stage, in the manifest.
"""

from dataclasses import asdict
from typing import Any

from flows.config import Config
from flows.run import Run
from flows.stage import Work, run_stage
from tasks.activations import ActivationsJob
from tasks.clip import ClipSettings
from tasks.embeddings import EmbeddingsJob
from tasks.exemplars import ExemplarsJob
from tasks.forward import Description, TargetPass
from tasks.image_embeddings import ImageEmbeddingsJob
from tasks.images import ImageList
from tasks.layers import Block
from tasks.patches import PatchesJob
from tasks.precision import PrecisionJob, choose_dtype
from tasks.probing import ProbingJob
from tasks.store import Folder
from tasks.tables import make_table

MODEL = ("torch", "torchvision", "timm", "pillow", "numpy")
CLIP = ("torch", "open-clip-torch", "transformers", "timm", "pillow", "numpy")
"""Libraries whose versions change what a target or a CLIP computes."""


class EvidenceStages:
    """Each method plans and runs one stage: what it reads, what its fingerprint holds, which worker does it."""

    config: Config
    manifest: Run
    rows: list[dict[str, Any]]
    """The listing."""
    stamp: str
    """Identity of the listed files."""
    clip: Any
    """Identity of the CLIP."""
    judge: Any
    """Identity of the CLIP that judges; None where it is the same."""
    target: Description
    blocks: list[Block]
    num_units: int
    worked: bool
    """Whether any part had to be made."""

    def folder(self, stage: str) -> Folder:
        """Of its last round."""
        return self.manifest.folder(self.manifest.last(stage))

    def hash(self, stage: str) -> str:
        """Fingerprint of its last round."""
        return self.manifest.stages[self.manifest.last(stage)]

    def _stage(self, job: Any, items: int, unit: str, alone: bool = False) -> None:
        """Run the worker that stands beside the job's class."""
        self.manifest.keep()
        worker = f"{type(job).__module__}:{type(job).__name__.removesuffix('Job')}Worker"
        work = Work(job.out, worker, job, self.manifest.num_parts(job.out), items, unit, alone)
        self.worked |= run_stage(work, self.config.cluster)

    def probing(self) -> None:
        settings = self.config.probing
        payload = asdict(settings) | {"files": self.stamp}
        for irrelevant in ("pooled_max", "max_skipped", "options"):
            payload.pop(irrelevant)
        listing = self.manifest.plan("listing", payload, 1)
        if not listing.done():
            columns = {name: [row[name] for row in self.rows] for name in self.rows[0]}
            listing.write(0, {"listing": make_table("listing", columns)})
        parts = -(-len(self.rows) // settings.shard_size)
        folder = self.manifest.plan("probing", payload, parts, ("pillow",))
        self._stage(ProbingJob(folder, listing, settings), len(self.rows), "image")
        self.images = ImageList(folder, settings.shard_size, settings.batch_size, settings.pooled_max, settings.options)
        self._usable()
        self.data = self.images.digest()

    def _usable(self) -> None:
        """Refuse a dataset with too many unusable images, or none to explain with. Raises ValueError."""
        status, limit = self.images.column("status"), self.config.probing.max_skipped
        bad = int((status != "ok").sum())
        if bad > limit * len(status):
            reasons = ", ".join(sorted(set(status) - {"ok"}))
            raise ValueError(f"probing.max_skipped={limit}: {bad} of {len(status)} images cannot be used ({reasons})")
        if not self.images.explain.any():
            raise ValueError(f"probing.explain={self.config.probing.explain}: no usable image falls into this split")

    def image_embeddings(self) -> None:
        self._image_embeddings("image_embeddings", self.clip, self.config.clip)

    def _image_embeddings(self, key: str, identity: Any, clip: ClipSettings) -> Folder:
        payload = {"data": self.data, "clip": identity}
        folder = self.manifest.plan(key, payload, self.images.num_shards, CLIP)
        job = ImageEmbeddingsJob(folder, self.images, clip, self.config.cluster.threads)
        self._stage(job, len(self.images), "image")
        return folder

    def precision(self) -> None:
        """Only where the target model runs on a GPU and its number format is left to us."""
        config, self.dtype = self.config, self.config.target.dtype
        if self.dtype != "auto":
            return
        self.dtype = "float32"
        if config.cluster.on_gpu("activations"):
            folder = self.manifest.plan("precision", self._target_payload(), 1, MODEL)
            job = PrecisionJob(folder, self._target_pass())
            self._stage(job, 1, "model")
            self.dtype = choose_dtype(folder)

    def _target_payload(self) -> dict[str, Any]:
        layers = [layer.identity() for layer in self.target.layers]
        return {
            "data": self.data,
            "weights": self.target.digest,
            "preprocess": asdict(self.target.preprocess),
            "layers": layers,
            "unit_block": self.config.unit_block,
            "shuffled": self.config.target.shuffled,
        }

    def _target_pass(self) -> TargetPass:
        config, about = self.config, self.target
        digest = None if config.target.random else about.digest
        return TargetPass(
            self.images, config.target, about.layers, self.dtype, config.cluster.threads, about.channels_last, digest
        )

    def activations(self) -> None:
        config, parts = self.config, self.images.num_shards
        payload = self._target_payload() | asdict(config.activations)
        payload |= {"pool": config.layers.pool, "dtype": self.dtype, "pooled_max": config.probing.pooled_max}
        payload |= {"image_embeddings": self.hash("image_embeddings")}
        folder = self.manifest.plan("activations", payload, parts, MODEL)
        read = self.folder("image_embeddings")
        job = ActivationsJob(folder, self._target_pass(), read, self.blocks, config.layers.pool, config.activations)
        self._stage(job, len(self.images), "image")

    def exemplars(self) -> None:
        parts = len(self.blocks)
        folder = self.manifest.plan("exemplars", {"activations": self.hash("activations")}, parts)
        job = ExemplarsJob(folder, self.images, self.folder("activations"), self.blocks, self.config.activations.k)
        self._stage(job, self.num_units, "unit")
        counts = (folder.read("unit_stats", part, columns=["count"])["count"].to_numpy() for part in range(parts))
        if not any(count.any() for count in counts):  # nearly always the first part tells
            raise ValueError(
                f"target.dtype={self.dtype}: no activation of any unit is finite on any image; "
                "try target.dtype=float32, and look at the weights"
            )

    def patches(self) -> None:
        config, parts = self.config, self.images.num_shards
        payload = asdict(config.patches) | {"exemplars": self.hash("exemplars")}
        folder = self.manifest.plan("patches", payload, parts, MODEL)
        job = PatchesJob(folder, self._target_pass(), self.folder("exemplars"), self.blocks, config.patches)
        self._stage(job, len(self.images), "image")

    def embeddings(self) -> None:
        config, parts = self.config, self.images.num_shards
        payload = {"patches": self.hash("patches"), "clip": self.clip}
        folder = self.manifest.plan("embeddings", payload, parts, CLIP)
        job = EmbeddingsJob(folder, self.images, self.folder("patches"), config.clip, config.cluster.threads)
        self._stage(job, len(self.images), "image")
