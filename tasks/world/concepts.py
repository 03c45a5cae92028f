"""The words of the drawn world.

In: nothing. Out: its concepts by family, the phrases that count as the same concept, compounds of a colour or a pattern
with a shape, and the pairs that training never shows. Every other file of the world takes its words from here.
"""

import random

SYNONYMS: dict[str, dict[str, tuple[str, ...]]] = {
    "colour": {
        "red": ("scarlet",),
        "orange": (),
        "yellow": (),
        "green": (),
        "blue": (),
        "purple": ("violet",),
        "pink": (),
        "brown": (),
        "black": (),
        "white": (),
        "grey": ("gray",),
    },
    "shape": {
        "circle": ("disc",),
        "square": (),
        "triangle": (),
        "star": (),
        "heart": (),
        "cross": ("plus sign",),
        "ring": (),
        "diamond": ("rhombus",),
        "arrow": (),
        "crescent": ("crescent moon",),
    },
    "object": {
        "house": (),
        "tree": (),
        "fish": (),
        "boat": ("sailboat",),
        "mushroom": ("toadstool",),
        "flower": ("blossom",),
        "cup": ("mug",),
        "key": (),
    },
    "pattern": {
        "vertical stripes": (),
        "horizontal stripes": (),
        "diagonal stripes": (),
        "polka dots": ("dotted",),
        "checks": ("checkered",),
        "grid": ("grid lines",),
        "zigzag": ("zigzag lines",),
        "waves": ("wavy lines",),
        "bricks": ("brickwork",),
        "speckles": ("speckled",),
    },
    "scene": {
        "meadow": ("grass",),
        "sea": ("water",),
        "desert": ("sand dunes",),
        "snow": ("snowfall",),
        "night sky": ("starry sky",),
        "sunset": ("evening sky",),
        "forest": ("woods",),
        "city": ("skyline",),
    },
    "layout": {
        "large object": ("big object",),
        "small object": ("tiny object",),
        "single object": ("one object",),
        "two objects": ("pair of objects",),
        "three objects": ("trio of objects",),
        "four objects": ("crowded scene",),
        "object at the top left": (),
        "object at the top right": (),
        "object at the bottom left": (),
        "object at the bottom right": (),
        "overlapping objects": ("touching objects",),
        "objects side by side": (),
        "stacked objects": ("one above the other",),
    },
}
"""Family -> concept -> other phrases that mean the same; fixed before any unit was named."""
FAMILY = {concept: family for family, concepts in SYNONYMS.items() for concept in concepts}
CONCEPTS = list(FAMILY)
"""Every single concept; its place here is its number."""
NUMBER = {concept: number for number, concept in enumerate(CONCEPTS)}
COLOURS, PATTERNS, SCENES, LAYOUTS = (list(SYNONYMS[f]) for f in ("colour", "pattern", "scene", "layout"))
KINDS = [*SYNONYMS["shape"], *SYNONYMS["object"]]
"""What an object of a scene can be."""
PLAIN = "plain"
"""What an object without a pattern is called in captions; no concept of its own."""


def compounds() -> dict[str, tuple[str, str]]:
    """Phrase -> its two concepts: every colour and every pattern with every kind."""
    coloured = {f"{colour} {kind}": (colour, kind) for colour in COLOURS for kind in KINDS}
    return coloured | {f"{kind} with {pattern}": (pattern, kind) for pattern in PATTERNS for kind in KINDS}


def absences() -> dict[str, str]:
    """Phrase -> the concept that is missing: of colours only."""
    return {f"nothing {colour}": colour for colour in COLOURS}


def synonyms(concept: str) -> tuple[str, ...]:
    """The concept and all phrases that count as right for it."""
    return (concept, *SYNONYMS[FAMILY[concept]][concept])


def lexicon() -> dict[str, list[str]]:
    """Family -> phrases, the world's word list: every concept, compound and absence once, no synonyms."""
    families = {family: list(concepts) for family, concepts in SYNONYMS.items()}
    return families | {"compound": list(compounds()), "absence": list(absences())}


def lexicon_text() -> str:
    """The word list as a file of the vocabulary stage: a line [family], then its phrases."""
    return "".join(f"[{family}]\n" + "\n".join(phrases) + "\n" for family, phrases in lexicon().items())


def held_out() -> set[tuple[str, str]]:
    """(colour or pattern, kind) pairs that no training scene shows; every kind and every colour is in one of them."""
    coloured = {(COLOURS[(7 * number + 3) % 11], kind) for number, kind in enumerate(KINDS)}
    return coloured | {(PATTERNS[(3 * number + 1) % 10], kind) for number, kind in enumerate(KINDS)}


class Dice(random.Random):
    """Random choices that every Python makes alike: only random() is promised to be the same everywhere."""

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def pick(self, options):
        return options[int(self.random() * len(options))]

    def order(self, options) -> list:
        """A random permutation."""
        return sorted(options, key=lambda _: self.random())
