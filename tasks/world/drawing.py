"""Drawing scenes.

In: a Scene. Out: its pixels and, for each pixel, which object is seen there. Shapes are filled by Pillow at SCALE times
the size and averaged, so edges are smooth; everything random comes from the scene, so it is drawn alike everywhere.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from tasks.world.concepts import PLAIN, SCENES, Dice
from tasks.world.scenes import MOST, SIZE, Scene, Thing

SCALE = 3
RGB = {
    "red": (212, 35, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 222, 45),
    "green": (45, 165, 60),
    "blue": (35, 85, 220),
    "purple": (135, 55, 185),
    "pink": (250, 150, 195),
    "brown": (120, 72, 38),
    "black": (26, 26, 30),
    "white": (246, 246, 242),
    "grey": (138, 138, 140),
}
DARK = ("blue", "purple", "brown", "black")
"""Their patterns are drawn in a lighter tone, those of the others in a darker one."""
RIM = (24, 24, 28)
"""Colour of the line around every object."""
LINE = 4
"""Its width, in pixels at SCALE."""
TILE = 252
"""Side of a pattern at SCALE: the largest object's window, wherever the pattern begins."""
INK = 0.5
"""How far the tone of a pattern lies from the colour, towards white or black."""


@dataclass
class Drawn:
    pixels: np.ndarray
    """uint8 [SIZE, SIZE, 3]"""
    owner: np.ndarray
    """uint8 [SIZE, SIZE]: 0 the background, i + 1 where object i is seen."""
    area: np.ndarray
    """int32 [MOST]: pixels of each object, hidden ones included."""
    overlap: np.ndarray
    """bool [MOST, MOST]: objects whose pixels meet."""


def draw(scene: Scene) -> Drawn:
    pixels = _background(scene)
    owner, area = np.zeros((SIZE, SIZE), np.uint8), np.zeros(MOST, np.int32)
    masks = np.zeros((MOST, SIZE, SIZE), bool)
    for i, thing in enumerate(scene.things):
        window, body, ink, rim = _stencils(thing)
        base = np.array(RGB[thing.colour], np.float32) + thing.tint
        tone = base + INK * ((255 if thing.colour in DARK else 0) - base)
        here = pixels[window]
        here += rim[..., None] * (np.array(RIM, np.float32) - here)
        here += (body - ink)[..., None] * (base - here) + ink[..., None] * (tone - here)
        seen = body > 0.5
        masks[i][window] = seen
        owner[window][seen] = i + 1
        area[i] = seen.sum()
    pixels *= scene.gain
    pixels += scene.grain * _grain()[scene.offset[0] : scene.offset[0] + SIZE, scene.offset[1] : scene.offset[1] + SIZE]
    flat = masks.reshape(MOST, -1).astype(np.float32)
    overlap = (flat @ flat.T > 12) & ~np.eye(MOST, dtype=bool)
    return Drawn(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), owner, area, overlap)


# --- objects: outlines in a box from -1 to 1, y downwards; (kind of figure, points or circle, ink 1 or 0)


def _polygon(sides: int, first: float = -math.pi / 2, radius: float = 1.0) -> list[tuple[float, float]]:
    angles = [first + 2 * math.pi * i / sides for i in range(sides)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _star() -> list[tuple[float, float]]:
    outer, inner = _polygon(5), _polygon(5, -math.pi / 2 + math.pi / 5, 0.42)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 48 for i in range(48)]
    curve = [
        (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        for t in turns
    ]
    return [(x / 16.5, -(y + 2.5) / 15.5) for x, y in curve]


def _disc(x: float, y: float, rx: float, ry: float | None = None, ink: int = 1):
    ry = rx if ry is None else ry
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in (2 * math.pi * i / 40 for i in range(40))], ink


def _box(x0: float, y0: float, x1: float, y1: float, ink: int = 1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)], ink


def _half(x: float, y: float, rx: float, ry: float):
    """The upper half of an ellipse."""
    return [(x + rx * math.cos(a), y - ry * math.sin(a)) for a in (math.pi * i / 24 for i in range(25))], 1


FIGURES = {
    "circle": [_disc(0, 0, 0.97)],
    "square": [_box(-0.84, -0.84, 0.84, 0.84)],
    "triangle": [([(0, -0.95), (1, 0.85), (-1, 0.85)], 1)],
    "star": [(_star(), 1)],
    "heart": [(_heart(), 1)],
    "cross": [_box(-0.33, -0.97, 0.33, 0.97), _box(-0.97, -0.33, 0.97, 0.33)],
    "ring": [_disc(0, 0, 0.97), _disc(0, 0, 0.5, ink=0)],
    "diamond": [([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)], 1)],
    "arrow": [([(0, -1), (0.85, -0.1), (0.32, -0.1), (0.32, 1), (-0.32, 1), (-0.32, -0.1), (-0.85, -0.1)], 1)],
    "crescent": [_disc(0, 0, 0.97), _disc(0.5, -0.12, 0.78, ink=0)],
    "house": [
        _box(-0.72, -0.15, 0.72, 0.97),
        ([(0, -0.98), (1, -0.1), (-1, -0.1)], 1),
        _box(-0.2, 0.4, 0.2, 0.97, ink=0),
        _box(0.34, 0.1, 0.58, 0.34, ink=0),
    ],
    "tree": [
        _box(-0.14, 0.3, 0.14, 1),
        ([(0, -1), (0.55, -0.3), (-0.55, -0.3)], 1),
        ([(0, -0.65), (0.7, 0.1), (-0.7, 0.1)], 1),
        ([(0, -0.25), (0.85, 0.55), (-0.85, 0.55)], 1),
    ],
    "fish": [_disc(-0.2, 0, 0.75, 0.52), ([(0.35, 0), (1, -0.55), (1, 0.55)], 1), _disc(-0.58, -0.12, 0.1, ink=0)],
    "boat": [
        ([(-1, 0.42), (1, 0.42), (0.6, 0.95), (-0.6, 0.95)], 1),
        ([(0.05, -1), (0.05, 0.25), (0.85, 0.25)], 1),
        ([(-0.1, -0.7), (-0.1, 0.25), (-0.72, 0.25)], 1),
        _box(-0.08, -1, 0.03, 0.5),
    ],
    "mushroom": [_half(0, 0.12, 0.98, 1.02), ([(-0.28, 0.1), (0.28, 0.1), (0.38, 0.97), (-0.38, 0.97)], 1)],
    "flower": [*[_disc(0.6 * x, 0.6 * y, 0.37) for x, y in _polygon(5)], _disc(0, 0, 0.42), _disc(0, 0, 0.2, ink=0)],
    "cup": [
        _disc(0.62, 0, 0.36, 0.42),
        _disc(0.62, 0, 0.17, 0.22, ink=0),
        ([(-0.85, -0.75), (0.6, -0.75), (0.42, 0.85), (-0.67, 0.85)], 1),
    ],
    "key": [
        _disc(-0.52, 0, 0.46),
        _disc(-0.52, 0, 0.2, ink=0),
        _box(-0.12, -0.14, 1, 0.14),
        _box(0.42, 0.1, 0.6, 0.5),
        _box(0.82, 0.1, 1, 0.6),
    ],
}


def _stencils(thing: Thing) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray]:
    """Window of the scene, and float32 coverage there: by the body, by its pattern, and with the line around."""
    reach = math.ceil(thing.radius * 1.15) + 3
    left, top = math.floor(thing.x) - reach, math.floor(thing.y) - reach
    side = 2 * reach + 1
    image = Image.new("L", (side * SCALE, side * SCALE))
    pen, cos, sin = ImageDraw.Draw(image), math.cos(thing.turn), math.sin(thing.turn)
    cx, cy, r = (thing.x - left) * SCALE, (thing.y - top) * SCALE, thing.radius * SCALE
    for points, ink in FIGURES[thing.kind]:
        pen.polygon(
            [(round(cx + r * (x * cos - y * sin)), round(cy + r * (x * sin + y * cos))) for x, y in points],
            fill=255 * ink,
        )
    body = np.asarray(image.reduce(SCALE), np.float32) / 255
    if thing.pattern == PLAIN:
        ink = np.zeros_like(body)
    else:
        row, column = thing.phase
        tile = _pattern(thing.pattern, thing.size)[row : row + side * SCALE, column : column + side * SCALE]
        ink = np.asarray(Image.fromarray(np.where(np.asarray(image) > 0, tile, 0)).reduce(SCALE), np.float32) / 255
    wide, side3, near = np.pad(np.asarray(image), LINE), side * SCALE, round(0.7 * LINE)
    steps = [(0, LINE), (LINE, 0), (0, -LINE), (-LINE, 0), (near, near), (near, -near), (-near, near), (-near, -near)]
    shifted = [wide[LINE + y : LINE + y + side3, LINE + x : LINE + x + side3] for y, x in steps]
    rim = np.asarray(Image.fromarray(np.maximum.reduce(shifted)).reduce(SCALE), np.float32) / 255
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + side, SIZE), min(left + side, SIZE)
    inside = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
    return (slice(y0, y1), slice(x0, x1)), body[inside], ink[inside], rim[inside]


@cache
def _pattern(name: str, size: str) -> np.ndarray:
    """uint8 [TILE, TILE] of 0 and 255 at SCALE times the scene's resolution; the period goes with the object's size."""
    period = {"small": 18, "medium": 21, "large": 27}[size]
    half, thin = period // 2, max(period // 4, 4)
    v, u = np.indices((TILE, TILE))
    zig = np.abs((u % (2 * half)) - half)
    rows = v // half
    if name == "speckles":
        dice, found = Dice("speckles"), np.zeros((TILE, TILE), bool)
        for _ in range(TILE * TILE // (3 * half * half) * 2):
            x, y, r = dice.between(0, TILE), dice.between(0, TILE), dice.between(2, 4.5)
            found |= (u - x) ** 2 + (v - y) ** 2 < r * r
    else:
        found = {
            "vertical stripes": u % period < half,
            "horizontal stripes": v % period < half,
            "diagonal stripes": (u + v) % (period + 3) < (period + 3) // 2,
            "polka dots": (u % period - half) ** 2 + (v % period - half) ** 2 < (0.34 * period) ** 2,
            "checks": (u // half + v // half) % 2 == 0,
            "grid": (u % period < thin) | (v % period < thin),
            "zigzag": (v + zig) % period < half,
            "waves": (v + np.rint(0.28 * period * _sine()[(u * 64 // (2 * period)) % 64]).astype(int)) % period < half,
            "bricks": (v % half < 3) | ((u + (rows % 2) * half) % period < 3),
        }[name]
    return np.where(found, 255, 0).astype(np.uint8)


def _sine() -> np.ndarray:
    return np.array([math.sin(2 * math.pi * i / 64) for i in range(64)])


# --- backgrounds


def _background(scene: Scene) -> np.ndarray:
    y, x = scene.offset
    return _backdrop(scene.background, scene.variant)[y : y + SIZE, x : x + SIZE].astype(np.float32)


@cache
def _backdrop(name: str, variant: int) -> np.ndarray:
    """uint8 [128, 128, 3]"""
    side = 128 * 2
    dice = Dice(f"{name}/{variant}")
    sky, ground = SKIES[name]
    steps = np.linspace(0, 1, side)[:, None, None]
    fade = np.array(sky) * (1 - steps) + np.array(ground) * steps + [dice.pick(range(-14, 15)) for _ in range(3)]
    image = Image.fromarray(np.clip(np.broadcast_to(fade, (side, side, 3)), 0, 255).astype(np.uint8))
    MARKS[name](ImageDraw.Draw(image), dice, side)
    return np.asarray(image.reduce(2))


SKIES = {
    "meadow": ((168, 205, 140), (140, 190, 110)),
    "sea": ((150, 200, 215), (110, 170, 200)),
    "desert": ((228, 205, 160), (215, 185, 135)),
    "snow": ((204, 212, 222), (190, 202, 216)),
    "night sky": ((48, 52, 84), (66, 70, 104)),
    "sunset": ((150, 110, 160), (240, 180, 130)),
    "forest": ((104, 132, 104), (84, 108, 84)),
    "city": ((190, 196, 206), (172, 176, 186)),
}


def _scatter(dice: Dice, side: int, gap: int):
    """Jittered grid: marks everywhere, no two far apart, so that every part of a scene shows its background."""
    for y in range(0, side, gap):
        for x in range(0, side, gap):
            yield x + dice.between(0, gap), y + dice.between(0, gap)


def _meadow(pen, dice, side):
    for x, y in _scatter(dice, side, 11):
        pen.line(
            [(x, y), (x + dice.between(-4, 4), y - dice.between(6, 13))],
            fill=dice.pick([(88, 150, 70), (112, 172, 84)]),
            width=2,
        )


def _sea(pen, dice, side):
    for x, y in _scatter(dice, side, 18):
        w = dice.between(9, 16)
        pen.arc([(x - w, y - 5), (x, y + 5)], 180, 360, fill=(225, 240, 245), width=2)
        pen.arc([(x, y - 5), (x + w, y + 5)], 180, 360, fill=(80, 140, 175), width=2)


def _desert(pen, dice, side):
    y = -20.0
    while y < side + 20:
        points = [(x, y + 9 * math.sin(x / dice.between(24, 26) + y)) for x in range(-4, side + 8, 8)]
        pen.line(points, fill=(196, 160, 108), width=3)
        y += dice.between(15, 26)
    for x, y in _scatter(dice, side, 12):
        pen.point((x, y), fill=(190, 150, 100))


def _snow(pen, dice, side):
    for x, y in _scatter(dice, side, 15):
        r = dice.between(2, 4.5)
        pen.ellipse([(x - r, y - r), (x + r, y + r)], fill=(232, 238, 244))
        pen.point((x + 4, y + 5), fill=(170, 185, 205))


def _night(pen, dice, side):
    for x, y in _scatter(dice, side, 20):
        r = dice.pick([1, 1, 2, 3])
        pen.line([(x - r, y), (x + r, y)], fill=(240, 236, 190), width=1)
        pen.line([(x, y - r), (x, y + r)], fill=(240, 236, 190), width=1)


def _sunset(pen, dice, side):
    for _, y in _scatter(dice, side, 30):
        x, w = dice.between(0, side), dice.between(14, 40)
        pen.ellipse(
            [(x - w, y - 3), (x + w, y + 3)], fill=dice.pick([(250, 205, 150), (205, 125, 150), (235, 150, 120)])
        )


def _forest(pen, dice, side):
    x = -4.0
    while x < side:
        w = dice.between(4, 9)
        pen.rectangle([(x, 0), (x + w, side)], fill=dice.pick([(78, 66, 50), (62, 84, 60), (92, 78, 60)]))
        x += w + dice.between(9, 18)
    for x, y in _scatter(dice, side, 17):
        pen.ellipse([(x - 4, y - 3), (x + 4, y + 3)], fill=dice.pick([(58, 104, 62), (118, 148, 104)]))


def _city(pen, dice, side):
    x = -6.0
    while x < side:
        w, top = dice.between(18, 34), dice.between(-40, side * 0.3)
        shade = dice.pick([132, 148, 160])
        pen.rectangle([(x, top), (x + w, side)], fill=(shade, shade + 4, shade + 14))
        for wy in range(int(top) + 5, side, 11):
            for wx in range(int(x) + 4, int(x + w) - 4, 8):
                pen.rectangle([(wx, wy), (wx + 3, wy + 5)], fill=dice.pick([(232, 222, 170), (100, 106, 122)]))
        x += w + 3


MARKS = dict(zip(SCENES, (_meadow, _sea, _desert, _snow, _night, _sunset, _forest, _city), strict=True))


@cache
def _grain() -> np.ndarray:
    """float32 [128, 128, 3] of mean 0 and deviation 1: sums of whole numbers, which every platform makes alike."""
    dice = np.random.RandomState(0)  # its stream is frozen, unlike that of newer generators
    total = dice.randint(-127, 128, (4, 128, 128, 3)).sum(0)
    return (total / (2 * 73.6)).astype(np.float32)
