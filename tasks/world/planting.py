"""Planted units: hidden units of known meaning.

In: a net's layers and how many units each has; drawn scenes. Out: the list of what is planted where, each unit's target
at every position, and the loss that makes the net learn it.

A unit is taught by where its concept is: its input to the activation function is pushed above zero on the concept's
pixels and below zero elsewhere, and so is the largest over the image. It therefore has to see the concept; nothing is
looked up. Dead and always-on units are set by hand.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from tasks.world.concepts import COLOURS, FAMILY, KINDS, NUMBER, PATTERNS, SCENES, SYNONYMS, Dice, absences, held_out
from tasks.world.scenes import GRAIN, MOST, RADII, SIZE
from tasks.world.truth import NO, PHRASES, UNSURE, YES, Album, objects, phrases_seen

RELATIONS = ("two objects", "three objects", "overlapping objects", "objects side by side", "stacked objects")
"""Layouts that hang on several objects at once: nets of this size learn them less well than AUROC 0.97, so units for
them are planted and judged as a kind of their own."""
LAYOUT = 4.0
"""Weight of layouts in the loss: they are learned last, because no single place shows them."""
MARGIN = 2.0
"""Input to the activation function at which true and false are equally likely: above zero, so that what is doubtful is
not cut off."""
FULL = 5.0
"""What a graded unit reaches for the largest object, and a noise unit for the strongest grain."""


@dataclass
class Planted:
    """A unit of known meaning."""

    layer: str
    unit: int
    kind: str
    """mono, relation, or, and, not, graded, duplicate, noise, dead, always_on, special_token_only, logit."""
    concepts: tuple[str, ...] = ()
    """What makes it fire: any of them. An 'and' has one compound, a 'not' one absence; none for noise and the like."""
    source: int | None = None
    """The unit of the same layer that a duplicate repeats."""

    @property
    def family(self) -> str | None:
        """Of the first concept; compounds and absences are families of their own."""
        if not self.concepts:
            return None
        first = self.concepts[0]
        return FAMILY.get(first, "absence" if first in absences() else "compound")


@dataclass
class Depths:
    """Layers by what they can see: early ones see colours, deep ones whole scenes."""

    colour: list[str]
    pattern: list[str]
    scene: list[str]
    kind: list[str]
    layout: list[str]
    free: list[str]
    """For what is set by hand, and noise."""
    special: list[str]
    """For units that answer on special tokens alone; empty where there are none."""


def plan(depths: Depths, widths: dict[str, int], seed: int) -> list[Planted]:
    """What is planted where: every concept once in each of its layers, and some of every other kind."""
    dice = Dice(f"{seed}/plant")
    free = {layer: dice.order(range(width)) for layer, width in widths.items()}
    found: list[Planted] = []

    def put(layer: str, kind: str, *concepts: str, source: int | None = None) -> None:
        found.append(Planted(layer, free[layer].pop(), kind, concepts, source))

    families = {"colour": depths.colour, "shape": depths.kind, "object": depths.kind, "pattern": depths.pattern}
    families |= {"scene": depths.scene, "layout": depths.layout}
    for family, layers in families.items():
        for layer in layers:
            for concept in SYNONYMS[family]:
                put(layer, "relation" if concept in RELATIONS else "mono", concept)
    single = list(found)
    deep, deepest = depths.kind[-1], depths.layout[-1]
    for one, other in [
        (COLOURS, COLOURS),
        (COLOURS, PATTERNS),
        (KINDS, KINDS),
        (COLOURS, KINDS),
        (PATTERNS, SCENES),
    ] * 3:
        pair = {dice.pick(one), dice.pick(other)}
        while len(pair) < 2:
            pair.add(dice.pick(other))
        put(deep, "or", *sorted(pair))
    seen = [phrase for phrase, parts in PHRASES.items() if len(parts) == 2 and tuple(parts) not in held_out()]
    for phrase in dice.order(seen)[:12]:
        put(deep, "and", phrase)
    for phrase in dice.order(absences())[:8]:
        put(deepest, "not", phrase)
    for kind in dice.order(KINDS)[:8]:
        put(deep, "graded", kind)
    for unit in dice.order(single)[:8]:
        put(unit.layer, "duplicate", *unit.concepts, source=unit.unit)
    for number in range(10):
        put(depths.free[number % len(depths.free)], "noise")
    for number in range(6):
        put(depths.free[number % len(depths.free)], "dead")
        put(depths.free[number % len(depths.free)], "always_on")
    for number in range(6 if depths.special else 0):
        put(depths.special[number % len(depths.special)], "special_token_only", dice.pick([*COLOURS, *SCENES]))
    return found


TWO_VALUED = ("mono", "relation", "or", "and", "not")
"""Above zero where the concept is and below elsewhere."""
TAUGHT = (*TWO_VALUED, "graded", "noise", "special_token_only")


class Teacher:
    """Targets and loss of one layer's planted units; U units, G = g x g positions."""

    def __init__(self, units: list[Planted], grid: int, prefix: int, device: torch.device) -> None:
        self.units = [u for u in units if u.kind in TAUGHT]
        self.copies = [u for u in units if u.kind == "duplicate"]
        self.grid, self.prefix, self.device, self.album = grid, prefix, device, None
        self.numbers = torch.tensor([u.unit for u in [*self.units, *self.copies]], device=device)
        place = {u.unit: i for i, u in enumerate(self.units)}
        self.sources = [place[u.source] for u in self.copies if u.source is not None]
        self.phrases = sorted({c for u in self.units for c in u.concepts})
        # Of what excludes each other, a layer that has all must choose one: learned far faster than yes or no.
        families = (COLOURS, KINDS, PATTERNS, SCENES)
        mono = {u.concepts[0]: i for i, u in enumerate(self.units) if u.kind == "mono"}
        self.choices = [[mono[c] for c in family] for family in families if set(family) <= set(mono)]
        self.weights = torch.tensor([LAYOUT if u.family == "layout" else 1.0 for u in self.units], device=device)
        self.is_kind = {k: torch.tensor([u.kind == k for u in self.units], device=device) for k in TAUGHT}

    def batch(self, found: Album, images: np.ndarray) -> tuple[torch.Tensor, ...]:
        """The targets of some scenes; an album's are made once, because every scene is used a few times."""
        if found is not self.album:
            self.album, self.whole = found, self.targets(found, np.arange(len(found)))
        return tuple(x[images] for x in self.whole)

    def targets(self, found: Album, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Truth at every position int8 [B, U, G] and of the whole scene [B, U] (YES, NO, UNSURE), and size [B, U, 1]:
        of graded units the radius of the largest such object over the largest there is, of noise units the grain."""
        whole = np.repeat([[0, 0, SIZE, SIZE]], len(images), 0)
        state, words, behind = objects(found, images, whole), found.words[images], found.behind[images]
        pooled_P = phrases_seen(found, self.phrases, images)
        cover = self._cover(found.owner[images])  # [B, MOST + 1, G]
        firm = cover >= (0.6 * cover.max(2, keepdims=True)).clip(0.02, 0.5)
        core = cover >= 0.95 * cover.max(2, keepdims=True).clip(0.02)  # where an outline is seen best
        some = cover > 0.04
        positions = np.zeros((len(images), len(self.units), self.grid**2), np.int8)
        pooled = np.zeros((len(images), len(self.units)), np.int8)
        size = np.zeros((len(images), len(self.units), 1), np.float32)
        radius = np.array(
            [
                [t.radius / RADII["large"][1] for t in found.scenes[n].things]
                + [0] * (MOST - len(found.scenes[n].things))
                for n in images
            ]
        )
        for u, unit in enumerate(self.units):
            yes, unsure = np.zeros((2, len(images), self.grid**2), bool)
            for concept in unit.concepts:
                parts = [NUMBER[c] for c in PHRASES[concept]]
                label = pooled_P[:, self.phrases.index(concept)]
                pooled[:, u] = np.where(pooled[:, u] == YES, YES, np.where(label == NO, pooled[:, u], label))
                if concept in SCENES:
                    here = (behind == parts[0])[:, None]
                    yes |= here & firm[:, 0]
                    unsure |= here & ~firm[:, 0]
                elif concept in absences():
                    yes |= (label == YES)[:, None]
                else:
                    match = np.all(words[:, :, parts], 2)  # [B, MOST]
                    outline = any(c in KINDS for c in PHRASES[concept])
                    sure = match & (state[..., 1 if outline else 0] == YES)
                    yes |= (sure[..., None] & (core if outline else firm)[:, 1:]).any(1)
                    unsure |= (match[..., None] & some[:, 1:]).any(1)
                    if unit.kind == "graded":
                        size[:, u, 0] = (radius * sure).max(1)
            if unit.kind == "noise":
                size[:, u, 0] = [found.scenes[n].grain / GRAIN for n in images]
            positions[:, u] = np.where(yes, YES, np.where(unsure, UNSURE, NO))
        return tuple(torch.from_numpy(x).to(self.device) for x in (positions, pooled, size))  # pyright: ignore[reportReturnType]

    def _cover(self, owner: np.ndarray) -> np.ndarray:
        """float32 [B, MOST + 1, G]: share of each position that belongs to the background and to each object."""
        step = SIZE // self.grid
        hot = (owner[:, None] == np.arange(MOST + 1, dtype=np.uint8)[:, None, None]).reshape(
            -1, self.grid, step, self.grid, step
        )
        return hot.mean((2, 4), dtype=np.float32).reshape(len(owner), MOST + 1, -1)

    def loss(self, z: torch.Tensor, targets: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Of the inputs to the activation function [B, planted, prefix + G], in the order of `numbers`."""
        positions, pooled, size = targets
        z = z.float()
        special, patches = z[:, :, : self.prefix], z[:, : len(self.units), self.prefix :]
        binary = sum(self.is_kind[kind] for kind in TWO_VALUED) > 0
        peak = patches.max(2).values
        weights = self.weights[binary]
        value = balanced(patches[:, binary] - MARGIN, positions[:, binary], weights)
        value = value + balanced(peak[:, binary] - MARGIN, pooled[:, binary], weights)
        for family in self.choices:
            true = positions[:, family] == YES
            one = true.sum(1) == 1  # [B, G]
            value = value + F.cross_entropy(patches[:, family].transpose(1, 2)[one], true.byte().argmax(1)[one])
        for kind in ("graded", "noise"):
            these = self.is_kind[kind]
            if these.any():
                aim = FULL * size[:, these] * (positions[:, these] == YES if kind == "graded" else 1.0)
                known = (
                    (positions[:, these] != UNSURE)
                    if kind == "graded"
                    else torch.ones_like(patches[:, these], dtype=torch.bool)
                )
                share = (
                    ((F.softplus(4 * patches[:, these]) / 4 - aim).square() * (1 + 8 * (aim > 0))) * known
                ).sum() / known.sum()
                value = value + share * these.sum() / len(self.units)
        these = self.is_kind["special_token_only"]
        if these.any():
            fires = pooled[:, these, None].expand(-1, -1, self.prefix)
            wanted = balanced(special[:, : len(self.units)][:, these], fires)
            value = value + 0.5 * (wanted + F.relu(patches[:, these] + 5).mean())
        if self.copies:
            copies = z[:, len(self.units) :, self.prefix :]
            value = value + 0.3 * (copies - patches[:, self.sources].detach()).square().mean()
        return value


def balanced(z: torch.Tensor, truth: torch.Tensor, weights: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Binary cross-entropy in which each unit's true and false places weigh the same; weighted mean over units (axis
    1)."""
    axes = tuple(a for a in range(z.ndim) if a != 1)
    value = torch.zeros((), device=z.device)
    for label, sign in ((YES, -1.0), (NO, 1.0)):
        here = truth == label
        each = (F.softplus(sign * z) * here).sum(axes) / here.sum(axes).clamp(min=1)
        value = value + (weights * each).mean() / 2
    return value
