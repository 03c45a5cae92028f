"""Target models: any torch vision model by configuration alone.

In: TargetSettings. Out: a Target (model in eval mode, its own preprocessing, the names of its outputs).
Weights are read as safetensors or with weights_only=True; only a factory, which the user names as code, runs code.
"""

import difflib
import hashlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import fsspec
import numpy as np
import torch
from torch import nn

from tasks.clip import DTYPES, ClipSettings, load_clip_model
from tasks.pixels import INTERPOLATIONS, RESIZES, Preprocess


@dataclass
class TargetSettings:
    source: str = "torchvision"
    """torchvision, timm, open_clip (image tower) or factory."""
    name: str = "resnet50"
    """Model name in its library; for a factory 'file.py:function' or 'package.module:function'."""
    pretrained: Any = True
    """Whether to take the library's weights; for open_clip the pretrained tag."""
    checkpoint: str | None = None
    """File with weights for the model: safetensors, or a torch file of tensors."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model's constructor."""
    preprocess: dict[str, Any] = field(default_factory=dict)
    """Overrides of the model's own preprocessing: size, resize_to, resize, interpolation, mean, std."""
    prefix_tokens: int | None = None
    """CLS and register tokens in front of the patch tokens, where the model does not say."""
    class_names: str | None = None
    """File with one name per output (text lines or a JSON list), where the model does not say."""
    dtype: str = "auto"
    """float32, float16, bfloat16, or auto: float32 on a CPU, on a GPU the smallest that keeps the float32 top 20."""
    seed: int = 0
    """Of the random weights, where there are no others."""
    shuffled: bool = False
    """A control: the model sees another image than the one CLIP sees, so that no name can be true of its units."""

    def __post_init__(self) -> None:
        if self.source not in LOADERS:
            raise ValueError(f"target.source={self.source}: allowed are {', '.join(LOADERS)}")
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"target.dtype={self.dtype}: allowed are auto, {', '.join(DTYPES)}")
        if not self.name:
            raise ValueError("target.name is missing: give the model's name")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"target.seed={self.seed}: must lie between 0 and 2^63")
        allowed = [f.name for f in fields(Preprocess)]
        for key in self.preprocess:
            if key not in allowed:
                raise ValueError(f"target.preprocess.{key}: unknown key; allowed are {', '.join(allowed)}")
        for key, count in (("size", 2), ("resize_to", 2), ("mean", 3), ("std", 3)):
            value = self.preprocess.get(key, [1] * count)
            if not isinstance(value, list | tuple) or len(value) != count or not all(map(_is_number, value)):
                raise ValueError(f"target.preprocess.{key}={value}: must be a list of {count} numbers")
        if min(self.preprocess.get("std", [1])) <= 0:
            raise ValueError(f"target.preprocess.std={self.preprocess['std']}: must be above 0")
        if self.prefix_tokens is not None and self.prefix_tokens < 0:
            raise ValueError(f"target.prefix_tokens={self.prefix_tokens}: must be at least 0")
        for key, choices in (("resize", RESIZES), ("interpolation", INTERPOLATIONS)):
            if self.preprocess.get(key, next(iter(choices))) not in choices:
                raise ValueError(f"target.preprocess.{key}={self.preprocess[key]}: allowed are {', '.join(choices)}")

    @property
    def random(self) -> bool:
        """Whether no weights are read: they follow from the seed."""
        return not (self.pretrained or self.checkpoint)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass
class Target:
    model: nn.Module
    preprocess: Preprocess
    class_names: list[str] | None = None
    code: bytes = b""
    """Source of a factory: what its model computes is told by no name and version of a library."""
    kwargs: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Identity of architecture and weights. What a factory's file imports is not in it."""
        found = hashlib.sha256(str(self.model).encode() + self.code)
        if self.kwargs:
            found.update(json.dumps(self.kwargs, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()


def load_target(settings: TargetSettings, weights: bool = True) -> Target:
    """The model in eval mode on the CPU, float32. Raises ValueError naming the key for anything the user can mend.

    Without `weights` none are read or downloaded: the numbers are random, all else is the same.
    """
    bare = replace(settings, checkpoint=settings.checkpoint or "none")  # a checkpoint keeps a library from its weights
    if settings.source == "open_clip":
        bare = replace(settings, pretrained=False)
    with torch.random.fork_rng(devices=[]):  # models are made on the CPU; other devices' generators stay out of it
        torch.default_generator.manual_seed(settings.seed)
        target = LOADERS[settings.source](settings if weights else bare)
    target.kwargs = settings.kwargs
    if settings.checkpoint and weights:
        _load_weights(target.model, settings.checkpoint)
    pairs = {key: tuple(v) if isinstance(v, list | tuple) else v for key, v in settings.preprocess.items()}
    target.preprocess = replace(target.preprocess, **pairs)
    if settings.class_names:
        target.class_names = _read_names(settings.class_names)
    target.model.eval().float().requires_grad_(False)
    return target


def random_twin(settings: TargetSettings, preprocess: Preprocess) -> TargetSettings:
    """The same architecture with random weights, and the preprocessing that open_clip knows by its weights only."""
    seed = settings.seed + 1
    return replace(settings, pretrained=False, checkpoint=None, preprocess=asdict(preprocess), seed=seed)


def unknown(key: str, value: str, allowed: list[str]) -> ValueError:
    """One line: the value is unknown, and the allowed ones that look most like it."""
    near = difflib.get_close_matches(value, allowed, n=8, cutoff=0.4) or allowed[:8]
    return ValueError(f"{key}={value}: unknown; {len(allowed)} are allowed, among them {', '.join(near)}")


def _download(key: str, name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except TypeError as error:
        raise ValueError(f"target.kwargs: {key}={name} does not take them: {error}") from None
    except (OSError, RuntimeError) as error:  # hubs raise RuntimeError for a refused or broken download
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{key}={name}: cannot be loaded: {reason}; give the weights with target.checkpoint") from None


def _torchvision(settings: TargetSettings) -> Target:
    from torchvision import models

    if settings.name not in models.list_models(module=models):
        raise unknown("target.name", settings.name, models.list_models(module=models))
    weights = models.get_model_weights(settings.name)["DEFAULT"]
    chosen = weights if settings.pretrained and not settings.checkpoint else None
    model = _download(
        "target.name", settings.name, lambda: models.get_model(settings.name, weights=chosen, **settings.kwargs)
    )
    own = weights.transforms()
    crop, to = own.crop_size[0], own.resize_size[0]
    preprocess = Preprocess((crop, crop), (to, to), "cover", own.interpolation.value, tuple(own.mean), tuple(own.std))
    names = list(weights.meta["categories"])
    own_classes = settings.pretrained and settings.kwargs.get("num_classes", len(names)) == len(names)
    return Target(model, preprocess, names if own_classes else None)


def _timm(settings: TargetSettings) -> Target:
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.imagenet_info import ImageNetInfo

    if not timm.is_model(settings.name.split(".")[0]):
        raise unknown("target.name", settings.name, timm.list_models())
    pretrained = bool(settings.pretrained) and not settings.checkpoint
    model = _download(
        "target.name", settings.name, lambda: timm.create_model(settings.name, pretrained, **settings.kwargs)
    )
    own = resolve_model_data_config(model)
    if own["crop_mode"] == "border" and "resize" not in settings.preprocess:
        raise ValueError(
            "target.preprocess.resize is missing: the model pads its images; allowed are cover, squash, contain"
        )
    height, width = own["input_size"][1:]
    to = int(np.floor(height / own["crop_pct"])), int(np.floor(width / own["crop_pct"]))
    resize = "squash" if own["crop_mode"] == "squash" else "cover"
    mean, std = tuple(own["mean"]), tuple(own["std"])
    preprocess = Preprocess((height, width), to, resize, own["interpolation"], mean, std)
    imagenet = ImageNetInfo() if getattr(model, "num_classes", 0) == 1000 and settings.pretrained else None
    names = imagenet and [imagenet.index_to_description(i) for i in range(1000)]
    return Target(model, preprocess, names)


def _open_clip(settings: TargetSettings) -> Target:
    if settings.kwargs:
        raise ValueError(f"target.kwargs={settings.kwargs}: target.source=open_clip takes none")
    tag = settings.pretrained if isinstance(settings.pretrained, str) else None
    clip = load_clip_model(
        ClipSettings(name=settings.name, pretrained=tag),
        "target",
        bool(settings.pretrained) and not settings.checkpoint,
    )
    return Target(clip.model.visual, clip.preprocess)


def _factory(settings: TargetSettings) -> Target:
    place, _, function = settings.name.rpartition(":")
    beside = os.path.dirname(os.path.abspath(place)) if place.endswith(".py") else os.getcwd()
    sys.path.insert(0, beside)  # as for a script that is run: it may import what lies beside it
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location("axonym_factory_" + Path(place).stem, os.path.abspath(place))
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        model = getattr(module, function)(**settings.kwargs)
    except (ImportError, OSError, AttributeError, TypeError, ValueError) as error:
        expected = "expected file.py:function or package.module:function that returns a torch module"
        raise ValueError(f"target.name={settings.name}: {expected}: {error}") from None
    finally:
        sys.path.remove(beside)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"target.name={settings.name}: the function returned {type(model).__name__}, not a torch module"
        )
    assert module.__file__ is not None
    return Target(model, Preprocess(), code=Path(module.__file__).read_bytes())


LOADERS = {"torchvision": _torchvision, "timm": _timm, "open_clip": _open_clip, "factory": _factory}


def _load_weights(model: nn.Module, path: str) -> None:
    try:
        with cast(fsspec.core.OpenFile, fsspec.open(path, "rb")) as file:
            if path.endswith(".safetensors"):
                import safetensors.torch

                state = cast(dict[str, Any], safetensors.torch.load(file.read()))
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
        for wrapper in ("state_dict", "model", "model_state_dict"):
            state = state.get(wrapper, state) if isinstance(state.get(wrapper), dict) else state
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
        model.load_state_dict(state)
    except Exception as error:  # torch and safetensors raise many kinds for damaged or foreign files
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"target.checkpoint={path}: not weights of this model: {reason}") from None


def _read_names(path: str) -> list[str]:
    try:
        with cast(fsspec.core.OpenFile, fsspec.open(path, "rt")) as file:
            text = file.read()
        names = json.loads(text) if path.endswith(".json") else text.strip().splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"target.class_names={path}: {error}") from None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"target.class_names={path}: expected text lines or a JSON list of texts")
    return names
