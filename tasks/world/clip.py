"""The world's CLIP: a small image-text model in open_clip's own format.

In: a folder, a seed. Out: open_clip_config.json, open_clip_model.safetensors and tokenizer.json there, and what it can
do on scenes that it has not seen.

It learns from three things at once. Short phrases: the truth of every phrase is known for every scene and crop, so each
pair of an image and a phrase is right or wrong (a sigmoid loss with exact labels, after SigLIP, Zhai et al. 2023).
Full captions: each against all others of the batch (the loss of CLIP, Radford et al. 2021). And what is
where in a scene, by two heads that are thrown away.
"""

import json
import logging
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from tasks.world.concepts import (
    COLOURS,
    CONCEPTS,
    FAMILY,
    KINDS,
    LAYOUTS,
    NUMBER,
    PATTERNS,
    PLAIN,
    SCENES,
    SYNONYMS,
    Dice,
    absences,
    held_out,
    synonyms,
)
from tasks.world.planting import Planted, Teacher, balanced
from tasks.world.scenes import SIZE, Wish, sample
from tasks.world.training import Recipe, Scenes, to_input, train
from tasks.world.truth import (
    PHRASES,
    UNSURE,
    YES,
    Album,
    album,
    caption,
    concepts_seen,
    phrases_seen,
    random_boxes,
    stream,
)

INPUT = 64
"""Pixels of the model's input."""
RECIPE = Recipe(steps=2200, batch=192, rate=2e-3, reuse=4)
TEMPLATES = ("{}", "{}", "{}", "a picture of {}", "a scene with {}", "a photo of a {}")
CONTEXT = 48
"""Tokens of the longest caption: four objects, three relations, the background."""
BANK = 128
"""Phrases in one step."""
LAYOUT = 3.0
"""Weight of layouts in the loss on phrases: they are learned last."""
EXCLUSIVE = [[NUMBER[c] for c in family] for family in (COLOURS, KINDS, PATTERNS, SCENES)]
"""Places of concepts, in a step's phrases too, of which an object or a scene has one."""
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 256,
        "init_logit_bias": -3.0,
        "init_logit_scale": 2.7,
        "custom_text": True,
        "vision_cfg": {"layers": [1, 1, 2, 1], "width": 24, "image_size": INPUT, "head_width": 32},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": 0,
            "hf_tokenizer_name": ".",
            "width": 128,
            "heads": 4,
            "layers": 2,
        },
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    },
}


def words() -> list[str]:
    """All words of captions, phrases and templates, and the single letters that stand for unknown ones."""
    texts = [*PHRASES, *chain.from_iterable(synonyms(c) for c in CONCEPTS), *TEMPLATES, PLAIN]
    texts += ["nothing large small a an part of with object on left right above below"]
    return sorted({word for text in texts for word in text.replace("{}", "").split()})


def write_tokenizer(folder: Path) -> int:
    """A word-level tokenizer as Hugging Face reads it; returns the number of its tokens. The last token ends a text,
    because open_clip reads a text's vector where its largest token stands."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[BOS]", *words(), "[EOS]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    ends = [("[BOS]", 2), ("[EOS]", len(vocabulary) - 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)  # pyright: ignore[reportAttributeAccessIssue]
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return len(vocabulary)


def train_clip(
    folder: Path, seed: int, device: torch.device, recipe: Recipe = RECIPE, count: int = 1000
) -> dict[str, float]:
    """Train, write, read back as any user of open_clip does, and measure. Returns hold-out figures by name."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(CONFIG))
    config["model_cfg"]["text_cfg"]["vocab_size"] = write_tokenizer(folder)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    torch.manual_seed(seed)
    logging.disable(logging.WARNING)  # that the folder has no weights yet
    model: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False).to(device)
    logging.disable(logging.NOTSET)
    # Places as large as the features: the usual small random start was lost beside them.
    nn.init.normal_(model.visual.attnpool.positional_embedding, std=0.5)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    lesson = Lesson(model, tokenizer, seed, device, recipe)
    train(nn.ModuleList([model, lesson.head, lesson.layouts]), lesson.loss, recipe, device, "clip")
    model.eval()
    save_file({k: t.half().cpu().contiguous() for k, t in model.state_dict().items()}, folder / WEIGHTS)
    return measure(folder, device, count)


WEIGHTS = "open_clip_model.safetensors"


class Lesson:
    """One step's images and texts, and the loss on them."""

    def __init__(self, model, tokenizer, seed: int, device: torch.device, recipe: Recipe) -> None:
        self.model, self.device = model, device
        self.scenes, self.rng, self.dice = Scenes(f"{seed}/clip", recipe), np.random.default_rng(seed), Dice(seed)
        self.phrases = list(PHRASES)
        self.forms = {p: _forms(p) for p in self.phrases}
        self.always = [self.phrases.index(p) for p in (*CONCEPTS, *absences())]  # single concepts first: EXCLUSIVE
        self.others = [i for i in range(len(self.phrases)) if i not in self.always]
        self.weights = torch.tensor([LAYOUT if FAMILY.get(p) == "layout" else 1.0 for p in self.phrases], device=device)
        self.tokenizer = tokenizer
        # A head that says what is where, for the training alone: outlines are learned where they are.
        self.head = nn.Conv2d(model.visual.layer3[-1].conv3.out_channels, len(CONCEPTS), 1).to(device)
        self.teacher = Teacher([Planted("", i, "mono", (c,)) for i, c in enumerate(CONCEPTS)], INPUT // 16, 0, device)
        model.visual.layer3.register_forward_hook(self._keep)
        # Another for layouts: as long as neither images nor texts tell corners apart, neither learns it from the other.
        self.layouts = nn.Linear(CONFIG["model_cfg"]["embed_dim"], len(LAYOUTS)).to(device)
        self.layout_places = [CONCEPTS.index(c) for c in LAYOUTS]  # in a step's phrases

    def _keep(self, _module: nn.Module, _given: Any, output: torch.Tensor) -> None:
        self.features = output

    def texts(self, texts: list[str]) -> torch.Tensor:
        """Unit-norm [texts, D]. No step pays for padding that no text needs: the causal mask is cut with the tokens."""
        tokens, text = self.tokenizer(texts), self.model.text
        longest, mask = int((tokens != 0).sum(1).max()), text.attn_mask
        text.attn_mask = mask[:longest, :longest]
        vectors = self.model.encode_text(tokens[:, :longest].to(self.device), normalize=True)
        text.attn_mask = mask
        return vectors

    def loss(self, step: int) -> torch.Tensor:
        found, images = self.scenes.batch()
        half = len(images) // 2
        boxes = random_boxes(self.rng, len(images))
        whole, cut = images[:half], images[half:]
        crops = [
            to_input(found.pixels[n, y0:y1, x0:x1][None], self.device, INPUT)
            for n, (x0, y0, x1, y1) in zip(cut, boxes[half:], strict=True)
        ]
        pixels = torch.cat([to_input(found.pixels[whole], self.device, INPUT), *crops]).contiguous(
            memory_format=torch.channels_last
        )
        chosen = [*self.always, *self.rng.choice(self.others, BANK - len(self.always), replace=False)]
        phrases = [self.phrases[i] for i in chosen]
        truth = np.concatenate([phrases_seen(found, phrases, whole), phrases_seen(found, phrases, cut, boxes[half:])])
        texts = [self.dice.pick(TEMPLATES).format(self.dice.pick(self.forms[p])) for p in phrases]
        captions = [caption(found, n) for n in whole]
        captions += [caption(found, n, box) for n, box in zip(cut, boxes[half:], strict=True)]
        scale = self.model.logit_scale.exp()
        image_BD = self.model.encode_image(pixels, normalize=True)
        phrase_PD = self.texts(texts)
        caption_BD = self.texts(captions)
        logits_BP = scale * image_BD @ phrase_PD.T + self.model.logit_bias
        truth_BP = torch.from_numpy(truth).to(self.device)
        value = _truth_loss(logits_BP, truth_BP, self.weights[chosen]) + 0.3 * _pair_loss(
            scale * image_BD @ caption_BD.T, captions
        )
        value = value + 0.2 * self.teacher.loss(
            self.head(self.features[:half]).flatten(2), self.teacher.batch(found, whole)
        )
        value = value + 0.2 * balanced(self.layouts(10 * image_BD[:half].float()), truth_BP[:half, self.layout_places])
        return value + 0.2 * sum(_choice_loss(logits_BP[:, f], truth_BP[:, f]) for f in EXCLUSIVE)


def _forms(phrase: str) -> list[str]:
    """The phrase, most of the time, and what else means the same."""
    if phrase not in FAMILY:
        return [phrase]
    return [phrase] * 6 + list(synonyms(phrase)[1:])


def _truth_loss(logits_BP: torch.Tensor, truth_BP: torch.Tensor, weights_P: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy where the truth is known; what is true counts more where it is rare."""
    known, true = truth_BP != UNSURE, truth_BP == YES
    share_P = true.sum(0) / known.sum(0).clamp(min=1)
    lift_P = ((1 - share_P) / share_P.clamp(min=1e-3)).sqrt().clamp(1, 8)
    weight = known * torch.where(true, lift_P, 1.0) * weights_P
    return (
        F.binary_cross_entropy_with_logits(logits_BP.float(), true.float(), reduction="none") * weight
    ).sum() / weight.sum()


def _choice_loss(logits_BF: torch.Tensor, truth_BF: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the concepts of a family where exactly one of them can be seen."""
    one = ((truth_BF == YES).sum(1) == 1) & (truth_BF != UNSURE).all(1)
    return F.cross_entropy(logits_BF[one].float(), (truth_BF[one] == YES).byte().argmax(1))


def _pair_loss(logits_BB: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Cross-entropy both ways; images with one and the same caption do not count against each other."""
    number = {text: i for i, text in enumerate(dict.fromkeys(captions))}
    same = torch.tensor([number[text] for text in captions], device=logits_BB.device)
    twin = (same[:, None] == same) & ~torch.eye(len(same), dtype=torch.bool, device=logits_BB.device)
    logits, target = 2 * logits_BB.float().masked_fill(twin, -1e4), torch.arange(len(same), device=logits_BB.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# --- what it can do


def measure(folder: Path, device: torch.device, count: int) -> dict[str, float]:
    """Caption retrieval among `count` scenes and crops; zero-shot accuracy by family, on the unseen pairs too."""
    import open_clip

    model: Any = open_clip.create_model(f"local-dir:{folder}").to(device).eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    found = stream("clip/hold-out", 0, count)
    boxes = random_boxes(np.random.default_rng(0), count)
    figures = {}
    with torch.inference_mode():
        for name, box in (("scenes", None), ("crops", boxes)):
            captions = [caption(found, n, None if box is None else box[n]) for n in range(count)]
            images = _images(model, found, np.arange(count), box, device)
            texts = F.normalize(
                torch.cat(
                    [model.encode_text(tokenizer(captions[i : i + 100]).to(device)) for i in range(0, count, 100)]
                ),
                dim=1,
            )
            best = (images @ texts.T).argmax(1).tolist()
            figures[f"retrieval R@1 {name}"] = float(np.mean([captions[i] == captions[b] for i, b in enumerate(best)]))
            for family in SYNONYMS:
                if name == "crops" and family == "layout":
                    continue
                figures[f"mean average precision {family} {name}"] = _ranking(
                    model, tokenizer, found, images, family, box, device
                )
        for name, pairs in (("", None), (" unseen pairs", sorted(held_out()))):
            lone = _alone(count, pairs)
            for form, box in (("scenes", None), ("crops", _around(lone))):
                images = _images(model, lone, np.arange(len(lone)), box, device)
                for family in ("colour", "shape", "object", "pattern", "scene"):
                    figures[f"zero-shot {family} {form}{name}"] = _zero_shot(
                        model, tokenizer, lone, images, family, box, device
                    )
    return figures


def _images(model, found: Album, numbers: np.ndarray, boxes: np.ndarray | None, device: torch.device) -> torch.Tensor:
    vectors = []
    for start in range(0, len(numbers), 100):
        part = numbers[start : start + 100]
        if boxes is None:
            pixels = to_input(found.pixels[part], device, INPUT)
        else:
            pixels = torch.cat(
                [
                    to_input(found.pixels[n, y0:y1, x0:x1][None], device, INPUT)
                    for n, (x0, y0, x1, y1) in zip(part, boxes[start : start + 100], strict=True)
                ]
            )
        vectors.append(model.encode_image(pixels, normalize=True))
    return torch.cat(vectors)


def _alone(count: int, pairs: list[tuple[str, str]] | None) -> Album:
    """Scenes with one object, of the given pairs of a colour or a pattern and a kind, or of any seen in training."""
    scenes = []
    for n in range(count):
        wish = Wish(count=1, size="large" if n % 2 else "medium")
        if pairs:
            word, wish.kind = pairs[n % len(pairs)]
            wish.colour, wish.pattern = (word, None) if FAMILY[word] == "colour" else (None, word)
        scenes.append(sample("clip/alone", n, unseen=pairs is not None, wish=wish))
    return album(scenes)


def _around(lone: Album) -> np.ndarray:
    """Half-sized squares around the object of each scene, moved into the scene."""
    side = SIZE // 2
    corner = np.array([[scene.things[0].x, scene.things[0].y] for scene in lone.scenes]) - side / 2
    corner = np.clip(np.rint(corner), 0, SIZE - side).astype(int)
    return np.concatenate([corner, corner + side], 1)


def _zero_shot(model, tokenizer, found: Album, images, family: str, boxes, device) -> float:
    """Share of images whose most similar concept of the family is the true one; images without one are left out."""
    options = list(SYNONYMS[family])
    texts = F.normalize(model.encode_text(tokenizer(options).to(device)), dim=1)
    truth = concepts_seen(found, np.arange(len(found)), boxes)[:, [CONCEPTS.index(o) for o in options]] == YES
    has = truth.any(1)
    best = (images @ texts.T).argmax(1).cpu().numpy()
    return float(truth[has, best[has]].mean())


def _ranking(model, tokenizer, found: Album, images, family: str, boxes, device) -> float:
    """Mean over the family's concepts of the average precision of ranking all images by similarity."""
    options = list(SYNONYMS[family])
    texts = F.normalize(model.encode_text(tokenizer(options).to(device)), dim=1)
    truth = concepts_seen(found, np.arange(len(found)), boxes)[:, [CONCEPTS.index(o) for o in options]]
    similarity = (images @ texts.T).cpu().numpy()
    return float(np.mean([average_precision(similarity[:, c], truth[:, c]) for c in range(len(options))]))


def average_precision(score: np.ndarray, truth: np.ndarray) -> float:
    """Mean precision at each true one, best score first; UNSURE ones are left out."""
    order = np.argsort(-score[truth != UNSURE], kind="stable")
    hit = (truth[truth != UNSURE] == YES)[order]
    return float((np.cumsum(hit) / np.arange(1, len(hit) + 1))[hit].mean()) if hit.any() else 1.0
