"""Scenes: what is in them, where, and what is true of them.

In: a seed and a number. Out: a Scene (its objects, its background and its nuisances), the same one everywhere. What is
true of a drawn scene is found in `truth`, because visibility and overlap are matters of pixels.
"""

import math
from dataclasses import dataclass, field

from tasks.world.concepts import COLOURS, KINDS, PATTERNS, PLAIN, SCENES, Dice, held_out

SIZE = 96
"""Pixels of a scene's side."""
RADII = {"small": (12, 14), "medium": (17, 20), "large": (25, 29)}
"""Pixels, half the side of an object's box."""
GRAIN = 10.0
"""Grey levels, the strongest grain of a scene."""
MOST = 4
"""Objects of a scene."""


@dataclass
class Thing:
    """An object of a scene."""

    kind: str
    colour: str
    pattern: str
    size: str
    x: float
    """Pixels, centre."""
    y: float
    radius: float
    turn: float
    """Radians."""
    phase: tuple[int, int] = (0, 0)
    """Where its pattern begins."""
    tint: tuple[int, int, int] = (0, 0, 0)
    """Added to its colour."""


@dataclass
class Scene:
    background: str
    things: list[Thing]
    """Drawn in this order: later ones hide earlier ones."""
    variant: int = 0
    """Which picture of the background, and where it is cut."""
    offset: tuple[int, int] = (0, 0)
    gain: float = 1.0
    """Brightness of the whole scene."""
    grain: float = 0.0
    """Standard deviation of its pixel noise, grey levels. Nothing else depends on it."""


@dataclass
class Wish:
    """What a scene must show: for scenes drawn to order. Empty fields are left to chance."""

    colour: str | None = None
    kind: str | None = None
    pattern: str | None = None
    background: str | None = None
    size: str | None = None
    count: int | None = None
    corner: tuple[int, int] | None = None
    """Column and row, 0 or 1 each, of the corner where an object must stand."""
    relation: str | None = None
    """overlapping, beside or stacked: how the first two objects stand."""
    without: frozenset[str] = field(default_factory=frozenset)
    """Words that no object has."""


def sample(seed: int | str, number: int, unseen: bool = True, wish: Wish | None = None) -> Scene:
    """Scene `number` of the stream `seed`. `unseen` allows the pairs that training never shows."""
    dice, wish = Dice(f"{seed}/{number}"), wish or Wish()
    roll = dice.random()
    count = wish.count or (1 if roll < 0.3 else 2 if roll < 0.6 else 3 if roll < 0.8 else 4)
    if wish.relation:
        count = max(count, 2)
    together = dice.random() < 0.15
    relation = wish.relation or ("overlapping" if together and count > 1 and not wish.corner else None)
    things: list[Thing] = []
    for i in range(count):
        thing = _thing(dice, wish if i == 0 else Wish(without=wish.without), unseen)
        if _place(dice, thing, things, relation if i == 1 else None, wish.corner if i == 0 else None):
            things.append(thing)
    return Scene(
        wish.background or dice.pick([s for s in SCENES if s not in wish.without]),
        things,
        dice.pick(range(16)),
        (dice.pick(range(32)), dice.pick(range(32))),
        dice.between(0.75, 1.05),
        dice.between(0, GRAIN),
    )


def _thing(dice: Dice, wish: Wish, unseen: bool) -> Thing:
    while True:
        kind = wish.kind or dice.pick(KINDS)
        colour = wish.colour or dice.pick(COLOURS)
        pattern = wish.pattern or (PLAIN if dice.random() < 0.3 else dice.pick(PATTERNS))
        size = wish.size or dice.pick(["small", "medium", "medium", "large"])
        refused = {kind, colour, pattern, f"{size} object"} & wish.without
        if not refused and (unseen or not held_out() & {(colour, kind), (pattern, kind)}):
            break
    return Thing(
        kind,
        colour,
        pattern,
        size,
        0,
        0,
        dice.between(*RADII[size]),
        dice.between(-0.17, 0.17),
        (dice.pick(range(24)), dice.pick(range(24))),
        (dice.pick(range(-12, 13)), dice.pick(range(-12, 13)), dice.pick(range(-12, 13))),
    )


def _place(dice: Dice, thing: Thing, others: list[Thing], relation: str | None, corner: tuple[int, int] | None) -> bool:
    """Give the thing a place that is free, or one in the relation to the first; False where none is found."""
    low, high = 0.85 * thing.radius, SIZE - 0.85 * thing.radius
    for _ in range(60):
        if corner:
            ends = [(SIZE - CORNER, high) if far else (low, CORNER) for far in corner]
            thing.x, thing.y = (dice.between(*end) for end in ends)
        else:
            thing.x, thing.y = dice.between(low, high), dice.between(low, high)
        if relation:
            first, reach = others[0], thing.radius + others[0].radius
            way, side = dice.between(-math.pi, math.pi), dice.pick([-1, 1])
            step = {
                "overlapping": (0.6 * reach * math.cos(way), 0.6 * reach * math.sin(way)),
                "beside": (side * 1.05 * reach, dice.between(-0.15, 0.15) * reach),
                "stacked": (dice.between(-0.15, 0.15) * reach, side * 1.05 * reach),
            }[relation]
            thing.x, thing.y = first.x + step[0], first.y + step[1]
            if not (low <= thing.x <= high and low <= thing.y <= high):
                first.x, first.y = (dice.between(0.85 * first.radius, SIZE - 0.85 * first.radius) for _ in "xy")
                continue
            return True
        if all(math.hypot(thing.x - o.x, thing.y - o.y) > 0.95 * (thing.radius + o.radius) for o in others):
            return True
    return False


CORNER = 38
"""Pixels from both edges of a corner within which an object's centre counts as standing there."""
