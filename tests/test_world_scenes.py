"""The drawn world: the same scenes whatever was drawn before, and a truth that agrees with itself and the pixels."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.cleaning import clean
from tasks.words import read_concepts
from tasks.world.concepts import COLOURS, CONCEPTS, LAYOUTS, NUMBER, PLAIN, compounds, held_out, lexicon, lexicon_text
from tasks.world.drawing import draw
from tasks.world.scenes import SIZE, sample
from tasks.world.truth import (
    NO,
    UNSURE,
    YES,
    Album,
    caption,
    concepts_seen,
    masks,
    objects,
    phrases_seen,
    stream,
)

SEEDS = st.text(max_size=5) | st.integers(0, 10**6)
NUMBERS = st.integers(0, 10**5)
WHOLE = np.array([[0, 0, SIZE, SIZE]])


@st.composite
def boxes(draw_from) -> np.ndarray:
    """[1, 4]: any part of a scene of at least one pixel."""
    (x0, x1), (y0, y1) = (sorted(draw_from(st.lists(st.integers(0, SIZE), min_size=2, unique=True))[:2]) for _ in "xy")
    return np.array([[x0, y0, x1, y1]])


@cache
def some() -> Album:
    return stream("test", 0, 100)


@given(SEEDS, NUMBERS, st.lists(st.tuples(SEEDS, NUMBERS), max_size=5))
def test_a_scene_does_not_depend_on_what_was_drawn_before(seed, number, before):
    scene, pixels = sample(seed, number), draw(sample(seed, number)).pixels
    for other in before:
        draw(sample(*other))
    assert sample(seed, number) == scene
    assert np.array_equal(draw(scene).pixels, pixels)


def test_a_crop_of_everything_shows_what_the_scene_shows():
    found = some()
    whole = concepts_seen(found)
    crop = concepts_seen(found, np.arange(len(found)), np.repeat(WHOLE, len(found), 0))
    layout = np.isin(CONCEPTS, LAYOUTS)
    assert np.array_equal(whole[:, ~layout], crop[:, ~layout])
    assert (crop[:, layout] == UNSURE).all()
    assert (whole[:, layout] != UNSURE).all()


@given(boxes())
def test_a_compound_is_seen_only_with_both_its_parts(box):
    found = some()
    images, places = np.arange(len(found)), np.repeat(box, len(found), 0)
    single, pairs = concepts_seen(found, images, places), compounds()
    seen = phrases_seen(found, list(pairs), images, places)
    for column, (one, other) in zip(seen.T, pairs.values(), strict=True):
        parts = single[:, [NUMBER[one], NUMBER[other]]]
        assert (parts[column == YES] == YES).all()
        assert (parts[column == UNSURE] != NO).all()


@given(boxes())
def test_nothing_is_seen_in_a_crop_that_is_not_in_the_scene(box):
    found = some()
    crop = concepts_seen(found, np.arange(len(found)), np.repeat(box, len(found), 0))
    for scene, seen in zip(found.scenes, crop, strict=True):
        there = {scene.background}.union(*({t.kind, t.colour, t.pattern} for t in scene.things))
        assert (seen[~np.isin(CONCEPTS, [*there, *LAYOUTS])] == NO).all()


@pytest.mark.parametrize("colour", COLOURS)
def test_a_mask_is_the_pixels_of_the_objects_that_have_the_concept(colour):
    found = some()
    for scene, owner, mask in zip(found.scenes, found.owner, masks(found, colour), strict=True):
        numbers = [i + 1 for i, thing in enumerate(scene.things) if thing.colour == colour]
        assert np.array_equal(mask, np.isin(owner, numbers))


def test_the_mask_of_a_compound_lies_in_those_of_its_parts():
    found = some()
    for phrase, parts in list(compounds().items())[::5]:
        for part in parts:
            assert not (masks(found, phrase) & ~masks(found, part)).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mask_of_a_layout_is_empty_where_it_is_not_true(layout):
    found = some()
    assert np.array_equal(masks(found, layout).any((1, 2)), concepts_seen(found)[:, NUMBER[layout]] == YES)


def pairs_shown(unseen: bool) -> set[tuple[str, str]]:
    things = [thing for number in range(500) for thing in sample("pairs", number, unseen).things]
    return {(word, thing.kind) for thing in things for word in (thing.colour, thing.pattern)}


def test_held_out_pairs_are_never_in_training_scenes():
    assert not pairs_shown(unseen=False) & held_out()
    assert pairs_shown(unseen=True) & held_out()
    kinds, words = {kind for _, kind in held_out()}, {word for word, _ in held_out()}
    assert kinds == {kind for _, kind in pairs_shown(unseen=False)}
    assert set(COLOURS) <= words


def test_no_concept_is_rare_or_everywhere():
    frequency = (concepts_seen(stream("frequency", 0, 2000)) == YES).mean(0)
    odd = {concept: share for concept, share in zip(CONCEPTS, frequency, strict=True) if not 0.05 <= share <= 0.6}
    assert not odd


@given(st.none() | boxes())
def test_captions_name_every_visible_object(box):
    found = some()
    for image in range(len(found)):
        text = caption(found, image, None if box is None else box[0])
        state = objects(found, np.array([image]), WHOLE if box is None else box)[0]
        named = [thing for thing, (part, _) in zip(found.scenes[image].things, state, strict=False) if part == YES]
        for thing, (part, outline) in zip(found.scenes[image].things, state, strict=False):
            if part == YES:
                words = f"{thing.colour} {thing.kind if outline == YES else 'object'}"
                assert (f"plain {words}" if thing.pattern == PLAIN else f"{words} with {thing.pattern}") in text
        assert sum(text.count(relation) for relation in ("left of", "right of", "above", "below")) == max(
            len(named) - 1, 0
        )


def test_the_word_list_is_kept_whole(tmp_path):
    (tmp_path / "lexicon.txt").write_text(lexicon_text())
    rows, skipped = clean(read_concepts(str(tmp_path / "lexicon.txt")), max_words=1)
    phrases = [(phrase, family) for family, phrases in lexicon().items() for phrase in phrases]
    assert [(row["concept"], row["family"]) for row in rows] == phrases
    assert not skipped
