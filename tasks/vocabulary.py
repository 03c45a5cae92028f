"""Stage vocabulary: the concepts that units are compared with.

In: a word list, the class names of a model or data set, or a language model. Out: the concepts table, one row per
distinct short phrase with its family and where it came from; and the answers table, what a language model said (empty
for word lists).
"""

import io
import json
import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.llm import LEVELS, MAX_LETTERS, answers_table, ask, build_prompts, check_llm, llm_identity
from tasks.store import Folder, PartReport, fingerprint
from tasks.tables import make_table

SOURCES = ("lexicon", "class_names", "vllm")
LEXICON = Path(__file__).parent / "lexicon.txt"
EXPECTED = "text with one concept per line, JSON [concept] or {class: [concept]}, or Parquet with a column concept"
MAX_LENGTH, MAX_RAW = 100, 1000
"""Characters of the longest concept (CLIP's text tower reads 77 tokens), and of the longest phrase looked at."""
BOUNDS = {
    "max_words": (1, 12),
    "max_concepts": (1, 1000),
    "max_tokens": (1, 10**6),
    "temperature": (0, 2),
    "seed": (0, 2**31 - 1),
    "max_skipped": (0, 1),
}

_ASCII = str.maketrans("\u2018\u2019\u201c\u201d\u2010\u2012\u2013\u2014_", "''\"\"---- ")
_QUOTED = re.compile(r"""(["'`])((?:(?!\1).)*)\1""")
_BULLET = re.compile(r"(?:(?:[-*+\u2022]|\d{1,3}[.):]|\(\d{1,3}\))\s+)+")
_ARTICLE = re.compile(r"(?:an?|the|some) (?=\S)")
_MARKUP = re.compile(r"[<>{}\[\]|\\*`]|://|&#?\w+;|^[~.]*/")
_RELATIVE = r"\b(?:that|which|who|whose|where|when)\b"  # 'fur that is striped' is a phrase
_SENTENCE = re.compile(
    r"[a-z]{3}[.!?:;] \w"  # not 'st. bernard'
    r"|^(?:i|it|you|we|they|he|she|this|these|there|here|sure|certainly|sorry) \S+ \S"
    rf"|^(?!.*{_RELATIVE})\S+ (?:.* )?(?:is|are|was|were|has|have|may be|can be|could|should|would) \S"
)


@dataclass
class VocabularySettings:
    source: str = "lexicon"
    """lexicon (a word list), class_names (of the target model or the probing data set) or vllm (a language model)."""
    path: str | None = None
    """Word list of source lexicon, local or any fsspec URI: text with one concept per line ('[family]' lines start a
    family), JSON list, JSON {class: [descriptors]}, or Parquet with a column concept. None is the shipped lexicon."""
    domain: str = "everyday photographs"
    """What the images are, in the words of the prompts."""
    levels: list[str] = field(default_factory=lambda: list(LEVELS))
    """Families that the language model is asked for."""
    per_class: bool = False
    """Also ask the language model about each class, and take the class names themselves."""
    max_words: int = 6
    """Words of the longest concept that is taken from a language model."""
    max_concepts: int = 60
    """Concepts per prompt."""
    model: str | None = None
    """Language model: a folder or a Hugging Face name."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vllm.LLM: max_model_len, tensor_parallel_size, revision, dtype, ..."""
    max_tokens: int = 1024
    """Tokens per answer."""
    temperature: float = 0.7
    seed: int = 0
    max_skipped: float = 0.1
    """Share of malformed answers above which the run fails."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"vocabulary.source={self.source}: allowed are {', '.join(SOURCES)}")
        if self.path is not None and (self.source != "lexicon" or not self.path.strip()):
            raise ValueError(f"vocabulary.path={self.path}: allowed is a file, with vocabulary.source=lexicon only")
        unknown = [level for level in self.levels if level not in LEVELS]
        if unknown or len(set(self.levels)) < len(self.levels):
            raise ValueError(f"vocabulary.levels={list(self.levels)}: allowed are, once each, {', '.join(LEVELS)}")
        for key, (low, high) in BOUNDS.items():
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"vocabulary.{key}={getattr(self, key)}: allowed are {low} to {high}")
        if self.source == "vllm":
            check_llm(self)

    @property
    def uses_class_names(self) -> bool:
        return self.source == "class_names" or (self.source == "vllm" and self.per_class)


class Raw(NamedTuple):
    """A phrase as it was found."""

    concept: str
    family: str | None = None
    sources: tuple[str, ...] = ()
    prompt_id: str | None = None
    """Set for the words of a language model, which are held to stricter rules."""
    is_class: bool = False
    """Class names are kept whatever they look like: evaluation needs the concept of each output."""


def read_concepts(path: str | None) -> list[Raw]:
    """Rows of a word list as they stand, empty and duplicate ones included; None is the shipped lexicon."""
    path = str(LEXICON) if path is None else path
    name = path.rstrip("/").rsplit("/", 1)[-1]
    try:
        fs, inner = fsspec.core.url_to_fs(path)
        data = fs.cat_file(inner)
        if name.endswith(".parquet"):
            return _parquet_rows(data, name)
        text = data.decode("utf-8-sig")
        return _json_rows(json.loads(text), name) if name.endswith(".json") else _text_rows(text, name)
    except (OSError, ImportError, ValueError, RecursionError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"vocabulary.path={path}: {reason}; expected {EXPECTED}") from None


def _text_rows(text: str, name: str) -> list[Raw]:
    rows, family = [], None
    for line in io.StringIO(text, newline=None):
        if section := re.fullmatch(r"\[([a-z]+)\]", line.strip()):
            family = section[1]
        else:
            rows.append(Raw(line.rstrip("\n"), family, (name,)))
    return rows


def _json_rows(found: Any, name: str) -> list[Raw]:
    groups = found if isinstance(found, dict) else {name: found}
    groups = {source: [value] if isinstance(value, str) else value for source, value in groups.items()}
    if not all(isinstance(value, list) and all(isinstance(c, str) for c in value) for value in groups.values()):
        raise ValueError("not all concepts are strings")
    return [Raw(concept, None, (source,)) for source, concepts in groups.items() for concept in concepts]


def _parquet_rows(data: bytes, name: str) -> list[Raw]:
    file = pq.ParquetFile(io.BytesIO(data))
    if "concept" not in file.schema_arrow.names:
        raise ValueError(f"its columns are {', '.join(file.schema_arrow.names)}")
    table = file.read([c for c in ("concept", "family") if c in file.schema_arrow.names])
    table = table.cast(pa.schema([(c, pa.string()) for c in table.column_names]))
    return [Raw(row["concept"] or "", row.get("family"), (name,)) for row in table.to_pylist()]


def class_rows(class_names: Iterable[str]) -> list[Raw]:
    return [Raw(class_concept(name), None, (name,), is_class=True) for name in class_names]


def class_concept(name: str) -> str:
    """The concept of a class: the first synonym of 'tench, Tinca tinca', in a form that clean() keeps."""
    plain = _tidy("".join(c if c.isprintable() else " " for c in name[:MAX_RAW]))
    first = next((part for part in plain.split(", ") if any(map(str.isalnum, part))), "")
    return _tidy(textwrap.shorten(first, MAX_LENGTH, placeholder="") or first[:MAX_LENGTH])


def clean(raw: Iterable[Raw], max_words: int) -> tuple[list[dict], Counter]:
    """Rows of the concepts table (without llm, parent and round) in first-seen order, and what was left out by reason.

    max_words holds for the words of a language model alone: who writes a list knows what is in it.
    """
    rows: dict[str, dict] = {}
    skipped: Counter = Counter()
    for found in raw:
        concept = _tidy(found.concept) if len(found.concept) <= MAX_RAW else found.concept
        if reason := _refusal(concept, found, max_words):
            skipped[reason] += 1
            continue
        skipped["duplicate"] += concept in rows
        row = rows.setdefault(concept, {"family": None, "sources": [], "prompt_id": None})
        row["family"] = row["family"] or _tidy(found.family or "") or None
        row["prompt_id"] = row["prompt_id"] or found.prompt_id
        row["sources"] += [source.encode(errors="replace").decode() for source in found.sources]  # no lone surrogates
    return [
        {
            "concept_id": fingerprint({"concept": concept}),
            "concept": concept,
            "family": row["family"] or family_of(concept),
            "sources": list(dict.fromkeys(row["sources"])),
            "prompt_id": row["prompt_id"],
        }
        for concept, row in rows.items()
    ], +skipped


def _tidy(text: str) -> str:
    """Lower case, plain quotes and spaces, no bullet, article, quotation marks or closing punctuation."""
    before = None
    while before != text:  # a bullet hides an article, which hides a quotation mark
        before = text
        text = unicodedata.normalize("NFKC", text).translate(_ASCII).lower()
        text = " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())
        for prefix in (_BULLET, _ARTICLE):
            text = text[found.end() :] if (found := prefix.match(text)) else text
        text = found[2] if (found := _QUOTED.fullmatch(text)) else text
        text = text.lstrip(" ,;:").rstrip(" .,;:!?")
    return text


def _refusal(concept: str, found: Raw, max_words: int) -> str | None:
    """Why a tidy phrase is no concept; None where it is one."""
    if not any(c.isalnum() for c in concept):
        return "empty"
    if len(concept) > MAX_LENGTH or (found.prompt_id is not None and len(found.concept) >= MAX_LETTERS):
        return "too long"
    if not concept.isprintable():
        return "control characters"
    if found.is_class:
        return None
    if _MARKUP.search(concept):
        return "markup or path"
    if _SENTENCE.search(concept):
        return "sentence"
    return "too many words" if found.prompt_id is not None and len(concept.split()) > max_words else None


@cache
def _families() -> dict[str, str]:
    rows = read_concepts(None)[::-1]  # the first of two sections wins
    return {_tidy(row.concept): row.family for row in rows if row.family}


def family_of(concept: str) -> str:
    """Family by the shipped lexicon: of the phrase, else of its last word, which an English phrase is a kind of."""
    families = _families()
    return families.get(concept) or families.get(concept.split()[-1]) or "other"


def identity(settings: VocabularySettings, class_names: Iterable[str] = ()) -> dict:
    """What the stage's fingerprint must contain beyond the settings: the content of what they name."""
    found, names = {"lexicon": fingerprint({"rows": read_concepts(None)})}, list(class_names)
    if settings.path is not None:
        found["file"] = fingerprint({"rows": read_concepts(settings.path)})
    if settings.uses_class_names:
        found["class_names"] = fingerprint({"names": names})
    if settings.source == "vllm":
        prompts = build_prompts(settings, [*names, "any"])  # one at least, for the template
        found["prompts"] = fingerprint({"ids": [p.prompt_id for p in prompts]})
        found |= llm_identity(str(settings.model))
    return found


@dataclass
class VocabularyJob:
    out: Folder
    """Of the tables concepts, answers."""
    settings: VocabularySettings
    class_names: list[str] = field(default_factory=list)
    """Of the model's outputs, in their order, or of the probing data set."""


class VocabularyWorker:
    """Makes the whole vocabulary: part 0 is the only one."""

    def __init__(self, job: VocabularyJob) -> None:
        self.job = job

    def run(self, part: int) -> PartReport:
        report, settings, names = PartReport(part), self.job.settings, self.job.class_names
        with report.phase("read"):
            raw = read_concepts(settings.path) if settings.source == "lexicon" else []
            raw += class_rows(names) if settings.uses_class_names else []
        with report.phase("compute"):
            answers = ask(settings, names) if settings.source == "vllm" else []
            raw += [Raw(c, a.prompt.family, a.prompt.sources, a.prompt.prompt_id) for a in answers for c in a.concepts]
            rows, skipped = clean(raw, settings.max_words)
        _check_number(rows, skipped, settings)
        tables = {"concepts": _concepts_table(rows, settings), "answers": answers_table(answers)}
        with report.phase("write"):
            self.job.out.write(part, tables)
        report.rows = {name: table.num_rows for name, table in tables.items()}
        report.skipped = dict(skipped + Counter(f"{a.status} answer" for a in answers if a.status != "ok"))
        return report


def _check_number(rows: list[dict], skipped: Counter, settings: VocabularySettings) -> None:
    if len(rows) < 2:
        source = f"vocabulary.source={settings.source}" + (f" vocabulary.path={settings.path}" if settings.path else "")
        reasons = ", ".join(f"{reason}: {n}" for reason, n in skipped.items()) or "nothing"
        raise ValueError(f"{source}: {len(rows)} concepts found, at least 2 are needed (left out: {reasons})")


def _concepts_table(rows: list[dict], settings: VocabularySettings) -> pa.Table:
    model = Path(str(settings.model))
    name = model.name if model.is_dir() else settings.model  # where a folder lies is no business of the table
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    columns["llm"] = [None if row["prompt_id"] is None else name for row in rows]
    return make_table("concepts", columns | {"parent": [None] * len(rows), "round": [0] * len(rows)})
