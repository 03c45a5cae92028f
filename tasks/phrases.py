"""Stage phrases: what may become a concept.

In: a word list, the class names of a model or data set, or the answers of a language model. Out: the phrases table, one
row per distinct short phrase with its family and where it came from.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from tasks.cleaning import class_rows, clean
from tasks.llm import LlmSettings, check_llm, llm_identity, parse_answer
from tasks.prompting import ASPECTS, LEVELS, Prompt, Wording, class_prompts, level_prompts
from tasks.store import Folder, PartReport, fingerprint
from tasks.tables import SCHEMAS, make_table
from tasks.words import Raw, read_concepts

SOURCES = ("lexicon", "class_names", "llm")
BOUNDS = {"max_words": (1, 12), "max_concepts": (1, 1000), "merge": (0, 1)}


@dataclass
class VocabularySettings:
    source: str = "lexicon"
    """lexicon (a word list), class_names (of the target model or the probing data set) or llm (a language model)."""
    path: str | None = None
    """Word list of source lexicon, local or any fsspec URI: text with one concept per line ('[family]' lines start a
    family), JSON list, JSON {class: [descriptors]}, or Parquet with a column concept. None is the shipped lexicon."""
    domain: str = "everyday photographs"
    """What the images are, in the words of the prompts."""
    levels: list[str] = field(default_factory=lambda: list(LEVELS))
    """Families that the language model is asked for; `any` asks for the domain as a whole."""
    aspects: list[str] = field(default_factory=list)
    """What the language model is asked about each class: features, parts, kinds, around. Any of them also takes the
    class names themselves."""
    max_words: int = 6
    """Words of the longest concept that is taken from a language model."""
    max_concepts: int = 60
    """Concepts per prompt."""
    llm: LlmSettings = field(default_factory=LlmSettings)
    against: str | None = None
    """Word list whose names the run's are compared with in the coverage report: a path, or lexicon for the shipped one.
    None for none."""
    merge: float = 0.98
    """Cosine of CLIP's text vectors from which two phrases are one concept. A lower one merges opposites first."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"vocabulary.source={self.source}: allowed are {', '.join(SOURCES)}")
        if self.path is not None and (self.source != "lexicon" or not self.path.strip()):
            raise ValueError(f"vocabulary.path={self.path}: allowed is a file, with vocabulary.source=lexicon only")
        for key, known in (("levels", LEVELS), ("aspects", ASPECTS)):
            chosen = getattr(self, key)
            if set(chosen) - set(known) or len(set(chosen)) < len(chosen):
                raise ValueError(f"vocabulary.{key}={list(chosen)}: allowed are, once each, {', '.join(known)}")
        for key, (low, high) in BOUNDS.items():
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"vocabulary.{key}={getattr(self, key)}: allowed are {low} to {high}")
        if self.asks:
            check_llm(self.llm)
            if not self.domain.strip():
                raise ValueError("vocabulary.domain is empty: say what the images are, such as 'everyday photographs'")
            if not self.levels and not self.aspects:
                raise ValueError("vocabulary.levels=[]: allowed only with vocabulary.aspects")

    @property
    def asks(self) -> bool:
        """Whether a language model writes the vocabulary."""
        return self.source == "llm"

    @property
    def uses_class_names(self) -> bool:
        return self.source == "class_names" or (self.asks and bool(self.aspects))

    @property
    def wording(self) -> Wording:
        return Wording(self.domain, self.max_words, self.max_concepts)

    def prompts(self, class_names: Iterable[str]) -> list[Prompt]:
        """All that the language model is asked; nothing for word lists."""
        if not self.asks:
            return []
        return level_prompts(self.wording, self.levels) + class_prompts(self.wording, self.aspects, class_names)


def answer_rows(answers: pa.Table, max_skipped: float) -> list[Raw]:
    """The phrases of all answers. ValueError where too many answers are malformed."""
    bad = [row["answer"] for row in answers.to_pylist() if row["status"] == "malformed"]
    if len(bad) > max_skipped * answers.num_rows:
        share = f"{len(bad)} of {answers.num_rows} answers are malformed"
        raise ValueError(f"vocabulary.llm.max_skipped={max_skipped}: {share}; the first begins {bad[0][:80]!r}")
    return [
        Raw(concept, row["family"], tuple(row["sources"]), row["prompt_id"])
        for row in answers.to_pylist()
        for concept in parse_answer(row["answer"])[0]
    ]


def listed(settings: VocabularySettings, class_names: Iterable[str]) -> list[Raw]:
    """The phrases that are there before a language model is asked."""
    found = read_concepts(settings.path) if settings.source == "lexicon" else []
    return found + (class_rows(class_names) if settings.uses_class_names else [])


def identity(settings: VocabularySettings, class_names: Iterable[str] = ()) -> dict:
    """What the stage's fingerprint must contain beyond the settings: the content of what they name.

    Raises ValueError where it holds too few concepts, unless a language model is to write more.
    """
    found, names = {"lexicon": fingerprint({"rows": read_concepts(None)})}, list(class_names)
    if settings.path is not None:
        found["file"] = fingerprint({"rows": read_concepts(settings.path)})
    if settings.uses_class_names:
        found["class_names"] = fingerprint({"names": names})
    if settings.asks:
        found["prompts"] = fingerprint({"ids": [p.prompt_id for p in settings.prompts(names)]})
        found |= llm_identity(settings.llm)
    else:
        check_number(*clean(listed(settings, names), settings.max_words), settings)
    return found


@dataclass
class PhrasesJob:
    out: Folder
    settings: VocabularySettings
    class_names: list[str] = field(default_factory=list)
    """Of the model's outputs, in their order, or of the probing data set."""
    answers: Folder | None = None
    """What the language model said, where one is asked."""
    alone: bool = False
    """Take the answers and nothing else: a round of refinement, which may well find nothing new."""


class PhrasesWorker:
    """Cleans all phrases: part 0 is the only one."""

    def __init__(self, job: PhrasesJob) -> None:
        self.job = job

    def run(self, part: int) -> PartReport:
        report, settings, names = PartReport(part), self.job.settings, self.job.class_names
        with report.phase("read"):
            raw = [] if self.job.alone else listed(settings, names)
            if self.job.answers is not None:
                limit = 1 if self.job.alone else settings.llm.max_skipped  # a round of a few answers may lose them
                raw += answer_rows(self.job.answers.read_all("answers"), limit)
        with report.phase("compute"):
            rows, skipped = clean(raw, settings.max_words)
        if not self.job.alone:
            check_number(rows, skipped, settings)
        table = _phrases_table(rows, settings)
        with report.phase("write"):
            self.job.out.write(part, {"phrases": table})
        report.rows, report.skipped = {"phrases": table.num_rows}, dict(skipped)
        return report


def check_number(rows: list[dict], skipped: Counter, settings: VocabularySettings) -> None:
    """Raises ValueError where there are too few concepts to choose from."""
    if len(rows) < 2:
        source = f"vocabulary.source={settings.source}" + (f" vocabulary.path={settings.path}" if settings.path else "")
        reasons = ", ".join(f"{reason}: {n}" for reason, n in skipped.items()) or "nothing"
        raise ValueError(f"{source}: {len(rows)} concepts found, at least 2 are needed (left out: {reasons})")


def _phrases_table(rows: list[dict], settings: VocabularySettings) -> pa.Table:
    model = Path(str(settings.llm.model))
    name = model.name if model.is_dir() else settings.llm.model  # where a folder lies is no business of the table
    columns = {key: [row[key] for row in rows] for key in SCHEMAS["phrases"].names if key != "llm"}
    columns["llm"] = [None if row["prompt_id"] is None else name for row in rows]
    return make_table("phrases", columns)
