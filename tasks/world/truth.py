"""What is true of drawn scenes and of crops of them.

In: scenes, or an Album of drawn ones and boxes. Out: which concepts, compounds and absences can be seen (1 yes, 0 no,
-1 hard to say), masks, and captions in plain English.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tasks.world.concepts import CONCEPTS, KINDS, LAYOUTS, NUMBER, PLAIN, SCENES, absences, compounds
from tasks.world.drawing import draw
from tasks.world.scenes import CORNER, MOST, SIZE, Scene, sample

YES, NO, UNSURE = 1, 0, -1
_OF_KIND = np.array([c in KINDS for c in CONCEPTS])
_OF_LAYOUT = np.array([c in LAYOUTS for c in CONCEPTS])
_WHOLE = np.array([[0, 0, SIZE, SIZE]])


@dataclass
class Album:
    """N drawn scenes as arrays; C concepts."""

    scenes: list[Scene]
    pixels: np.ndarray
    """uint8 [N, SIZE, SIZE, 3]"""
    owner: np.ndarray
    """uint8 [N, SIZE, SIZE]: 0 the background, i + 1 where object i is seen."""
    area: np.ndarray
    """int32 [N, MOST]: pixels of each object, hidden ones included; 0 where there is none."""
    words: np.ndarray
    """bool [N, MOST, C]: colour, kind and pattern of each object, and the layouts that it takes part in."""
    behind: np.ndarray
    """int64 [N]: number of the background's concept."""

    def __len__(self) -> int:
        return len(self.scenes)


def album(scenes: Iterable[Scene]) -> Album:
    scenes = list(scenes)
    drawn = [draw(scene) for scene in scenes]
    words = np.zeros((len(scenes), MOST, len(CONCEPTS)), bool)
    for n, scene in enumerate(scenes):
        for i, thing in enumerate(scene.things):
            words[n, i, [NUMBER[w] for w in (thing.colour, thing.kind, thing.pattern) if w != PLAIN]] = True
    found = Album(
        scenes,
        np.stack([d.pixels for d in drawn]),
        np.stack([d.owner for d in drawn]),
        np.stack([d.area for d in drawn]),
        words,
        np.array([NUMBER[scene.background] for scene in scenes]),
    )
    seen = shares(found, np.arange(len(scenes)), np.repeat(_WHOLE, len(scenes), 0))[0] >= 0.4
    for n, (scene, d) in enumerate(zip(scenes, drawn, strict=True)):
        for concept, members in _layout(scene, np.flatnonzero(seen[n]), d.overlap):
            words[n, members, NUMBER[concept]] = True
    return found


def stream(seed: int | str, start: int, count: int, unseen: bool = True) -> Album:
    """Scenes `start` to `start + count` of the stream `seed`."""
    return album(sample(seed, number, unseen) for number in range(start, start + count))


def _layout(scene: Scene, seen: np.ndarray, overlap: np.ndarray) -> Iterable[tuple[str, list[int]]]:
    """How the objects that can be seen lie: each layout that is true, and the objects that make it so."""
    if len(seen):
        yield ["single object", "two objects", "three objects", "four objects"][len(seen) - 1], list(seen)
    for i in seen:
        thing = scene.things[i]
        if thing.size != "medium":
            yield f"{thing.size} object", [i]
        if min(thing.x, SIZE - thing.x) < CORNER and min(thing.y, SIZE - thing.y) < CORNER:
            across, down = "left" if thing.x < SIZE / 2 else "right", "top" if thing.y < SIZE / 2 else "bottom"
            yield f"object at the {down} {across}", [i]
        for j in seen[seen < i]:
            other, reach = scene.things[j], thing.radius + scene.things[j].radius
            dx, dy = abs(thing.x - other.x), abs(thing.y - other.y)
            if overlap[i, j]:
                yield "overlapping objects", [i, j]
            elif dy < 0.3 * reach and dx < 1.35 * reach:
                yield "objects side by side", [i, j]
            elif dx < 0.3 * reach and dy < 1.35 * reach:
                yield "stacked objects", [i, j]


def shares(found: Album, images: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of boxes [B, 4] (x0, y0, x1, y1) in images [B]: the share of each object that is seen there, [B, MOST], and the
    pixels of the background and of each object, [B, MOST + 1]."""
    pixels = np.zeros((len(images), MOST + 1), np.int64)
    for b, (n, (x0, y0, x1, y1)) in enumerate(zip(images, boxes, strict=True)):
        pixels[b] = np.bincount(found.owner[n, y0:y1, x0:x1].reshape(-1), minlength=MOST + 1)
    return pixels[:, 1:] / np.maximum(found.area[images], 1), pixels


def objects(found: Album, images: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """int8 [B, MOST, 2]: whether some of each object (its colour and pattern) and whether its outline can be seen."""
    share, pixels = shares(found, images, boxes)
    there = found.area[images] > 0
    some = np.where((pixels[:, 1:] >= 90) | (share >= 0.4), YES, np.where(pixels[:, 1:] >= 12, UNSURE, NO))
    outline = np.where(share >= 0.65, YES, np.where(pixels[:, 1:] >= 12, UNSURE, NO))
    return np.where(there[..., None], np.stack([some, outline], 2), NO).astype(np.int8)


def concepts_seen(found: Album, images: np.ndarray | None = None, boxes: np.ndarray | None = None) -> np.ndarray:
    """int8 [B, C] of YES, NO, UNSURE. Without boxes of whole scenes; in crops, layout is UNSURE."""
    whole = boxes is None
    images = np.arange(len(found)) if images is None else images
    boxes = np.repeat(_WHOLE, len(images), 0) if boxes is None else boxes
    state, words = objects(found, images, boxes), found.words[images]
    state = np.where(_OF_KIND, state[..., 1:], state[..., :1])  # [B, MOST, C]
    yes, unsure = ((state == s) & words for s in (YES, UNSURE))
    result = np.where(yes.any(1), YES, np.where(unsure.any(1), UNSURE, NO))
    result = np.where(_OF_LAYOUT, words.any(1) if whole else UNSURE, result)
    ground = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = shares(found, images, boxes)[1][:, 0] / ground
    result[np.arange(len(images)), found.behind[images]] = np.where(left > 0.12, YES, np.where(left > 0.03, UNSURE, NO))
    return result.astype(np.int8)


PHRASES: dict[str, tuple[str, ...]] = (
    {c: (c,) for c in CONCEPTS} | compounds() | {p: (c,) for p, c in absences().items()}
)
"""Phrase -> the concepts it is made of."""


def phrases_seen(
    found: Album, phrases: list[str], images: np.ndarray | None = None, boxes: np.ndarray | None = None
) -> np.ndarray:
    """int8 [B, phrases]: concepts, compounds (one object shows both) and absences."""
    single, absent = concepts_seen(found, images, boxes), absences()
    images = np.arange(len(found)) if images is None else images
    state = objects(found, images, np.repeat(_WHOLE, len(images), 0) if boxes is None else boxes)
    columns = []
    for phrase in phrases:
        parts = [NUMBER[concept] for concept in PHRASES[phrase]]
        if phrase in absent:
            column = np.where(single[:, parts[0]] == UNSURE, UNSURE, 1 - single[:, parts[0]])
        elif len(parts) == 1:
            column = single[:, parts[0]]
        else:
            both = np.all(found.words[images][:, :, parts], 2)
            column = _any(both, state[..., 1])
        columns.append(column)
    return np.stack(columns, 1).astype(np.int8)


def _any(both: np.ndarray, state: np.ndarray) -> np.ndarray:
    return np.where((both & (state == YES)).any(1), YES, np.where((both & (state == UNSURE)).any(1), UNSURE, NO))


def masks(found: Album, phrase: str) -> np.ndarray:
    """bool [N, SIZE, SIZE]: the pixels that show it; an absence everywhere where it is true.

    Raises KeyError for a phrase that is none of the world's.
    """
    parts = [NUMBER[concept] for concept in PHRASES[phrase]]
    if phrase in SCENES:
        return (found.owner == 0) & (found.behind == parts[0])[:, None, None]
    if phrase in absences():
        true = phrases_seen(found, [phrase])[:, 0] == YES
        return np.broadcast_to(true[:, None, None], found.owner.shape)
    shows = np.concatenate([np.zeros((len(found), 1), bool), found.words[:, :, parts].all(2)], 1)  # by owner
    return np.take_along_axis(shows, found.owner.reshape(len(found), -1).astype(np.int64), 1).reshape(found.owner.shape)


def caption(found: Album, image: int, box: np.ndarray | None = None) -> str:
    """All that can be seen: each object with size, colour, kind and pattern, how they lie, and the background."""
    boxes = _WHOLE if box is None else np.asarray(box)[None]
    state = objects(found, np.array([image]), boxes)[0]
    scene, texts, places = found.scenes[image], [], []
    for i, thing in enumerate(scene.things):
        if state[i, 0] != YES and state[i, 1] != YES:
            continue
        dress = "plain" if thing.pattern == PLAIN else ""
        size = "" if thing.size == "medium" else thing.size
        kind = thing.kind if state[i, 1] == YES else "object"
        words = " ".join(w for w in (size, dress, thing.colour, kind) if w)
        article = ("" if state[i, 1] == YES else "part of ") + ("an" if words[0] in "aeiou" else "a")
        texts.append(f"{article} {words}" + ("" if dress else f" with {thing.pattern}"))
        places.append((thing.x, thing.y))
    sentence = texts[0] if texts else "nothing"
    for text, before, here in zip(texts[1:], places, places[1:], strict=False):
        sentence += f" {_relation(before, here)} {text}"
    behind = concepts_seen(found, np.array([image]), boxes)[0, NUMBER[scene.background]] != NO
    return sentence + (f" on {scene.background}" if behind else "")


def _relation(one: tuple[float, float], other: tuple[float, float]) -> str:
    dx, dy = other[0] - one[0], other[1] - one[1]
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """int64 [count, 4]: squares of 30 to 75 % of the scene's side."""
    side = np.rint(SIZE * rng.uniform(0.3, 0.75, count)).astype(int)
    x, y = (np.floor(rng.random(count) * (SIZE - side + 1)).astype(int) for _ in "xy")
    return np.stack([x, y, x + side, y + side], 1)
