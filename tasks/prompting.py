"""Prompts: what a language model is asked.

In: the settings of the vocabulary and the subjects (class names, or the best concepts of a cluster of units). Out:
prompts from the text files in prompts/, each with an id that changes with its text. What all prompts of a file share
comes first in it, so that an engine with a prefix cache reads it once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Template

from tasks.store import fingerprint

PROMPTS = Path(__file__).parent / "prompts"
LEVELS = {
    "any": "anything that is often seen there, of whatever kind",
    "colour": "colours and shades, such as sky blue or rust orange",
    "texture": "surface textures, such as furry, wrinkled or rusty",
    "pattern": "patterns of repeated elements, such as vertical stripes, polka dots or brickwork",
    "shape": "shapes, edges, lines and layouts, such as circle, curved edge or tall thin object",
    "material": "materials and substances, such as polished wood, knitted wool or water",
    "part": "parts of objects, of animals and of people, such as dog snout, car wheel or human hand",
    "object": "objects, tools, vehicles, clothes and food, such as teapot, bicycle or pizza",
    "animal": "animals, both groups and kinds, such as bird, terrier or jellyfish",
    "plant": "plants, fruits and fungi, such as palm tree, moss or mushroom",
    "scene": "places, surroundings and weather, such as beach, kitchen or snowy forest",
    "action": "actions and poses, such as jumping, eating or sitting in a row",
    "abstract": "visual qualities and impressions, such as symmetry, motion blur, crowdedness or backlight",
}
"""What to ask for, each with what the prompt says about it: families, and `any` for the domain as a whole."""
ASPECTS = {
    "features": "its visible features: colours, textures, patterns, shapes and materials",
    "parts": "its parts, and what it is made or put together of",
    "kinds": "what kind of thing it is, from narrow to broad",
    "around": "what it does, and what is often seen beside, under or around it",
}
"""What to ask about each class."""
MAX_SUBJECT = 200
"""Characters of a class name in a prompt: one endless label must not break the whole batch."""


@dataclass(frozen=True)
class Prompt:
    prompt_id: str
    """Template and hash of the text: it changes with the template, the subject and every setting in the text."""
    text: str
    family: str | None
    sources: tuple[str, ...]
    """What a concept from the answer is said to come from: the subject, else the prompt itself."""


@dataclass
class Wording:
    """What a prompt says beside its subject."""

    domain: str
    """What the images are."""
    max_words: int
    max_concepts: int


def level_prompts(wording: Wording, levels: Iterable[str]) -> list[Prompt]:
    prompts = []
    for level in levels:
        prompt_id, text = _fill("level", wording, {"meaning": LEVELS[level]})
        prompts.append(Prompt(prompt_id, text, None if level == "any" else level, (prompt_id,)))
    return prompts


def class_prompts(wording: Wording, aspects: Iterable[str], class_names: Iterable[str]) -> list[Prompt]:
    """One per aspect and distinct class name, those of one aspect together: they begin alike."""
    names, prompts = list(dict.fromkeys(class_names)), {}
    for aspect in aspects:
        for name in names:
            prompt_id, text = _fill("class", wording, {"meaning": ASPECTS[aspect], "subject": _subject(name)})
            prompts.setdefault(prompt_id, Prompt(prompt_id, text, None, (name,)))
    return list(prompts.values())


def cluster_prompts(wording: Wording, clusters: Iterable[Iterable[str]]) -> list[Prompt]:
    """One per cluster of units that are badly explained, from the phrases that fit it best, the best one first."""
    prompts = []
    for phrases in clusters:
        prompt_id, text = _fill("cluster", wording, {"subject": "; ".join(map(_subject, phrases))})
        prompts.append(Prompt(prompt_id, text, None, (prompt_id,)))
    return prompts


def _subject(name: str) -> str:
    """One line: a name with line breaks would read as further instructions."""
    return " ".join(name.split())[:MAX_SUBJECT]


def _fill(template: str, wording: Wording, values: dict[str, str]) -> tuple[str, str]:
    text = Template((PROMPTS / f"{template}.txt").read_text()).substitute(values | vars(wording)).strip()
    text = text.encode(errors="replace").decode()  # no lone surrogates: neither tokenizers nor Parquet take them
    return f"{template}-{fingerprint({'text': text})}", text
