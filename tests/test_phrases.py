"""Stage phrases: cleaning, word lists, class names, settings."""

import json
import pickle
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tasks.cleaning import MAX_LENGTH, broader, class_concept, class_rows, clean, family_of, head
from tasks.llm import MAX_LETTERS, LlmSettings, parse_answer
from tasks.phrases import PhrasesJob, PhrasesWorker, VocabularySettings, identity
from tasks.prompting import LEVELS
from tasks.store import Folder, StoreSettings, fingerprint
from tasks.tables import make_table
from tasks.words import LEXICON, Raw, read_concepts

ROOT = Path(__file__).parents[1]
LLM = VocabularySettings(source="llm", aspects=["features"], llm=LlmSettings(model="some/model"))

# Words that are likely to touch a rule, beside any characters at all.
pieces = st.sampled_from(
    ["the ", "a ", "- ", "1. ", "(2) ", '"', "'", "...", "dog", "Red ", "is ", "that ", "<b>", "\u200b", "\u00ad", "_"]
)
phrases = st.one_of(st.text(max_size=130), st.lists(st.one_of(pieces, st.text(max_size=4)), max_size=12).map("".join))
families = st.sampled_from([None, "colour", " Part "])
raws = st.builds(
    Raw, phrases, families, st.lists(phrases, max_size=3).map(tuple), st.sampled_from([None, "level-1"]), st.booleans()
)


def concepts_of(raw: list[Raw], max_words: int = 6) -> list[str]:
    return [row["concept"] for row in clean(raw, max_words)[0]]


def worker(folder: Path, settings: VocabularySettings, class_names: tuple[str, ...] = ()) -> PhrasesWorker:
    out = Folder(StoreSettings(str(folder)), "phrases", "f", ("phrases",))
    return PhrasesWorker(pickle.loads(pickle.dumps(PhrasesJob(out, settings, list(class_names)))))


# Cleaning


@pytest.mark.parametrize(
    ("raw", "concept"),
    [
        ("  Striped\t Fur ", "striped fur"),
        ("1. a dog's snout.", "dog's snout"),
        ("- The  red_car;", "red car"),
        ('(3) "the wheel"', "wheel"),
        ("\u2022 \u201csome\u201d grass", '"some" grass'),
        ("jack\u2010o\u2019\u2010lantern", "jack-o'-lantern"),
        ("\ufb01sh", "fish"),
        ("soft\u00adware", "software"),
        ("a", "a"),
        ("the", "the"),
        ("3.5 mm jack", "3.5 mm jack"),
        ("st. bernard", "st. bernard"),
        ("tail that is black and white", "tail that is black and white"),
        ("trash can", "trash can"),
        ("is", "is"),
        ("a thick, fleshy body", "thick, fleshy body"),
    ],
)
def test_tidy(raw, concept):
    assert concepts_of([Raw(raw)]) == [concept]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("", "empty"),
        (" \u200b ... ", "empty"),
        ("\U0001f600", "empty"),
        ("x" * 101, "too long"),
        ("x" * 10**6, "too long"),
        (" " * 2000 + "dog", "too long"),
        ("dog\x00cat", "control characters"),
        ("dog\x1b[31m", "control characters"),
        ("\ud800 dog", "control characters"),
        ("<script>alert(1)</script>", "markup or path"),
        ("black &amp; white", "markup or path"),
        ("**bold** fur", "markup or path"),
        ("https://a.example/dog", "markup or path"),
        ("../../etc/passwd", "markup or path"),
        ("C:\\windows\\system32", "markup or path"),
        ("/a/airfield 0", "markup or path"),
        ('{"concepts": 1}', "markup or path"),
        ("Here are 20 concepts:", "sentence"),
        ("Sure! Here is a list", "sentence"),
        ("the dog is brown", "sentence"),
        ("A red ball. It bounces", "sentence"),
        ("may have a beach", "sentence"),
        ("a strong smell", "not visible"),
        ("used for cooking", "not visible"),
        ("native to South America", "not visible"),
    ],
)
def test_refused(raw, reason):
    rows, skipped = clean([Raw(raw, sources=(raw,))], 6)
    assert (rows, dict(skipped)) == ([], {reason: 1})


def test_rules_for_language_models_are_stricter():
    long = "a very long thin curved dark wooden handle"
    assert concepts_of([Raw(long)]) == [long[2:]]
    assert clean([Raw(long, prompt_id="level-1")], 6) == ([], {"too many words": 1})  # 7 after the article
    assert concepts_of([Raw(long, prompt_id="level-1")], 7) == [long[2:]]
    cut_off = "x" * MAX_LETTERS
    assert clean([Raw(cut_off, prompt_id="level-1")], 6) == ([], {"too long": 1})
    assert concepts_of([Raw(cut_off)]) == [cut_off]


def test_duplicates_merge_in_first_seen_order():
    raw = [
        Raw("A Dog", None, ("b", "a")),
        Raw("cat", None, ("c",)),
        Raw("dog.", "animal", ("a", "d"), "level-1"),
        Raw("dog", "object", (), "level-2"),
    ]
    rows, skipped = clean(raw, 6)
    assert [row["concept"] for row in rows] == ["dog", "cat"]
    assert rows[0] == {
        "concept_id": fingerprint({"concept": "dog"}),
        "concept": "dog",
        "family": "animal",
        "sources": ["b", "a", "d"],
        "prompt_id": "level-1",
        "is_class": False,
    }
    assert skipped == {"duplicate": 2}


def test_plurals_merge_where_the_singular_is_there():
    pairs = {"red cars": "red car", "berries": "berry", "boxes": "box", "men": "man"}
    alone = ["stripes", "glass", "glasses", "grass", "gras", "dog", "dogs"]
    raw = [Raw(c, None, (c,)) for c in (*pairs, *pairs.values(), *alone[:5])]
    rows, skipped = clean([*raw, *class_rows(alone[5:])], 6)
    found = {row["concept"]: row["sources"] for row in rows}
    assert set(found) == {*pairs.values(), *alone}
    assert all(found[one] == [one, many] for many, one in pairs.items())
    assert skipped == {"plural": 4}


@pytest.mark.parametrize(
    ("concept", "kinds"),
    [
        ("brown dog with a hat", ["brown dog", "dog"]),
        ("row of white houses", ["white houses", "houses"]),
        ("dog", []),
        ("striped fur", ["fur"]),
        ("man and woman", ["man"]),
    ],
)
def test_broader(concept, kinds):
    assert broader(concept) == kinds


@given(phrases)
def test_broader_phrases_are_parts_of_the_head(text):
    for concept in concepts_of([Raw(text)]):
        assert all(head(concept).endswith(phrase) and phrase != concept for phrase in broader(concept))


def test_family():
    rows, _ = clean([Raw("Fur Hat", "Shape"), Raw("fur hat"), Raw("wooden teapot"), Raw("zorgle")], 6)
    assert [row["family"] for row in rows] == ["shape", family_of("teapot"), "other"]
    assert (family_of("red"), family_of("striped red")) == ("colour", "colour")
    assert family_of("teapots on a red table") == family_of("teapot")


@settings(max_examples=300)
@given(st.lists(raws, max_size=8))
def test_clean_holds_its_limits(raw):
    rows, skipped = clean(raw, 6)
    assert len(rows) + sum(skipped.values()) == len(raw)
    assert len({row["concept"] for row in rows}) == len({row["concept_id"] for row in rows}) == len(rows)
    for row in rows:
        concept = row["concept"]
        assert 0 < len(concept) <= MAX_LENGTH
        assert concept == " ".join(concept.split()) == unicodedata.normalize("NFKC", concept).lower()
        assert concept.isprintable()
        assert any(c.isalnum() for c in concept)
        assert row["family"]
        "".join([concept, *row["sources"]]).encode()  # UTF-8, as Parquet wants it


@settings(max_examples=300)
@given(st.lists(raws, max_size=8))
def test_clean_is_idempotent(raw):
    rows, _ = clean([r._replace(is_class=False) for r in raw], 6)
    again = [Raw(r["concept"], r["family"], tuple(r["sources"]), r["prompt_id"]) for r in rows]
    # A phrase that a list brought first and a language model later is held to the list's rules.
    again = [r if clean([r], 6)[0] else r._replace(prompt_id=None) for r in again]
    second, skipped = clean(again, 6)
    assert [r | {"prompt_id": None} for r in second] == [r | {"prompt_id": None} for r in rows]
    assert not skipped


@given(st.lists(raws, max_size=8), st.randoms(use_true_random=False))
def test_the_set_of_concepts_does_not_depend_on_the_order(raw, chance):
    shuffled = raw.copy()
    chance.shuffle(shuffled)
    first, second = (clean(r, 6) for r in (raw, shuffled))
    assert {r["concept_id"]: sorted(r["sources"]) for r in first[0]} == {
        r["concept_id"]: sorted(r["sources"]) for r in second[0]
    }
    assert first[1] == second[1]


# Word lists


def test_shipped_lexicon():
    raw = read_concepts(None)
    words = [row for row in raw if row.concept.strip()]
    rows, skipped = clean(raw, 6)
    assert len(rows) == len(words) >= 1500, "the lexicon repeats itself or holds something refused"
    assert not set(skipped) - {"empty"}
    assert [row["concept"] for row in rows] == [row.concept.strip() for row in words]
    assert set(Counter(row["family"] for row in rows)) == set(LEVELS) - {"abstract", "any"}
    assert max(len(row["concept"].split()) for row in rows) <= 6
    assert {source for row in rows for source in row["sources"]} == {"lexicon.txt"}
    LEXICON.read_text(encoding="ascii")


def parquet(columns: dict) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


GOOD = {
    "plain.txt": (b"red\nstriped fur\n", [("red", None, "plain.txt"), ("striped fur", None, "plain.txt")]),
    "bom.txt": (b"\xef\xbb\xbfred\r\nblue\r\n", [("red", None, "bom.txt"), ("blue", None, "bom.txt")]),
    "open_end.txt": (b"red\nblue", [("red", None, "open_end.txt"), ("blue", None, "open_end.txt")]),
    "sections.txt": (
        b"[colour]\nred\n[part]\nnose\n",
        [("red", "colour", "sections.txt"), ("nose", "part", "sections.txt")],
    ),
    "list.json": (b'["red", "blue"]', [("red", None, "list.json"), ("blue", None, "list.json")]),
    "many.json": (b'{"hen": ["red comb", "beak"], "cock": []}', [("red comb", None, "hen"), ("beak", None, "hen")]),
    "one.json": (b'{"hen": "red comb", "cat": "fur"}', [("red comb", None, "hen"), ("fur", None, "cat")]),
    "a.parquet": (parquet({"concept": ["red", None]}), [("red", None, "a.parquet"), ("", None, "a.parquet")]),
    "b.parquet": (
        parquet(
            {"family": pa.array(["colour", None]), "concept": pa.array(["red", "nose"], pa.large_string()), "n": [1, 2]}
        ),
        [("red", "colour", "b.parquet"), ("nose", None, "b.parquet")],
    ),
    "c.parquet": (
        parquet({"concept": pa.array(["red", "red"]).dictionary_encode()}),
        [("red", None, "c.parquet"), ("red", None, "c.parquet")],
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_formats(tmp_path, name):
    data, expected = GOOD[name]
    (tmp_path / name).write_bytes(data)
    with fsspec.open(f"memory://lists/{name}", "wb") as file:
        file.write(data)  # pyright: ignore[reportAttributeAccessIssue]
    for path in (str(tmp_path / name), f"memory://lists/{name}", (tmp_path / name).as_uri()):
        assert [(r.concept, r.family, r.sources[0]) for r in read_concepts(path)] == expected


BAD = {
    "number.json": b"5",
    "numbers.json": b'{"entity": [0, 1]}',
    "mixed.json": b'["red", null]',
    "nested.json": b'{"a": {"b": "c"}}',
    "deep.json": b"[" * 10**5,
    "cut.json": b'["red", "bl',
    "binary.txt": b"\xff\xfe\x00r",
    "image.parquet": b"\x89PNG not a table",
    "other.parquet": parquet({"word": ["red"]}),
    "struct.parquet": parquet({"concept": [{"a": 1}]}),
    "bytes.parquet": parquet({"concept": [b"\xff\xfe"]}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(ValueError, match=r"vocabulary\.path=.*; expected text with one concept per line") as error:
        read_concepts(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["no/such/file.txt", "nosuchprotocol://a/b.txt", "."])
def test_missing_files_are_told(path):
    with pytest.raises(ValueError, match=r"vocabulary\.path=.*expected text"):
        read_concepts(path)


def test_empty_lines_and_duplicates_are_counted(tmp_path):
    (tmp_path / "words.txt").write_text("dog\ncat\nDog\n\n\n")
    report = worker(tmp_path, VocabularySettings(path=str(tmp_path / "words.txt"))).run(0)
    assert report.rows == {"phrases": 2}
    assert report.skipped == {"duplicate": 1, "empty": 2}


# Class names


def test_class_names():
    names = [
        "tench, Tinca tinca",
        "drake",
        "crane",
        "crane",
        "Crane",
        "jack-o'-lantern",
        "/a/bus_stop 0",
        "<unk>",
        "IT IS",
    ]
    rows, skipped = clean(class_rows(names), 6)
    found = ["tench", "drake", "crane", "jack-o'-lantern", "/a/bus stop 0", "<unk>", "it is"]
    assert [row["concept"] for row in rows] == found
    assert rows[0]["sources"] == ["tench, Tinca tinca"]
    assert rows[2]["sources"] == ["crane", "Crane"]
    assert skipped == {"duplicate": 2}


@settings(max_examples=300)
@given(st.one_of(phrases, st.text(min_size=90, max_size=1200)))
def test_every_class_name_with_a_word_survives(name):
    for full in (name, f"zebra {name}"):
        rows, skipped = clean(class_rows([full]), 6)
        concept = class_concept(full)
        assert [row["concept"] for row in rows] == ([concept] if concept else [])
        assert set(skipped) <= {"empty"}
    assert concept.startswith("zebra")


# Settings and identity


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": "gpt"}, r"vocabulary\.source=gpt: allowed are lexicon, class_names, llm"),
        ({"source": "class_names", "path": "a.txt"}, r"vocabulary\.path=a\.txt: allowed .*source=lexicon"),
        ({"path": " "}, r"vocabulary\.path= "),
        ({"levels": ["colour", "mood"]}, r"vocabulary\.levels=.*allowed are, once each, any, colour, texture"),
        ({"levels": ["colour", "colour"]}, r"vocabulary\.levels=.*once each"),
        ({"max_words": 0}, r"vocabulary\.max_words=0: allowed are 1 to 12"),
        ({"max_concepts": 0}, r"vocabulary\.max_concepts=0: allowed"),
        ({"merge": -1}, r"vocabulary\.merge=-1: allowed are 0 to 1"),
        ({"aspects": ["mood"]}, r"vocabulary\.aspects=.*allowed are, once each, features, parts, kinds, around"),
        ({"source": "llm"}, r"vocabulary\.llm\.model is missing"),
        ({"source": "llm", "llm": LlmSettings(model="m"), "levels": []}, r"vocabulary\.levels=\[\]: allowed only"),
        ({"source": "llm", "llm": LlmSettings(model="m"), "domain": ""}, r"vocabulary\.domain is empty"),
    ],
)
def test_impossible_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        VocabularySettings(**wrong)


@pytest.mark.parametrize("name", ["lexicon", "class_names", "vllm", "openai"])
def test_configuration_files(name, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    path = ROOT / f"conf/vocabulary/{name}.yaml"
    merged = OmegaConf.merge(OmegaConf.structured(VocabularySettings), OmegaConf.load(path))
    found = OmegaConf.to_object(merged)
    assert isinstance(found, VocabularySettings)
    assert (found.llm.protocol if found.asks else found.source) == name
    assert path.read_text().startswith("# axonym sweep vocabulary=" + name)


def test_identity_changes_with_what_the_settings_name(tmp_path):
    words, model = tmp_path / "words.txt", tmp_path / "model"
    words.write_text("dog\ncat\n")
    model.mkdir()
    (model / "config.json").write_text("{}")
    lists, llm = VocabularySettings(path=str(words)), replace(LLM, llm=LlmSettings(model=str(model)))
    first = [
        identity(lists),
        identity(llm, ["hen"]),
        identity(VocabularySettings(source="class_names"), ["hen", "egg"]),
    ]
    assert first[0] == identity(lists, ["ignored"])
    assert len({json.dumps(found) for found in first}) == 3
    words.write_text("dog\ncow\n")
    (model / "config.json").write_text("[]")
    assert identity(lists)["file"] != first[0]["file"]
    assert identity(llm, ["hen"])["model"] != first[1]["model"]
    assert identity(llm, ["cock"])["prompts"] != first[1]["prompts"]
    assert identity(LLM)["model"] == "some/model"
    assert "found" not in identity(LLM)
    with pytest.raises(ValueError, match=r"vocabulary\.path="):
        identity(VocabularySettings(path="no/such/file.txt"))


# The worker


def test_worker_is_repeatable(tmp_path):
    for folder in ("a", "b"):
        report = worker(tmp_path / folder, VocabularySettings()).run(0)
    files = [sorted((tmp_path / folder).rglob("*.parquet")) for folder in ("a", "b")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    phrases = worker(tmp_path / "a", VocabularySettings()).job.out.read("phrases", 0)
    assert phrases.num_rows == report.rows["phrases"]
    for column in ("prompt_id", "llm"):
        assert phrases[column].null_count == phrases.num_rows


def answers_folder(path: Path, said: list[str]) -> Folder:
    """Answers to one prompt about parts and others about a hen, as the stage answers writes them."""
    out = Folder(StoreSettings(str(path)), "answers", "f", ("answers",))
    columns = {
        "prompt_id": [f"p{n}" for n in range(len(said))],
        "family": ["part"] + [None] * (len(said) - 1),
        "sources": [["p0"]] + [["hen"]] * (len(said) - 1),
        "prompt": ["?"] * len(said),
        "answer": said,
        "input_tokens": [5] * len(said),
        "tokens": [9] * len(said),
        "status": [parse_answer(text)[1] for text in said],
    }
    out.write(0, {"answers": make_table("answers", columns)})
    return out


def test_worker_reads_answers(tmp_path):
    said = ['{"concepts":["red comb","Beak","a beak"]}', '{"concepts":["beak","<b>", "the sm', "I cannot help"]
    made = worker(tmp_path, replace(LLM, llm=LlmSettings(model="some/model", max_skipped=0.5)), ("hen",))
    made.job.answers = answers_folder(tmp_path, said)
    assert made.run(0).skipped == {"duplicate": 2, "markup or path": 1}
    rows = {row["concept"]: row for row in made.job.out.read("phrases", 0).to_pylist()}
    assert list(rows) == ["hen", "red comb", "beak"]
    assert (rows["hen"]["is_class"], rows["hen"]["llm"]) == (True, None)
    assert rows["beak"] | {"concept_id": 0} == {
        "concept_id": 0,
        "concept": "beak",
        "family": "part",
        "sources": ["p0", "hen"],
        "prompt_id": "p0",
        "llm": "some/model",
        "is_class": False,
    }
    made.job.settings.llm.max_skipped = 0.3
    with pytest.raises(ValueError, match=r"max_skipped=0\.3: 1 of 3 answers are malformed; .*'I cannot help'"):
        made.run(0)
    made.job.alone = True  # a round of refinement may lose what it asked
    assert made.run(0).rows == {"phrases": 2}


def test_worker_takes_class_names(tmp_path):
    made = worker(tmp_path, VocabularySettings(source="class_names"), ("tench, Tinca tinca", "hen", "hen"))
    assert made.run(0).skipped == {"duplicate": 1}
    assert made.job.out.read("phrases", 0)["concept"].to_pylist() == ["tench", "hen"]


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"vocabulary\.source=class_names: 1 concepts found, .*\(left out: duplicate: 1\)"
    ):
        worker(tmp_path, VocabularySettings(source="class_names"), ("hen", "Hen")).run(0)
    (tmp_path / "places.txt").write_text("/a/airfield 0\n/a/alley 1\n")
    settings = VocabularySettings(path=str(tmp_path / "places.txt"))
    for refuses in (lambda: identity(settings), lambda: worker(tmp_path, settings).run(0)):
        with pytest.raises(ValueError, match=r"vocabulary\.path=.*left out: markup or path: 2"):
            refuses()
    assert not list(tmp_path.rglob("*.parquet"))
