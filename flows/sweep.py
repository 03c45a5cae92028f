"""The sweep: images and a model in, every neuron named. Read this file first.

  probing -> image_embeddings ----------+-------------------------------+
     |                                  |                               |
     |     answers -> phrases -> phrase_embeddings -> vocabulary        |
     |                                  |                     |         |
     +-> activations -> exemplars -> patches -> embeddings -> scores -> explanations -> validation -> neurons -> report

Every stage writes Parquet parts under <store.root>/<stage>/<fingerprint>/; a stage whose parts are all there is
skipped, so the same command finishes what an interrupted one began, and runs share the stages they have in common.
With neurons.twin the same is done with random weights, as a run of its own, <run>-twin: what it reaches is the bar.
With judge a second CLIP validates the names: image_embeddings/judge and phrase_embeddings/judge are its vectors.

With refine.rounds the language model is asked again about units for which there is no good word (stage clusters); then
answers to explanations run again as stages answers/1, phrases/1, ..., and a unit takes a new name only if it is better.
After neurons, before the report: `traits` measures the units and compares the layers, `coverage` judges the vocabulary,
and over the drawn world `drawn` tests each name on fresh scenes with and without what it says.
With ablation.pairs units are switched off (flows/causes.py): does the model need them, and for which class?

In: config. Out: the tables and a manifest runs/<run>/run.json.
"""

import sys
from copy import copy
from dataclasses import asdict, replace
from typing import Any

from flows.causes import CausesStages, check_causes
from flows.config import Config, check_world, compose, multirun
from flows.evidence import MODEL
from flows.run import Run
from flows.stage import start_ray
from flows.vocabulary import round_of
from tasks.calibration import load
from tasks.chance import ChanceJob
from tasks.clip import clip_identity
from tasks.clusters import RefineSettings
from tasks.coverage import CoverageJob
from tasks.explanations import Earlier, ExplanationsJob
from tasks.forward import Description, describe
from tasks.layers import unit_blocks
from tasks.listing import list_images
from tasks.neurons import NeuronsJob
from tasks.phrases import VocabularySettings, identity
from tasks.scorers import ScorerSettings
from tasks.scores import ScoresJob
from tasks.store import Store
from tasks.target import random_twin
from tasks.validation import Judge, ValidationJob
from tasks.words import other_words

WORDS = ("answers", "phrases", "phrase_embeddings", "vocabulary")
"""Stages that make the vocabulary."""


def main(arguments: list[str]) -> int:
    overrides = [a for a in arguments if a != "--multirun"]
    jobs = multirun(overrides) if "--multirun" in arguments else [overrides]
    configs = [compose(job) for job in jobs]
    if len({config.run for config in configs}) < len(configs):  # a fixed run= would overwrite itself
        configs = [replace(c, run=f"{c.run}-{number}") for number, c in enumerate(configs)]
    sweeps = [Sweep(config) for config in configs]
    if configs[0].cluster.address:  # where nobody answers, nothing is written
        start_ray(configs[0].cluster)
    for sweep in sweeps:
        sweep.run()
    if len(sweeps) > 1:
        from flows.comparison import compared  # which needs Sweep

        print("\n" + "\n".join(compared(sweeps)))
    return 0


class Sweep(CausesStages):
    """One run: `run` and `explain` list the stages in order; each method below them plans and runs one stage."""

    def __init__(self, config: Config) -> None:
        """Look at everything that can be wrong before anything is written or started. Raises ValueError."""
        check_world(config)
        self.rows, self.stamp = list_images(config.probing)
        self.config = config = replace(config, probing=config.probing.sharded(len(self.rows)))
        self.manifest = Run(str(config.run), config.store, asdict(config))
        self.clip = clip_identity(config.clip)
        self.judge = clip_identity(config.judge) if config.judge else None
        self.target: Description = describe(config.target, config.layers)
        names = self.target.class_names or sorted({r["label"] for r in self.rows if r["label"]})
        self.class_names = names if config.vocabulary.uses_class_names else []
        self.words = identity(config.vocabulary, self.class_names)  # raises where its file or model is not there
        self.prompts = config.vocabulary.prompts(self.class_names)
        check_causes(config, self.target.layers, self.target.num_classes)
        self.blocks = unit_blocks(self.target.layers, config.unit_block)
        self.num_units = sum(map(len, self.blocks))
        self.worked = False
        self.twin: Sweep | None = self._twin() if config.neurons.twin else None
        self.lexicon: Sweep | None = self._against(config.vocabulary.against) if config.vocabulary.against else None
        Store(config.store).check()

    def _twin(self) -> "Sweep":
        """This sweep with random weights, all else the same. Raises ValueError where the target has none."""
        config = self.config
        target, neurons = random_twin(config.target, self.target.preprocess), replace(config.neurons, twin=False)
        twin = self.variant("twin", target=target, neurons=neurons)
        twin.target = describe(target, config.layers)
        if twin.target.digest == self.target.digest or twin.target.layers != self.target.layers:
            instead = "its weights or layers are fixed; make them random and give the trained ones as target.checkpoint"
            raise ValueError(f"neurons.twin=true: target.name={target.name}: {instead}")
        twin.twin = twin  # a control: its bars come from other nets and from its other units (tasks.neurons)
        return twin

    def _against(self, path: str) -> "Sweep":
        """This sweep with the names of a word list."""
        other_words(path)  # raises where it is not there
        words = VocabularySettings(path=None if path == "lexicon" else path, merge=self.config.vocabulary.merge)
        other = self.variant("lexicon", vocabulary=words, refine=RefineSettings())
        other.words, other.prompts, other.class_names = identity(words), [], []
        return other

    def variant(self, name: str, **changes: Any) -> "Sweep":
        """This sweep as a run of its own, <run>-<name>, with some groups of the config changed."""
        other = copy(self)
        other.config = replace(self.config, run=f"{self.config.run}-{name}", **changes)
        other.manifest = Run(str(other.config.run), self.config.store, asdict(other.config))
        return other

    def scored_by(self, name: str, scorer: ScorerSettings) -> "Sweep":
        """This sweep with another scorer, the twin too."""
        other = self.variant(name, scorer=scorer)
        other.twin = other._twin() if self.twin else None
        return other

    def run(self) -> None:
        self.name()
        if self.lexicon:
            self.lexicon.explain()
            self.worked |= self.lexicon.worked
        self.traits()
        self.coverage()
        self.drawn()
        self.truth()
        if self.config.ablation.pairs:
            self.screen()
            self.pairs()
            self.ablation()
            self.causes()
        self.report()
        self.manifest.save()
        store = Store(self.config.store)
        print("" if self.worked else "everything was done already; nothing was computed")
        print(f"look at  {store.path(self.folder('report').name)}/index.html")

    def name(self) -> None:
        """Every stage up to a status for every unit, the twin's too."""
        self.explain()
        if self.twin:
            self.twin.explain(self.manifest)
            self.twin.chance()
            self.twin.neurons()
            self.worked |= self.twin.worked
        self.neurons()

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
        self.validation(self.judging())

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

    def scores(self, number: int = 0) -> None:
        config, parts = self.config, len(self.blocks)
        read = ("activations", "exemplars", "patches", "embeddings", "image_embeddings", "vocabulary")
        payload = asdict(config.scorer) | {stage: self.hash(stage) for stage in read}
        folder = self.manifest.plan(round_of("scores", number), payload, parts, ("torch", "numpy"))
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
        folder = self.manifest.plan(round_of("explanations", number), payload, parts, ("torch", "numpy"))
        read = (self.folder("scores"), self.folder("exemplars"))
        job = ExplanationsJob(folder, *read, self.blocks, config.cluster.threads, earlier)
        self._stage(job, self.num_units, "unit")

    def validation(self, judge: Judge | None) -> None:
        read = ("activations", "image_embeddings", "vocabulary", "explanations")
        payload: dict[str, Any] = {stage: self.hash(stage) for stage in read}
        if judge is not None:
            payload["judge"] = [judge.image_embeddings.fingerprint, judge.phrase_embeddings.fingerprint]
        folder = self.manifest.plan("validation", payload, len(self.blocks), ("torch", "numpy", "scipy"))
        job = ValidationJob(
            folder,
            self.images,
            **{stage: self.folder(stage) for stage in read},
            blocks=self.blocks,
            threads=self.config.cluster.threads,
            judge=judge,
        )
        self._stage(job, self.num_units, "unit")

    def chance(self) -> None:
        """What the twin and further random nets reach with each concept; called on the twin."""
        config, judge = self.config, self.judging()
        vocabulary, chosen = self.folder("vocabulary"), config.neurons
        images, vectors = self.folder("image_embeddings"), vocabulary
        if judge is not None:
            images, vectors = judge.image_embeddings, judge.phrase_embeddings
        payload = self._target_payload() | {"pool": config.layers.pool, "dtype": self.dtype}
        payload |= {"nets": chosen.twin_nets, "quantile": chosen.twin_quantile, "vocabulary": vocabulary.fingerprint}
        payload |= {"vectors": [images.fingerprint, vectors.fingerprint]}
        folder = self.manifest.plan("chance", payload, chosen.twin_nets, MODEL)
        job = ChanceJob(
            folder, self._target_pass(), config.layers.pool, vocabulary, images, vectors, chosen.twin_quantile
        )
        self._stage(job, chosen.twin_nets, "net")

    def neurons(self) -> None:
        path = self.config.neurons.calibration
        learned = load(path, self.config.scorer.name) if path else None
        payload = asdict(self.config.neurons) | {"validation": self.hash("validation")}
        payload["calibration"] = learned and asdict(learned)
        if self.twin:
            payload["twin"] = [self.twin.hash("validation"), self.twin.hash("chance")]
        else:
            for irrelevant in ("twin", "twin_quantile", "twin_nets", "twin_confidence"):
                del payload[irrelevant]
        folder = self.manifest.plan("neurons", payload, len(self.blocks))
        folders = {stage: self.folder(stage) for stage in ("exemplars", "explanations", "validation")}
        job = NeuronsJob(folder, **folders, blocks=self.blocks, settings=self.config.neurons, calibration=learned)
        if self.twin:
            job.twin, job.twin_names = self.twin.folder("validation"), self.twin.folder("explanations")
            job.chance = self.twin.folder("chance")
        self._stage(job, self.num_units, "unit")

    def coverage(self) -> None:
        read = ("neurons", "scores", "vocabulary")
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


if __name__ == "__main__":
    from flows.cli import run_flow

    sys.exit(run_flow(main, sys.argv[1:]))
