"""The stages that follow the names: what kind of units they are, names tested by drawing them, the pages.

In: a sweep whose units have a status. Out: the tables traits, census and drawn, and the report.
"""

from dataclasses import asdict

from flows.evidence import MODEL
from flows.vocabulary import VocabularyStages
from tasks.drawn import PHRASES_PER_PART, DrawnJob, named_phrases
from tasks.report import ReportJob, num_parts
from tasks.report_page import templates
from tasks.traits import TraitsJob
from tasks.truth import TruthJob
from tasks.world import files, orders


class FindingStages(VocabularyStages):
    """Each method plans and runs one stage."""

    def traits(self) -> None:
        """A part is a layer."""
        read = ("activations", "exemplars", "image_embeddings", "neurons", "vocabulary")
        payload = {stage: self.hash(stage) for stage in read}
        folder = self.manifest.plan("traits", payload, len(self.target.layers), ("torch", "numpy"))
        folders, threads = {stage: self.folder(stage) for stage in read}, self.config.cluster.threads
        job = TraitsJob(folder, self.images, **folders, blocks=self.blocks, threads=threads)
        self._stage(job, self.num_units, "unit")

    def drawn(self) -> None:
        """Only over images of the drawn world: there every name of the world can be drawn and tested."""
        config = self.config
        if not config.probing.drawn:
            return
        phrases = named_phrases(self.folder("neurons"))
        parts = max(1, -(-len(phrases) // PHRASES_PER_PART))
        payload = asdict(config.drawn) | {"neurons": self.hash("neurons")}
        payload |= {"world": [files.VERSION, orders.VERSION]}
        folder = self.manifest.plan("drawn", payload, parts, (*MODEL, "scipy"))
        job = DrawnJob(folder, self._target_pass(), self.folder("neurons"), config.layers.pool, config.drawn)
        self._stage(job, len(phrases), "phrase")

    def truth(self) -> None:
        """The same, of the scenes that there are."""
        read = ("activations", "neurons")
        if not self.config.probing.drawn:
            return
        payload = {stage: self.hash(stage) for stage in read} | {"world": [files.VERSION, orders.VERSION]}
        folder = self.manifest.plan("truth", payload, len(self.blocks), ("numpy", "scipy"))
        job = TruthJob(folder, self.images, **{stage: self.folder(stage) for stage in read}, blocks=self.blocks)
        self._stage(job, self.num_units, "unit")

    def report(self) -> None:
        config, parts = self.config, num_parts(self.images, self.target.layers)
        words = config.vocabulary.path.rsplit("/", 1)[-1] if config.vocabulary.path else config.vocabulary.source
        facts = {
            "target": f"{config.target.source} {config.target.name.rsplit('/', 1)[-1]}",
            "images": f"{len(self.images):,}, {int(self.images.ok.sum()):,} usable",
            "vocabulary": f"{words}, {self.num_concepts:,} concepts",
            "clip": config.clip.title,
            "scorer": config.scorer.name,
        }
        facts |= {"judge": config.judge.title} if config.judge else {}
        payload = asdict(config.report) | {"run": config.run, "facts": facts, "templates": templates()}
        shown = ("neurons", "drawn", "traits", "coverage", "causes")
        payload |= {stage: self.manifest.stages.get(stage) for stage in shown}
        folder = self.manifest.plan("report", payload, parts)
        read = ("neurons", "scores", "exemplars", "patches", "validation", "traits")
        there = [stage for stage in ("drawn", "causes", "ablation") if stage in self.manifest.stages]
        folders = {stage: self.folder(stage) for stage in (*read, *there)}
        job = ReportJob(
            folder,
            self.images,
            **folders,
            layers=self.target.layers,
            blocks=self.blocks,
            settings=config.report,
            run=str(config.run),
            facts=facts,
            coverage=self.folder("coverage"),
            class_names=self.target.class_names,
        )
        self._stage(job, parts, "page")
