"""Cleaning: which phrases are concepts, and what of them is the same.

In: phrases as a list, a class name or a language model gave them. Out: distinct tidy phrases with their family and all
their sources, and how many were left out for what reason.
"""

import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache

from tasks.llm import MAX_LETTERS
from tasks.store import fingerprint
from tasks.words import Raw, read_concepts

MAX_LENGTH, MAX_RAW = 100, 1000
"""Characters of the longest concept (CLIP's text tower reads 77 tokens), and of the longest phrase looked at."""

_ASCII = str.maketrans("\u2018\u2019\u201c\u201d\u2010\u2012\u2013\u2014_", "''\"\"---- ")
_QUOTED = re.compile(r"""(["'`])((?:(?!\1).)*)\1""")
_BULLET = re.compile(r"(?:(?:[-*+\u2022]|\d{1,3}[.):]|\(\d{1,3}\))\s+)+")
_ARTICLE = re.compile(r"(?:an?|the|some) (?=\S)")
_MARKUP = re.compile(r"[<>{}\[\]|\\*`]|://|&#?\w+;|^[~.]*/")
_UNSEEN = re.compile(
    r"\b(?:smell\w*|odou?rs?|scents?|fragran\w+|aromas?|flavou?r\w*|tast(?:e|es|y|ing)|sounds? of|loud"
    r"|used (?:to|for|in|as|by)|known (?:for|as)|native to|found in|popular|famous|(?:in)?expensive|lifespan"
    r"|temperament|loyal|intelligen\w+|endangered|edible|nocturnal|importance|reputation|opinion|knowledge)\b"
)
_RELATIVE = r"\b(?:that|which|who|whose|where|when)\b"  # 'fur that is striped' is a phrase
_SENTENCE = re.compile(
    r"[a-z]{3}[.!?:;] \w"  # not 'st. bernard'
    r"|^(?:i|it|you|we|they|he|she|this|these|there|here|sure|certainly|sorry) \S+ \S"
    rf"|^(?!.*{_RELATIVE})\S+ (?:.* )?(?:is|are|was|were|has|have|may be|can be|could|should|would) \S"
)


_PREPOSITION = re.compile(r" (?:of|with|without|in|on|at|for|from|under|over|near|beside|behind|by|and|that|which) ")
_MEASURE = re.compile(r"(?:group|row|pair|piece|bunch|pile|stack|set|kind|type|slice|lot)s? of ")
_IRREGULAR = {"men": "man", "women": "woman", "children": "child", "feet": "foot", "teeth": "tooth", "mice": "mouse"}
_IRREGULAR |= {"geese": "goose", "leaves": "leaf", "wolves": "wolf", "knives": "knife", "shelves": "shelf"}
_OTHER_THINGS = {
    "glasses",
    "woods",
    "pants",
    "shorts",
    "clothes",
    "goods",
    "greens",
    "news",
    "arms",
    "scales",
    "trunks",
}
"""What looks like the plural of something else."""


def class_rows(class_names: Iterable[str]) -> list[Raw]:
    return [Raw(class_concept(name), None, (name,), is_class=True) for name in class_names]


def class_concept(name: str) -> str:
    """The concept of a class: the first synonym of 'tench, Tinca tinca', in a form that clean() keeps."""
    plain = _tidy("".join(c if c.isprintable() else " " for c in name[:MAX_RAW]))
    first = next((part for part in plain.split(", ") if any(map(str.isalnum, part))), "")
    return _tidy(textwrap.shorten(first, MAX_LENGTH, placeholder="") or first[:MAX_LENGTH])


def clean(raw: Iterable[Raw], max_words: int) -> tuple[list[dict], Counter]:
    """Rows of the phrases table (without llm) in first-seen order, and what was left out by reason.

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
        row = rows.setdefault(concept, {"family": None, "sources": [], "prompt_id": None, "is_class": False})
        row["family"] = row["family"] or _tidy(found.family or "") or None
        row["prompt_id"] = row["prompt_id"] or found.prompt_id
        row["is_class"] |= found.is_class
        row["sources"] += [source.encode(errors="replace").decode() for source in found.sources]  # no lone surrogates
    for concept in sorted((c for c, row in rows.items() if not row["is_class"]), key=len, reverse=True):
        if one := next((c for c in _singulars(concept) if c in rows), None):
            rows[one]["sources"] += rows.pop(concept)["sources"]
            skipped["plural"] += 1
    return [
        {
            "concept_id": fingerprint({"concept": concept}),
            "concept": concept,
            "family": row["family"] or family_of(concept),
            "sources": list(dict.fromkeys(row["sources"])),
            "prompt_id": row["prompt_id"],
            "is_class": row["is_class"],
        }
        for concept, row in rows.items()
    ], +skipped


def _singulars(concept: str) -> list[str]:
    """What the phrase would be if it were a plural; not all of it is English."""
    start, _, last = concept.rpartition(" ")
    if last in _OTHER_THINGS or (last not in _IRREGULAR and not re.search(r"[^s]s$", last)):
        return []
    ones = [last[:-1], re.sub("es$", "", last), re.sub("ies$", "y", last)]
    return [f"{start} {one}".strip() for one in ([_IRREGULAR[last]] if last in _IRREGULAR else ones) if one != last]


def head(concept: str) -> str:
    """The phrase without what follows its main noun: 'brown dog with a hat' is a brown dog, 'row of houses' houses."""
    return _PREPOSITION.split(concept[found.end() :] if (found := _MEASURE.match(concept)) else concept, maxsplit=1)[0]


def broader(concept: str) -> list[str]:
    """Phrases that the concept is a kind of by its words alone, the nearest first."""
    words = head(concept).split()
    found = [" ".join(words[start:]) for start in range(len(words))]
    return [phrase for phrase in found if phrase != concept]


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
    if _UNSEEN.search(concept):
        return "not visible"
    return "too many words" if found.prompt_id is not None and len(concept.split()) > max_words else None


@cache
def _families() -> dict[str, str]:
    rows = read_concepts(None)[::-1]  # the first of two sections wins
    return {_tidy(row.concept): row.family for row in rows if row.family}


def family_of(concept: str) -> str:
    """Family by the shipped lexicon: of the phrase, else of what it is a kind of."""
    families, kinds = _families(), [concept, *broader(concept)]
    known = (families.get(c) for kind in kinds for c in (kind, *_singulars(kind)))
    return next(filter(None, known), "other")
