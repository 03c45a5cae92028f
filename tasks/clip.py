"""CLIP by open_clip: any name with a pretrained tag, or a local folder in open_clip's own format.

In: ClipSettings. Out: unit-norm float16 vectors of images and texts, every model call with one fixed batch shape.
"""

import difflib
import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from tasks.pixels import Preprocess
from tasks.store import fingerprint

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class ClipSettings:
    key: ClassVar[str] = "clip"
    """Where it stands in the config, for messages."""
    name: str = "ViT-B-32"
    """open_clip model name, or a local folder with open_clip_config.json and open_clip_model.safetensors."""
    pretrained: str | None = "laion2b_s34b_b79k"
    """Tag of open_clip's weights, or a file; not used for a folder."""
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}"])
    """Texts with one hole; the embedding of a concept is the normalised mean over them."""
    dtype: str = "float32"
    """In which the products of an image's encoding are made; float16 is several times as fast on a GPU."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.key}.dtype={self.dtype}: allowed are {', '.join(DTYPES)}")
        if not self.name:
            raise ValueError(f"{self.key}.name is missing: give an open_clip model name or a folder")
        bad = [t for t in self.templates if t.count("{}") != 1]
        if bad or not self.templates:
            raise ValueError(f"{self.key}.templates={bad or self.templates}: each template needs exactly one {{}}")

    @property
    def is_folder(self) -> bool:
        return os.path.isdir(self.name)

    @property
    def title(self) -> str:
        """Name for people: of a folder only the last part."""
        return self.name.rstrip("/").rsplit("/", 1)[-1]

    def load(self) -> "LoadedClip":
        """As load_clip_model; axonym bench has a tower of its own."""
        return load_clip_model(self, self.key)


class JudgeSettings(ClipSettings):
    """A second CLIP, which judges the names that the first one made."""

    key: ClassVar[str] = "judge"


@dataclass
class LoadedClip:
    model: Any
    preprocess: Preprocess
    tokenizer: Any
    context_length: int
    """Tokens to which a text is padded."""


def load_clip_model(
    settings: ClipSettings,
    key: str = "clip",
    check_pretrained: bool = True,
    weights: bool = True,
    device: str = "cpu",
) -> LoadedClip:
    """Model, preprocessing and tokenizer on the device, float32. Raises ValueError naming `key` where it cannot be had.

    Without `weights` none are read or downloaded, and there is no tokenizer: the numbers are random.

    open_clip 3.3 does not resolve the Hugging Face text tower of a local folder against that folder, so we hand it
    the folder. No Python file of the folder is executed: transformers does so only with trust_remote_code.
    """
    import open_clip

    config: dict[str, Any] = {}
    if settings.is_folder:
        folder, options = os.path.abspath(settings.name), {}
        config = _folder_config(folder, key, weights)
        if "hf_model_name" in config["model_cfg"].get("text_cfg", {}):
            options["text_cfg"] = config["model_cfg"]["text_cfg"] | {
                "hf_model_name": folder,
                "hf_tokenizer_name": folder,
            }
        name, pretrained = f"local-dir:{folder}", None
    else:
        name, pretrained, options = settings.name, settings.pretrained, {}
        _check_name(name, pretrained, key, check_pretrained)
    known = config.get("model_cfg") or ({} if ":" in name else open_clip.get_model_config(name)) or {}
    length = int(known.get("text_cfg", {}).get("context_length", 77))
    bare = {} if weights else {"load_weights": False, "pretrained_text": False}
    try:
        model = open_clip.create_model(name, pretrained if weights else None, device=device, **bare, **options)
        tokenizer = open_clip.get_tokenizer(name) if weights else None
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{key}.name={settings.name} {key}.pretrained={pretrained}: cannot be loaded: {reason}"
        ) from None
    own = open_clip.get_model_preprocess_cfg(model)
    size = own["size"] if isinstance(own["size"], tuple | list) else (own["size"], own["size"])
    resize = {"shortest": "cover", "longest": "contain", "squash": "squash"}[own.get("resize_mode", "shortest")]
    preprocess = Preprocess(
        tuple(size), tuple(size), resize, own["interpolation"], tuple(own["mean"]), tuple(own["std"])
    )
    return LoadedClip(model.eval().requires_grad_(False), preprocess, tokenizer, length)


def _folder_config(folder: str, key: str, weights: bool = True) -> dict:
    try:
        with open(f"{folder}/open_clip_config.json") as file:
            config = json.load(file)
        assert isinstance(config["model_cfg"], dict)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise ValueError(f"{key}.name={folder}: not an open_clip folder: {error}") from None
    # Where there are none, open_clip takes random ones.
    if weights and not any(name.endswith((".safetensors", ".bin", ".pth")) for name in os.listdir(folder)):
        raise ValueError(f"{key}.name={folder}: no weights there, such as open_clip_model.safetensors")
    return config


def _check_name(name: str, pretrained: str | None, key: str, check_pretrained: bool) -> None:
    import open_clip

    if "/" in name and ":" not in name:
        raise ValueError(f"{key}.name={name}: no such folder")
    if name.startswith("hf-hub:"):
        return
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=6, cutoff=0.3) or open_clip.list_models()[:6]
        raise ValueError(
            f"{key}.name={name}: unknown; allowed are a local folder or open_clip's models, such as {', '.join(near)}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if check_pretrained and pretrained not in tags and not os.path.isfile(pretrained or ""):
        raise ValueError(f"{key}.pretrained={pretrained}: unknown for {name}; allowed are a file, {', '.join(tags)}")


def check_clip(settings: ClipSettings) -> None:
    """Raise ValueError, without loading anything, where the CLIP named cannot exist."""
    if settings.is_folder:
        _folder_config(settings.name, settings.key)
    else:
        _check_name(settings.name, settings.pretrained, settings.key, True)


def clip_identity(settings: ClipSettings) -> str:
    """What the fingerprint holds of the CLIP: for local files the hash of every byte. Raises as check_clip."""
    check_clip(settings)
    dtype = "" if settings.dtype == "float32" else f" {settings.dtype}"
    if not settings.is_folder:
        weights = settings.pretrained or ""
        return f"{settings.name} {_hash(weights) if os.path.isfile(weights) else weights}{dtype}"
    files = [name for name in sorted(os.listdir(settings.name)) if os.path.isfile(f"{settings.name}/{name}")]
    return fingerprint({name: _hash(f"{settings.name}/{name}") for name in files}) + dtype


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Clip:
    """CLIP on the worker's device; vectors come back as float16 of norm 1."""

    def __init__(self, settings: ClipSettings, device: torch.device, batch_size: int) -> None:
        loaded = settings.load()
        self.settings, self.device, self.batch_size = settings, device, batch_size
        self.model = loaded.model.to(device)
        self.preprocess, self.tokenizer = loaded.preprocess, loaded.tokenizer

    def images(self, pixels_BHWC: torch.Tensor) -> np.ndarray:
        """uint8 [batch_size, H, W, 3] -> float16 [batch_size, D]."""
        return self.vectors(pixels_BHWC).cpu().numpy()

    @torch.inference_mode()
    def vectors(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """The same on the device, which nobody waits for."""
        assert len(pixels_BHWC) == self.batch_size, "every call has one batch shape"
        x_BCHW = self.preprocess.normalise(pixels_BHWC.to(self.device, non_blocking=True))
        return F.normalize(self.encode(x_BCHW).float(), dim=-1).half()

    def encode(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """encode_image in the number format of the settings; weights and what adds up stay float32."""
        dtype = DTYPES[self.settings.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.model.encode_image(x_BCHW)

    @torch.inference_mode()
    def concepts(self, concepts: list[str]) -> np.ndarray:
        """Concepts -> float16 [len(concepts), D], the normalised mean over the templates.

        Tokens are padded to the context length, so that a text's vector does not depend on its neighbours.
        """
        total = 0.0
        for template in self.settings.templates:
            total = total + self._texts([template.replace("{}", concept) for concept in concepts])
        return F.normalize(torch.as_tensor(total), dim=-1).half().numpy()

    def _texts(self, texts: list[str]) -> torch.Tensor:
        found = []
        for start in range(0, len(texts), self.batch_size):
            batch = texts[start : start + self.batch_size]
            tokens = self.tokenizer(batch + [""] * (self.batch_size - len(batch))).to(self.device)
            found.append(F.normalize(self.model.encode_text(tokens).float(), dim=-1)[: len(batch)].cpu())
        return torch.cat(found)
