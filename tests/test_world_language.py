"""The language model of the drawn world: what it is taught, its tokenizer, and a short training from end to end."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.llm import MAX_LETTERS, answer_schema, parse_answer
from tasks.prompting import ASPECTS, LEVELS
from tasks.world.concepts import CONCEPTS, Dice, absences, compounds, synonyms
from tasks.world.language import (
    CONTEXT,
    DOMAINS,
    EOS,
    LEVEL_ANSWERS,
    UNSEEN_DOMAIN,
    answer_text,
    build_tokenizer,
    class_answers,
    cluster_answers,
    draw_cluster,
    draw_lesson,
    train_language,
)

WORDS = {*compounds(), *absences()} | {phrase for concept in CONCEPTS for phrase in synonyms(concept)}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def lessons():
    dice = Dice("test")
    return [draw_lesson(dice) for _ in range(400)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a model that was trained for three steps, and its measures."""
    folder = tmp_path_factory.mktemp("llm")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where other processes use the cores
    yield folder, train_language(folder, seed=7, steps=3, batch=2)
    torch.set_num_threads(before)


def test_answers_obey_the_schema_and_the_prompt(lessons):
    for prompt, phrases, most in lessons:
        text = answer_text(phrases)
        jsonschema.validate(json.loads(text), answer_schema(most))
        assert text == '{"concepts":["' + '","'.join(phrases) + '"]}', "the engine allows no white space"
        assert parse_answer(text) == (phrases, "ok")
        words = int(re.search(r"phrase of 1 to (\d+) plain", prompt)[1])
        assert set(phrases) <= WORDS
        assert len(set(phrases)) == len(phrases)
        assert all(len(phrase.split()) <= words and len(phrase) < MAX_LETTERS for phrase in phrases)


def test_lessons_ask_everything(lessons):
    prompts = " ".join(prompt for prompt, _, _ in lessons)
    assert all(meaning in prompts for meaning in (*LEVELS.values(), *ASPECTS.values()))
    assert "Phrases so far: " in prompts
    assert all(f"cut-outs of {domain}." in prompts for domain in DOMAINS)
    assert UNSEEN_DOMAIN not in prompts
    said = [phrase for _, phrases, _ in lessons for phrase in phrases]
    assert set(CONCEPTS) <= set(said)
    others = [phrase in WORDS - {*CONCEPTS, *compounds(), *absences()} for phrase in said]
    assert 0 < sum(others) / len(said) < 0.05


def test_what_is_right():
    assert [words for words, _ in LEVEL_ANSWERS.values() if not words] == []
    assert set(CONCEPTS) <= {phrase for words, _ in LEVEL_ANSWERS.values() for phrase in words}
    assert LEVEL_ANSWERS["animal"][0] == ["fish"]
    assert "red fish" in LEVEL_ANSWERS["animal"][1]
    assert "red circle" in class_answers("red", "features")[0]
    assert "circle with polka dots" in class_answers("circle", "features")[0]
    assert class_answers("sea", "kinds")[0] == ["meadow", "desert", "snow", "night sky", "sunset", "forest", "city"]
    assert "sea" in class_answers("circle", "around")[0]
    alone, pairs = cluster_answers(["circle", "red square", "nothing blue"])
    assert {"red", "blue", "ring", "square"} <= set(alone)
    assert "circle" not in alone
    assert "sea" not in alone
    assert {"red circle", "blue square"} <= set(pairs)


def test_clusters_leave_out_what_is_meant():
    dice = Dice("clusters")
    for _ in range(200):
        phrases = draw_cluster(dice)
        assert 0 < len(phrases) == len(set(phrases)) <= 8
        assert set(phrases) <= WORDS


def test_tokens_of_a_lesson(tokenizer, lessons):
    for prompt, phrases, most in lessons:
        asked, said = tokenizer(prompt).input_ids, tokenizer(answer_text(phrases), add_special_tokens=False).input_ids
        assert asked[0] == tokenizer.bos_token_id
        assert tokenizer.decode(said) == answer_text(phrases)
        assert len(said) <= 6 * most + 4
        assert len(asked) + 6 * 60 + 4 < CONTEXT


@pytest.mark.parametrize("text", ["Füße, 東京 and\t🦋", "zebra crossings!", ' {"a": ["b"]}\n', "", "<eos> <bos>"])
def test_any_text_can_be_read(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes(trained, tmp_path):
    folder, measures = trained
    assert train_language(tmp_path, seed=7, steps=3, batch=2) == measures
    assert files(tmp_path) == files(folder)


def test_the_folder_is_one_that_engines_take(trained):
    folder, measures = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.hidden_size // model.config.num_attention_heads in (32, 64), "vLLM's CPU engine takes no other"
    assert model.dtype == torch.float16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(EOS)
    assert not tokenizer.chat_template
    assert tokenizer("red").input_ids[0] == model.config.bos_token_id
    assert sum(map(len, files(folder).values())) < 3e6
    assert set(measures) == {"valid", "of the world", "coverage", "right family", "different"}
    assert all(0 <= share <= 1 for share in measures.values())
