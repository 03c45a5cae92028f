"""The stages that make the vocabulary, of the first round and of later ones.

In: prompts or a word list. Out: the phrases, their vectors and the concepts they are merged into, in the manifest.
"""

from dataclasses import asdict
from typing import Any

from flows.evidence import CLIP, EvidenceStages
from tasks.answers import AnswersJob
from tasks.clip import ClipSettings
from tasks.clusters import ClustersJob
from tasks.embeddings import TEXTS_PER_PART, PhraseEmbeddingsJob
from tasks.llm import llm_identity
from tasks.phrases import PhrasesJob
from tasks.prompting import Prompt, cluster_prompts
from tasks.store import Folder, fingerprint
from tasks.validation import Judge
from tasks.vocabulary import VocabularyJob


def round_of(stage: str, number: int) -> str:
    """Key of one round of a stage."""
    return f"{stage}/{number}" if number else stage


class VocabularyStages(EvidenceStages):
    """Each method plans and runs one stage, in round `number`."""

    class_names: list[str]
    words: Any
    """Identity of what the vocabulary is made from."""

    def answers(self, prompts: list[Prompt], number: int = 0) -> None:
        """Only where a language model is asked."""
        settings = self.config.vocabulary
        if not prompts:
            return
        ids = fingerprint({"ids": [prompt.prompt_id for prompt in prompts]})
        payload = llm_identity(settings.llm) | {"prompts": ids, "shard_size": settings.llm.shard_size}
        payload |= {"max_concepts": settings.max_concepts}
        earlier = [self.manifest.folder(key) for key in self.manifest.rounds("answers")]
        folder = self.manifest.plan(round_of("answers", number), payload, -(-len(prompts) // settings.llm.shard_size))
        job = AnswersJob(folder, prompts, settings.llm, settings.max_concepts, earlier)
        self._stage(job, len(prompts), "prompt", alone=True)

    def phrases(self, number: int = 0) -> None:
        settings = self.config.vocabulary
        payload = {"source": settings.source, "max_words": settings.max_words, "identity": self.words}
        answers = self.folder("answers") if settings.asks or number else None
        payload |= {"answers": answers.fingerprint if answers else None, "alone": number > 0}
        folder = self.manifest.plan(round_of("phrases", number), payload, 1)
        self._stage(PhrasesJob(folder, settings, self.class_names, answers, number > 0), 1, "list")
        self.num_phrases = folder.read_all("phrases", columns=["concept_id"]).num_rows

    def phrase_embeddings(self, number: int = 0) -> None:
        payload = {"phrases": self.hash("phrases"), "clip": self.clip}
        key, read = round_of("phrase_embeddings", number), self.folder("phrases")
        self._phrase_embeddings(key, payload, self.config.clip, read, self.num_phrases)

    def _phrase_embeddings(
        self, key: str, payload: dict[str, Any], clip: ClipSettings, read: Folder, count: int
    ) -> Folder:
        batch = self.config.probing.batch_size
        payload |= {"templates": clip.templates, "batch_size": batch}
        folder = self.manifest.plan(key, payload, -(-count // TEXTS_PER_PART), CLIP)
        job = PhraseEmbeddingsJob(folder, read, clip, batch, self.config.cluster.threads)
        self._stage(job, count, "phrase")
        return folder

    def judging(self) -> Judge | None:
        """Vectors of all images and concepts by the CLIP that judges; nothing where there is no second one."""
        settings = self.config.judge
        if settings is None:
            return None
        images = self._image_embeddings("image_embeddings/judge", self.judge, settings)
        payload = {"vocabulary": self.hash("vocabulary"), "clip": self.judge}
        read = self.folder("vocabulary")
        count = read.read_all("concepts", columns=["concept_id"]).num_rows
        return Judge(images, self._phrase_embeddings("phrase_embeddings/judge", payload, settings, read, count))

    def vocabulary(self, number: int = 0) -> None:
        merge = self.config.vocabulary.merge
        payload: dict[str, Any] = {"phrase_embeddings": self.hash("phrase_embeddings"), "merge": merge}
        before, clusters = (self.folder("vocabulary"), self.folder("clusters")) if number else (None, None)
        if before and clusters:
            payload |= {"before": before.fingerprint, "clusters": clusters.fingerprint, "round": number}
        folder = self.manifest.plan(round_of("vocabulary", number), payload, 1, ("torch", "numpy"))
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
        folder = self.manifest.plan(round_of("clusters", number), payload, 1, ("torch", "numpy"))
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
