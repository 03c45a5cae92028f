"""The sweep: images and a model in, every neuron named. Read this file first.

  probing -> image_embeddings ----------+-------------------------------+
     |                                  |                               |
     |     answers -> phrases -> phrase_embeddings -> vocabulary        |
     |                                  |                     |         |
     +-> activations -> exemplars -> patches -> embeddings -> scores -> explanations -> validation -> neurons -> report

Every stage writes Parquet parts under <store.root>/<stage>/<fingerprint>/; a stage whose parts are all there is
skipped, so the same command finishes what an interrupted one began, and runs share the stages they have in common.
With neurons.twin the same is done with random weights, as a run of its own, <run>-twin: what it reaches is the bar.

With refine.rounds the language model is asked again about units for which there is no good word (stage clusters); then
answers to explanations run again as stages answers/1, phrases/1, ..., and a unit takes a new name only if it is better.
Over the drawn world a stage `drawn` follows neurons: each name is tested on fresh scenes with and without what it says.

In: config. Out: the tables and a manifest runs/<run>/run.json.
"""

import sys
from copy import copy
from dataclasses import asdict, replace
from typing import Any

from flows.config import Config, compose, multirun
from flows.run import Run
from flows.stage import Work, run_stage
from tasks.activations import ActivationsJob
from tasks.answers import AnswersJob
from tasks.clip import check_clip, clip_identity
from tasks.clusters import ClustersJob, RefineSettings
from tasks.coverage import CoverageJob
from tasks.drawn import PHRASES_PER_PART, DrawnJob, named_phrases
from tasks.embeddings import TEXTS_PER_PART, EmbeddingsJob, PhraseEmbeddingsJob
from tasks.exemplars import ExemplarsJob
from tasks.explanations import Earlier, ExplanationsJob
from tasks.forward import Description, TargetPass, describe
from tasks.image_embeddings import ImageEmbeddingsJob
from tasks.images import ImageList
from tasks.layers import unit_blocks
from tasks.llm import llm_identity
from tasks.neurons import NeuronsJob
from tasks.patches import PatchesJob
from tasks.phrases import PhrasesJob, VocabularySettings, identity
from tasks.precision import PrecisionJob, choose_dtype
from tasks.probing import ProbingJob, list_images
from tasks.prompting import Prompt, cluster_prompts
from tasks.report import ReportJob, num_parts, templates
from tasks.scores import ScoresJob
from tasks.store import Folder, Store, fingerprint
from tasks.tables import make_table
from tasks.target import random_twin
from tasks.validation import ValidationJob
from tasks.vocabulary import VocabularyJob
from tasks.world import files, orders

MODEL = ("torch", "torchvision", "timm", "pillow", "numpy")
WORDS = ("answers", "phrases", "phrase_embeddings", "vocabulary")
"""Stages that make the vocabulary."""
CLIP = ("torch", "open-clip-torch", "transformers", "timm", "pillow", "numpy")


def main(arguments: list[str]) -> int:
    overrides = [a for a in arguments if a != "--multirun"]
    jobs = multirun(overrides) if "--multirun" in arguments else [overrides]
    configs = [compose(job) for job in jobs]
    if len({config.run for config in configs}) < len(configs):  # a fixed run= would overwrite itself
        configs = [replace(c, run=f"{c.run}-{number}") for number, c in enumerate(configs)]
    sweeps = [Sweep(config) for config in configs]
    for sweep in sweeps:
        sweep.run()
    if len(sweeps) > 1:
        from flows.comparison import compared  # which needs Sweep

        print("\n" + "\n".join(compared(sweeps)))
    return 0


def _round(stage: str, number: int) -> str:
    """Key of one round of a stage."""
    return f"{stage}/{number}" if number else stage


class Sweep:
    """One run: `run` and `explain` list the stages in order; each method below them plans and runs one stage."""

    def __init__(self, config: Config) -> None:
        """Look at everything that can be wrong before anything is written or started. Raises ValueError."""
        self.config = config
        self.manifest = Run(str(config.run), config.store, asdict(config))
        self.rows, self.stamp = list_images(config.probing)
        check_clip(config.clip)
        self.clip = clip_identity(config.clip)
        self.target: Description = describe(config.target, config.layers)
        names = self.target.class_names or sorted({r["label"] for r in self.rows if r["label"]})
        self.class_names = names if config.vocabulary.uses_class_names else []
        self.words = identity(config.vocabulary, self.class_names)  # raises where its file or model is not there
        self.prompts = config.vocabulary.prompts(self.class_names)
        self.blocks = unit_blocks(self.target.layers, config.unit_block)
        self.num_units = sum(map(len, self.blocks))
        self.worked = False
        self.twin: Sweep | None = self._twin() if config.neurons.twin else None
        self.lexicon: Sweep | None = self._against(config.vocabulary.against) if config.vocabulary.against else None

    def _twin(self) -> "Sweep":
        """This sweep with random weights, all else the same. Raises ValueError where the target has none."""
        config, twin = self.config, copy(self)
        target, neurons = random_twin(config.target, self.target.preprocess), replace(config.neurons, twin=False)
        twin.config = replace(config, run=f"{config.run}-twin", target=target, neurons=neurons)
        twin.manifest = Run(str(twin.config.run), config.store, asdict(twin.config))
        twin.target = describe(target, config.layers)
        if twin.target.digest == self.target.digest or twin.target.layers != self.target.layers:
            instead = "its weights or layers are fixed; make them random and give the trained ones as target.checkpoint"
            raise ValueError(f"neurons.twin=true: target.name={target.name}: {instead}")
        twin.twin = twin  # its own bar: what of it is called explained is chance
        return twin

    def _against(self, path: str) -> "Sweep":
        """This sweep with the names of a word list."""
        config, other = self.config, copy(self)
        words = VocabularySettings(path=None if path == "lexicon" else path, merge=config.vocabulary.merge)
        other.config = replace(config, run=f"{config.run}-lexicon", vocabulary=words, refine=RefineSettings())
        other.manifest = Run(str(other.config.run), config.store, asdict(other.config))
        other.words, other.prompts, other.class_names = identity(words), [], []
        return other

    def run(self) -> None:
        self.explain()
        if self.twin:
            self.twin.explain(self.manifest)
            self.twin.neurons()
            self.worked |= self.twin.worked
        self.neurons()
        if self.lexicon:
            self.lexicon.explain()
            self.worked |= self.lexicon.worked
        self.coverage()
        self.drawn()
        self.report()
        self.manifest.save()
        store = Store(self.config.store)
        print("" if self.worked else "everything was done already; nothing was computed")
        print(f"look at  {store.path(self.folder('report').name)}/index.html")

    def explain(self, words: Run | None = None) -> None:
        """Every stage up to the validation of the names; with the vocabulary of another run where one is given."""
        layers = len(self.target.layers)
        print(f"run {self.config.run}: {len(self.rows):,} images, {self.num_units:,} units of {layers} layers")
        self.probing()
        if words is None:
            self.answers(self.prompts)
            self.phrases()
        self.image_embeddings()
        if words is None:
            self.phrase_embeddings()
            self.vocabulary()
        else:
            self.manifest.share(words, WORDS)
        self.precision()
        self.activations()
        self.exemplars()
        self.patches()
        self.embeddings()
        self.scores()
        self.explanations()
        if words is None:
            self.refine()
        self.validation()

    def refine(self) -> None:
        """Rounds of better words, until they are used up or too few units take one."""
        settings = self.config.refine
        for number in range(1, settings.rounds + 1):
            prompts, concepts = self.clusters(number), self.num_concepts
            if not prompts:
                return
            self.answers(prompts, number)
            self.phrases(number)
            if not self.num_phrases:
                return
            self.phrase_embeddings(number)
            self.vocabulary(number)
            if self.num_concepts == concepts:
                return
            self.scores(number)
            self.explanations(number)
            rounds = self.folder("explanations").read_all("explanations", columns=["round"])["round"].to_pylist()
            print(f"round {number}: {rounds.count(number):,} units have a better name")
            if rounds.count(number) < settings.least * self.num_units:
                return

    def folder(self, stage: str) -> Folder:
        """Of its last round."""
        return self.manifest.folder(self.manifest.last(stage))

    def hash(self, stage: str) -> str:
        """Fingerprint of its last round."""
        return self.manifest.stages[self.manifest.last(stage)]

    def _stage(self, job: Any, items: int, unit: str, alone: bool = False) -> None:
        """Run the worker that stands beside the job's class."""
        self.manifest.save()
        worker = f"{type(job).__module__}:{type(job).__name__.removesuffix('Job')}Worker"
        work = Work(job.out, worker, job, self.manifest.parts[self.manifest.last(job.out.stage)], items, unit, alone)
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

    def answers(self, prompts: list[Prompt], number: int = 0) -> None:
        """Only where a language model is asked."""
        settings = self.config.vocabulary
        if not prompts:
            return
        ids = fingerprint({"ids": [prompt.prompt_id for prompt in prompts]})
        payload = llm_identity(settings.llm) | {"prompts": ids, "shard_size": settings.llm.shard_size}
        payload |= {"max_concepts": settings.max_concepts}
        earlier = [self.manifest.folder(key) for key in self.manifest.rounds("answers")]
        folder = self.manifest.plan(_round("answers", number), payload, -(-len(prompts) // settings.llm.shard_size))
        job = AnswersJob(folder, prompts, settings.llm, settings.max_concepts, earlier)
        self._stage(job, len(prompts), "prompt", alone=True)

    def phrases(self, number: int = 0) -> None:
        settings = self.config.vocabulary
        payload = {"source": settings.source, "max_words": settings.max_words, "identity": self.words}
        answers = self.folder("answers") if settings.asks or number else None
        payload |= {"answers": answers.fingerprint if answers else None, "alone": number > 0}
        folder = self.manifest.plan(_round("phrases", number), payload, 1)
        self._stage(PhrasesJob(folder, settings, self.class_names, answers, number > 0), 1, "list")
        self.num_phrases = folder.read_all("phrases", columns=["concept_id"]).num_rows

    def image_embeddings(self) -> None:
        config, parts = self.config, self.images.num_shards
        payload = {"data": self.data, "clip": self.clip}
        folder = self.manifest.plan("image_embeddings", payload, parts, CLIP)
        job = ImageEmbeddingsJob(folder, self.images, config.clip, config.cluster.threads)
        self._stage(job, len(self.images), "image")

    def phrase_embeddings(self, number: int = 0) -> None:
        config, parts = self.config, -(-self.num_phrases // TEXTS_PER_PART)
        batch = config.probing.batch_size
        payload = {"phrases": self.hash("phrases"), "clip": self.clip}
        payload |= {"templates": config.clip.templates, "batch_size": batch}
        folder = self.manifest.plan(_round("phrase_embeddings", number), payload, parts, CLIP)
        job = PhraseEmbeddingsJob(folder, self.folder("phrases"), config.clip, batch, config.cluster.threads)
        self._stage(job, self.num_phrases, "phrase")

    def vocabulary(self, number: int = 0) -> None:
        merge = self.config.vocabulary.merge
        payload: dict[str, Any] = {"phrase_embeddings": self.hash("phrase_embeddings"), "merge": merge}
        before, clusters = (self.folder("vocabulary"), self.folder("clusters")) if number else (None, None)
        if before and clusters:
            payload |= {"before": before.fingerprint, "clusters": clusters.fingerprint, "round": number}
        folder = self.manifest.plan(_round("vocabulary", number), payload, 1, ("torch", "numpy"))
        read = (self.folder("phrases"), self.folder("phrase_embeddings"))
        job = VocabularyJob(folder, *read, merge, self.config.cluster.threads, before, clusters, number)
        self._stage(job, self.num_phrases, "phrase")
        self.num_concepts = folder.read_all("concepts", columns=["concept_id"]).num_rows

    def clusters(self, number: int) -> list[Prompt]:
        """What is to be asked about the units that lack a word."""
        config = self.config
        read = ("activations", "exemplars", "image_embeddings", "vocabulary", "explanations")
        settings = {key: getattr(config.refine, key) for key in ("clusters", "sure", "same_name")}
        payload = settings | asdict(config.vocabulary.wording) | {stage: self.hash(stage) for stage in read}
        folder = self.manifest.plan(_round("clusters", number), payload, 1, ("torch", "numpy"))
        job = ClustersJob(
            folder,
            self.images,
            **{stage: self.folder(stage) for stage in read},
            blocks=self.blocks,
            settings=config.refine,
            wording=config.vocabulary.wording,
            threads=config.cluster.threads,
        )
        self._stage(job, self.num_units, "unit")
        return cluster_prompts(config.vocabulary.wording, folder.read("clusters", 0)["phrases"].to_pylist())

    def precision(self) -> None:
        """Only where the target model runs on a GPU and its number format is left to us."""
        config, self.dtype = self.config, self.config.target.dtype
        on_gpu = config.cluster.ray and config.cluster.resources("activations").num_gpus > 0
        if self.dtype != "auto":
            return
        self.dtype = "float32"
        if on_gpu:
            folder = self.manifest.plan("precision", self._target_payload(), 1, MODEL)
            job = PrecisionJob(folder, self._target_pass())
            self._stage(job, 1, "model")
            self.dtype = choose_dtype(folder)

    def _target_payload(self) -> dict[str, Any]:
        layers = [asdict(layer) for layer in self.target.layers]
        return {
            "data": self.data,
            "weights": self.target.digest,
            "preprocess": asdict(self.target.preprocess),
            "layers": layers,
            "unit_block": self.config.unit_block,
        }

    def _target_pass(self) -> TargetPass:
        config = self.config
        return TargetPass(self.images, config.target, self.target.layers, self.dtype, config.cluster.threads)

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

    def scores(self, number: int = 0) -> None:
        config, parts = self.config, len(self.blocks)
        read = ("exemplars", "patches", "embeddings", "image_embeddings", "vocabulary")
        payload = asdict(config.scorer) | {stage: self.hash(stage) for stage in read}
        folder = self.manifest.plan(_round("scores", number), payload, parts, ("torch", "numpy"))
        job = ScoresJob(
            folder,
            self.images,
            **{stage: self.folder(stage) for stage in read},
            blocks=self.blocks,
            settings=config.scorer,
            k=config.activations.k,
            num_patches=config.patches.k,
            threads=config.cluster.threads,
        )
        self._stage(job, self.num_units, "unit")

    def explanations(self, number: int = 0) -> None:
        config, parts = self.config, len(self.blocks)
        payload: dict[str, Any] = {"scores": self.hash("scores")}
        earlier = None
        if number:
            before, others = self.folder("explanations"), ("activations", "image_embeddings", "vocabulary")
            payload |= {stage: self.hash(stage) for stage in ("explanations", *others)} | {"sure": config.refine.sure}
            folders = {stage: self.folder(stage) for stage in others}
            earlier = Earlier(before, self.images, **folders, number=number, sure=config.refine.sure)
        folder = self.manifest.plan(_round("explanations", number), payload, parts, ("torch", "numpy"))
        read = (self.folder("scores"), self.folder("exemplars"))
        job = ExplanationsJob(folder, *read, self.blocks, config.cluster.threads, earlier)
        self._stage(job, self.num_units, "unit")

    def validation(self) -> None:
        parts = len(self.blocks)
        read = ("activations", "image_embeddings", "vocabulary", "explanations")
        payload: dict[str, Any] = {stage: self.hash(stage) for stage in read}
        chance = self.config.neurons.twin_quantile if self.twin is self else None
        if chance is not None:
            payload["chance"] = chance
        folder = self.manifest.plan("validation", payload, parts, ("numpy", "scipy"))
        folders = {stage: self.folder(stage) for stage in read}
        threads = self.config.cluster.threads
        job = ValidationJob(folder, self.images, **folders, blocks=self.blocks, threads=threads, chance=chance)
        self._stage(job, self.num_units, "unit")

    def neurons(self) -> None:
        parts = len(self.blocks)
        payload = asdict(self.config.neurons) | {"validation": self.hash("validation")}
        if self.twin:
            payload["twin"] = self.twin.manifest.stages["validation"]
        else:
            del payload["twin"], payload["twin_quantile"]
        folder = self.manifest.plan("neurons", payload, parts)
        folders = {stage: self.folder(stage) for stage in ("exemplars", "explanations", "validation")}
        job = NeuronsJob(folder, **folders, blocks=self.blocks, settings=self.config.neurons)
        if self.twin:
            job.twin, job.twin_names = self.twin.folder("validation"), self.twin.folder("explanations")
        self._stage(job, self.num_units, "unit")

    def coverage(self) -> None:
        read = ("neurons", "scores", "explanations", "validation", "vocabulary")
        payload: dict[str, Any] = {stage: self.hash(stage) for stage in read}
        payload |= {"against": self.lexicon.hash("validation") if self.lexicon else None}
        folder = self.manifest.plan("coverage", payload, 1, ("torch", "numpy"))
        job = CoverageJob(
            folder,
            **{stage: self.folder(stage) for stage in read},
            threads=self.config.cluster.threads,
            answers=[self.manifest.folder(key) for key in self.manifest.rounds("answers")],
            against=self.lexicon.folder("validation") if self.lexicon else None,
        )
        self._stage(job, self.num_units, "unit")

    def drawn(self) -> None:
        """Only over images of the drawn world: there every name of the world can be drawn and tested."""
        config = self.config
        if not all(uri.startswith("world://") for uri in config.probing.uris):
            return
        phrases = named_phrases(self.folder("neurons"))
        parts = max(1, -(-len(phrases) // PHRASES_PER_PART))
        payload = asdict(config.drawn) | {"neurons": self.hash("neurons")}
        payload |= {"world": [files.VERSION, orders.VERSION]}
        folder = self.manifest.plan("drawn", payload, parts, (*MODEL, "scipy"))
        job = DrawnJob(folder, self._target_pass(), self.folder("neurons"), config.layers.pool, config.drawn)
        self._stage(job, len(phrases), "phrase")

    def report(self) -> None:
        config, parts = self.config, num_parts(self.images, self.target.layers)
        words = config.vocabulary.path.rsplit("/", 1)[-1] if config.vocabulary.path else config.vocabulary.source
        facts = {
            "target": f"{config.target.source} {config.target.name.rsplit('/', 1)[-1]}",
            "images": f"{len(self.images):,}, {int(self.images.ok.sum()):,} usable",
            "vocabulary": f"{words}, {self.num_concepts:,} concepts",
            "clip": config.clip.name.rstrip("/").rsplit("/", 1)[-1],
            "scorer": config.scorer.name,
        }
        payload = asdict(config.report) | {"run": config.run, "facts": facts, "templates": templates()}
        payload |= {stage: self.manifest.stages.get(stage) for stage in ("neurons", "drawn", "coverage")}
        folder = self.manifest.plan("report", payload, parts)
        folders = {stage: self.folder(stage) for stage in ("neurons", "scores", "exemplars", "patches", "validation")}
        job = ReportJob(
            folder,
            self.images,
            **folders,
            layers=self.target.layers,
            blocks=self.blocks,
            settings=config.report,
            run=str(config.run),
            facts=facts,
            drawn=self.folder("drawn") if "drawn" in self.manifest.stages else None,
            coverage=self.folder("coverage"),
        )
        self._stage(job, parts, "page")


if __name__ == "__main__":
    from flows.cli import run_flow

    sys.exit(run_flow(main, sys.argv[1:]))
