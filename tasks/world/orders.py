"""Scenes to order: which show a phrase of the world, and which do not.

In: a phrase. Out: the Wish that scenes showing it are drawn with, and fresh scenes that do show it, judged by what can
be seen. Their streams are named drawn/..., which no world://<seed>/<count> can be: no name was made with their scenes.
"""

from typing import Any

import numpy as np

from tasks.world.concepts import CONCEPTS, FAMILY, absences, synonyms
from tasks.world.scenes import SIZE, Wish, sample
from tasks.world.truth import PHRASES, YES, Album, album, phrases_seen, stream

VERSION = 1
"""Raise it when other scenes are taken for a phrase: another wish, or another judgement of what can be seen."""
TRIES = 4
"""Most draws per wanted scene; "four objects", of which one often finds no place, takes 1.6."""
POOL = 12
"""Random scenes per wanted scene without a phrase; the least common, one that shows a given colour, is one of six."""
FIELDS = {"colour": "colour", "shape": "kind", "object": "kind", "pattern": "pattern", "scene": "background"}
LAYOUT: dict[str, dict[str, Any]] = {
    "large object": {"size": "large"},
    "small object": {"size": "small"},
    "single object": {"count": 1},
    "two objects": {"count": 2},
    "three objects": {"count": 3},
    "four objects": {"count": 4},
    "object at the top left": {"corner": (0, 0)},
    "object at the top right": {"corner": (1, 0)},
    "object at the bottom left": {"corner": (0, 1)},
    "object at the bottom right": {"corner": (1, 1)},
    "overlapping objects": {"relation": "overlapping"},
    "objects side by side": {"relation": "beside"},
    "stacked objects": {"relation": "stacked"},
}
OWN = {phrase: phrase for phrase in PHRASES} | {word: concept for concept in CONCEPTS for word in synonyms(concept)}
"""Phrase or synonym -> the phrase of the world that it means."""


def wish_for(phrase: str) -> Wish:
    """What makes a scene likely to show the phrase. Raises KeyError for a phrase that is none of the world's."""
    if phrase in absences():
        return Wish(without=frozenset(PHRASES[phrase]))
    wish: dict[str, Any] = {}
    for concept in PHRASES[phrase]:  # both of a compound are wished of the first object
        wish |= LAYOUT.get(concept) or {FIELDS[FAMILY[concept]]: concept}
    return Wish(**wish)


def showing(phrase: str, num: int) -> np.ndarray:
    """uint8 [num, SIZE, SIZE, 3]: the first scenes of the phrase's own stream that show it; fewer after TRIES * num."""
    wish, found = wish_for(phrase), []
    for start in range(0, TRIES * num, num):
        drawn = album(sample(f"drawn/{phrase}", number, wish=wish) for number in range(start, start + num))
        found += list(drawn.pixels[phrases_seen(drawn, [phrase])[:, 0] == YES])
        if len(found) >= num:
            break
    return np.array(found[:num], np.uint8).reshape(-1, SIZE, SIZE, 3)


def pool(num: int) -> Album:
    """Random scenes, enough to find `num` among them that do not show a phrase."""
    return stream("drawn/none", 0, POOL * num)
