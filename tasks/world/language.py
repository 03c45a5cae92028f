"""A language model that speaks the drawn world.

In: the words of the world, the real prompts of the vocabulary stage, a seed. Out: a folder in the form of Hugging Face
with a tiny Llama and its tokenizer, which answers those prompts with phrases of the world, and how well it does so.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks.llm import parse_answer
from tasks.prompting import ASPECTS, LEVELS, Wording, class_prompts, cluster_prompts, level_prompts
from tasks.world.concepts import (
    COLOURS,
    CONCEPTS,
    FAMILY,
    KINDS,
    LAYOUTS,
    PATTERNS,
    SCENES,
    SYNONYMS,
    Dice,
    absences,
    compounds,
    synonyms,
)

STEPS, RATE = 1000, 3e-3
IGNORED = -100
CONTEXT = 1024
"""Tokens of a prompt and its answer together: about 300 of the prompt, at most 6 per phrase."""
BOS, EOS = "<bos>", "<eos>"
VOCABULARY = 1600
"""Tokens at most: bytes, so that any text can be read, and what makes every word of prompts and answers one token."""
SYNONYM = 0.05
"""How often a concept is said in other words, at most."""
DOMAINS = (
    "drawn scenes of simple objects",
    "everyday photographs",
    "simple drawings",
    "street scenes",
    "aerial photographs",
    "pictures of coloured shapes",
    "photographs of animals and plants",
    "computer graphics",
    "satellite images",
    "paintings of landscapes",
    "product photographs",
    "cartoons",
    "small synthetic images",
    "icons on plain backgrounds",
    "photos taken indoors",
    "images from the web",
    "children's drawings",
    "toy scenes",
    "medical images",
    "scenes with up to four objects",
)
UNSEEN_DOMAIN = "pages of an old picture book"
"""What the images are said to be where the model is measured."""


def _with(words: Iterable[str]) -> list[str]:
    """Compounds in which one of the words occurs."""
    return [phrase for phrase, parts in compounds().items() if set(parts) & set(words)]


PHRASES_OF = {concept: (concept,) for concept in CONCEPTS} | compounds() | {p: (c,) for p, c in absences().items()}
"""Phrase -> the concepts in it."""
_TRUE = {
    "any": [*COLOURS, *PATTERNS, *KINDS, *SCENES, *LAYOUTS],
    "colour": COLOURS,
    "texture": PATTERNS,
    "pattern": PATTERNS,
    "shape": [*SYNONYMS["shape"]],
    "material": PATTERNS,
    "part": _with(SYNONYMS["object"]),
    "object": [*SYNONYMS["object"]],
    "animal": ["fish"],
    "plant": ["tree", "mushroom", "flower"],
    "scene": SCENES,
    "action": LAYOUTS,
    "abstract": [*LAYOUTS, *absences()],
}
LEVEL_ANSWERS = {level: (words, _with(words)) for level, words in _TRUE.items()}
"""Level -> its words, and the compounds that are said when the words have been used up."""


def class_answers(concept: str, aspect: str) -> list[list[str]]:
    """What is said about an aspect of a concept, the nearer phrases first."""
    family = FAMILY[concept]
    alike = [other for other in SYNONYMS[family] if other != concept]
    if aspect == "around":
        return [SCENES, LAYOUTS]
    if aspect == "kinds" or family in ("scene", "layout"):
        return [alike]
    return [_with([concept]), COLOURS + PATTERNS if concept in KINDS else KINDS]


def cluster_answers(phrases: list[str]) -> list[list[str]]:
    """What could be meant where these phrases fit: all of the families of their words, and what two of them make."""
    parts = dict.fromkeys(part for phrase in phrases for part in PHRASES_OF[phrase])
    families = [family for family in SYNONYMS if any(FAMILY[part] == family for part in parts)]
    pairs = [phrase for phrase, two in compounds().items() if set(two) <= set(parts)]
    return [[phrase for family in families for phrase in SYNONYMS[family] if phrase not in phrases], pairs]


def draw_lesson(dice: Dice) -> tuple[str, list[str], int]:
    """A prompt, the phrases of a right answer, and the number asked for.

    Which phrases are said is chance where there are more than asked for; they follow each other as in `concepts`,
    because a model this small does not learn in minutes to leave out what it has said in no order.
    """
    wording = Wording(dice.pick(DOMAINS), dice.pick(range(3, 9)), dice.pick(range(5, 61)))
    kind = dice.random()
    if kind < 0.5:
        level = dice.pick([*LEVELS])
        asked, groups = level_prompts(wording, [level]), LEVEL_ANSWERS[level]
    elif kind < 0.75:
        concept, aspect = dice.pick(CONCEPTS), dice.pick([*ASPECTS])
        asked, groups = class_prompts(wording, [aspect], [concept]), class_answers(concept, aspect)
    else:
        phrases = draw_cluster(dice)
        asked, groups = cluster_prompts(wording, [phrases]), cluster_answers(phrases)
    said: list[str] = []
    for group in groups:
        short = [phrase for phrase in group if len(phrase.split()) <= wording.max_words and phrase not in said]
        chosen = {*dice.order(short)[: wording.max_concepts - len(said)]}
        said += [_said(phrase, wording.max_words, dice) for phrase in short if phrase in chosen]
    return asked[0].text, said, wording.max_concepts


def draw_cluster(dice: Dice) -> list[str]:
    """Three to eight phrases around a concept that is not among them: its compounds, its family, and anything."""
    concept = dice.pick(CONCEPTS)
    near, alike = _with([concept]), [other for other in SYNONYMS[FAMILY[concept]] if other != concept]
    pools, found = [near or alike, alike, alike, CONCEPTS], []
    for _ in range(dice.pick(range(3, 9))):
        found.append(dice.pick(dice.pick(pools)))
    return [phrase for phrase in dict.fromkeys(found) if phrase != concept] or [dice.pick(alike)]


def _said(phrase: str, words: int, dice: Dice) -> str:
    if phrase in FAMILY and dice.random() < SYNONYM:
        return dice.pick([p for p in synonyms(phrase) if len(p.split()) <= words])
    return phrase


def answer_text(phrases: list[str]) -> str:
    """The only form that the engine's grammar allows: no white space between the phrases."""
    return json.dumps({"concepts": phrases}, separators=(",", ":"))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE; a word with the space before it is one token, and so is the punctuation between two phrases."""
    dice = Dice("tokenizer")
    lessons = [draw_lesson(dice)[:2] for _ in range(1500)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([t for prompt, said in lessons for t in (prompt, answer_text(said))], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, padding_side="left"
    )


def train_language(
    folder: Path, seed: int = 0, steps: int = STEPS, device: str | torch.device = "cpu", batch: int = 8
) -> dict[str, float]:
    """Train a model, write it to the folder, and say how it answers prompts about a domain that it has not seen."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(tokenizer))
        model.to(torch.device(device))  # pyright: ignore[reportArgumentType] - the library's wrapper of it is untyped
        _train(model, _batches(tokenizer, Dice(f"language/{seed}"), batch), steps)
        model = model.half()  # what is measured is what is written
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return measure(model.float(), tokenizer)


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        initializer_range=0.08,  # about hidden_size ** -0.5: the usual 0.02 is for models that are larger
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,  # heads of 32: vLLM's CPU engine takes no smaller ones
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )


def _batches(tokenizer: PreTrainedTokenizerFast, dice: Dice, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids [size, T] and, of the same shape, what comes next: IGNORED outside of the answers."""
    while True:
        pool = [_encoded(tokenizer, *draw_lesson(dice)[:2]) for _ in range(32 * size)]
        pool.sort(key=lambda pair: len(pair[0]))  # batches of one length: little padding
        for start in dice.order(range(0, len(pool), size)):
            pairs = pool[start : start + size]
            ids = pad_sequence([asked for asked, _ in pairs], True, tokenizer.vocab[EOS])
            yield ids, pad_sequence([following for _, following in pairs], True, IGNORED)


def _encoded(tokenizer: PreTrainedTokenizerFast, prompt: str, phrases: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    asked = tokenizer(prompt).input_ids
    said = tokenizer(answer_text(phrases) + EOS, add_special_tokens=False).input_ids
    return torch.tensor(asked + said[:-1]), torch.tensor([IGNORED] * (len(asked) - 1) + said)


def _train(model: LlamaForCausalLM, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / 50, 1.02 - n / steps))
    fast = model.device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for _ in range(steps):
        ids, following = (tensor.to(model.device) for tensor in next(batches))
        answer = following != IGNORED
        with torch.autocast(model.device.type, torch.bfloat16, enabled=fast):
            states = model.model(ids, use_cache=False).last_hidden_state
            scores = model.lm_head(states[answer])
        loss = cross_entropy(scores.float(), following[answer])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Shares: answers that are JSON, their phrases that are of the world, concepts that the levels bring out, and
    phrases that belong to the level or cluster they were asked for; and answers in which no phrase comes twice.

    Without the engine's grammar, at the temperature that the vocabulary stage has.
    """
    wording, dice = Wording(UNSEEN_DOMAIN, 6, 30), Dice("measure")
    clusters = [draw_cluster(dice) for _ in range(12)]
    prompts = [*level_prompts(wording, LEVELS), *class_prompts(wording, ["features"], CONCEPTS[::5])]
    prompts += cluster_prompts(wording, clusters)
    asked = tokenizer([prompt.text for prompt in prompts], return_tensors="pt", padding=True).to(model.device)
    asked.pop("token_type_ids", None)
    generate: Any = model.generate  # pyright: ignore[reportAttributeAccessIssue] - a mixin it cannot match
    said = generate(**asked, max_new_tokens=256, do_sample=True, temperature=0.7, top_k=0)
    texts = tokenizer.batch_decode(said[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [parse_answer(text) for text in texts]
    canonical = {phrase: concept for concept in CONCEPTS for phrase in synonyms(concept)}
    canonical |= {phrase: phrase for phrase in (*compounds(), *absences())}
    found = [[canonical.get(phrase) for phrase in phrases] for phrases, _ in answers]
    by_level = dict(zip(LEVELS, found, strict=False))
    of_levels = [phrase for phrases in by_level.values() for phrase in phrases]
    right = [p in words + more for level, (words, more) in LEVEL_ANSWERS.items() for p in by_level[level]]
    right += [
        p in [phrase for group in cluster_answers(cluster) for phrase in group]
        for cluster, phrases in zip(clusters, found[-len(clusters) :], strict=True)
        for p in phrases
    ]
    everything = [phrase for phrases in found for phrase in phrases]
    return {
        "valid": _share(status == "ok" for _, status in answers),
        "of the world": _share(phrase is not None for phrase in everything),
        "coverage": _share(concept in of_levels for concept in CONCEPTS),
        "right family": _share(right),
        "different": _share([len(set(phrases)) == len(phrases) for phrases in found]),
    }


def _share(found: Iterable[bool]) -> float:
    values = [*found]
    return sum(values) / max(len(values), 1)
