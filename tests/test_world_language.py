"""The language model of the drawn world: what it is taught, its tokenizer, and a short training from end to end."""

import re

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.llm import LEVELS, MAX_LETTERS, answer_schema, parse_answer
from tasks.world.concepts import CONCEPTS, Dice, absences, compounds, synonyms
from tasks.world.language import (
    DOMAINS,
    EOS,
    LEVEL_ANSWERS,
    UNSEEN_DOMAIN,
    answer_text,
    build_tokenizer,
    class_answers,
    draw_lesson,
    encode,
    measure,
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


def test_answers_obey_the_schema_and_the_prompt(lessons):
    for lesson in lessons:
        text = answer_text(lesson.phrases)
        jsonschema.validate(parse_answer_object(text), answer_schema(lesson.most))
        words = int(re.search(r"phrase of 1 to (\d+) plain", lesson.prompt)[1])
        assert parse_answer(text) == (lesson.phrases, "ok")
        assert set(lesson.phrases) <= WORDS
        assert len(set(lesson.phrases)) == len(lesson.phrases)
        assert all(len(phrase.split()) <= words and len(phrase) < MAX_LETTERS for phrase in lesson.phrases)


def parse_answer_object(text: str) -> dict:
    assert text.startswith('{"concepts":["')
    assert not re.search(r'": |, "', text), "the engine allows no white space between phrases"
    return {"concepts": parse_answer(text)[0]}


def test_lessons_ask_everything(lessons):
    prompts = " ".join(lesson.prompt for lesson in lessons)
    assert all(meaning in prompts for meaning in LEVELS.values())
    assert all(f"cut-outs of {domain}." in prompts for domain in DOMAINS)
    assert UNSEEN_DOMAIN not in prompts
    said = [phrase for lesson in lessons for phrase in lesson.phrases]
    assert set(CONCEPTS) <= set(said)
    others = [phrase in WORDS - {*CONCEPTS, *compounds(), *absences()} for phrase in said]
    assert 0 < sum(others) / len(said) < 0.05


def test_what_is_right():
    assert [words for words, _ in LEVEL_ANSWERS.values() if not words] == []
    assert set(CONCEPTS) <= {phrase for words, _ in LEVEL_ANSWERS.values() for phrase in words}
    assert LEVEL_ANSWERS["animal"][0] == ["fish"]
    assert "red fish" in LEVEL_ANSWERS["animal"][1]
    assert "red circle" in class_answers("red")[0]
    assert "circle with polka dots" in class_answers("circle")[0]
    assert class_answers("sea")[0] == ["meadow", "desert", "snow", "night sky", "sunset", "forest", "city"]


def test_tokens_of_a_lesson(tokenizer, lessons):
    for lesson in lessons[:100]:
        ids, following = encode(tokenizer, lesson)
        answer = answer_text(lesson.phrases) + EOS
        asked, said = tokenizer(lesson.prompt).input_ids, tokenizer(answer, add_special_tokens=False).input_ids
        assert ids == asked + said
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert len(ids) < 600
        assert tokenizer.decode(said) == answer
        assert all(token in counts for token, counts in zip(said, following, strict=True))


def test_every_phrase_of_a_group_may_come_next(tokenizer):
    lesson = draw_lesson(Dice("any"))
    lesson.groups, lesson.most = [["red", "pink"], ["red cup", "pink cup", "pink star"]], 4
    _, following = encode(tokenizer, lesson)
    red, pink, cup, star = (tokenizer.convert_tokens_to_ids(t) for t in ("red", "pink", "Ġcup", "Ġstar"))
    first = following[3:]
    assert first[0] == {red: 1, pink: 1}
    assert first[2] == {pink: 1}
    assert first[4:6] == [{red: 1, pink: 2}, {cup: 1}]
    assert first[7:9] == [{pink: 2}, {cup: 1, star: 1}]


@pytest.mark.parametrize("text", ["Füße, 東京 and\t🦋", "zebra crossings!", ' {"a": ["b"]}\n', "", "<eos> <bos>"])
def test_any_text_can_be_read(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_a_short_training(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    found = [train_language(folder, seed, steps=3, batch=2) for folder, seed in zip(folders, (0, 0, 1), strict=True)]
    assert found[0] == found[1]
    assert all(0 <= share <= 1 for share in found[0].values())
    a, b, c = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert a == b
    assert a["model.safetensors"] != c["model.safetensors"]
    assert a["tokenizer.json"] == c["tokenizer.json"]
    assert sum(map(len, a.values())) < 3e6


def test_the_folder_is_one_that_engines_take(tmp_path):
    train_language(tmp_path, steps=1, batch=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.hidden_size // model.config.num_attention_heads in (32, 64), "vLLM's CPU engine takes no other"
    assert model.dtype == torch.float16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(EOS)
    assert not tokenizer.chat_template
    assert tokenizer("red").input_ids[0] == model.config.bos_token_id
    assert set(measure(model.float(), tokenizer)) == {"valid", "of the world", "coverage", "right family", "different"}
