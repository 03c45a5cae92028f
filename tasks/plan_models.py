"""Models without their weights: what they cost per image, and which layers they have.

In: settings of the target and of CLIP. Out: floating-point operations, values written and parameters, from one forward
pass on torch's meta device, where tensors have shapes and no numbers; so nothing is read, downloaded or computed. What
cannot run there (a factory's own code) runs on the CPU with random weights.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tasks.axes import first_tensor
from tasks.clip import ClipSettings, load_clip_model
from tasks.discovery import find_layers
from tasks.forward import worker_device
from tasks.layers import Layer, LayersSettings, hooked
from tasks.target import TargetSettings, load_target

Made = TypeVar("Made")
BATCH = 2
"""Images in the pass that is counted; as many as find_layers sees, since some models mind a batch of one."""
TIMED = 4
"""Batches that are timed, after one that is not."""


@dataclass
class Cost:
    """What one image, or one text, costs a model."""

    flops: float
    """Two for each multiplication with its addition, in matrix products and convolutions."""
    values: float
    """Numbers written by all its operations: what a model with thin layers spends its time on."""
    parameters: int
    side: int
    """Pixels of the longer side of its input."""


@dataclass
class TargetSketch:
    layers: list[Layer]
    lowest: list[str]
    """What lies below zero in each layer: 'never' (ReLU), 'bounded' (GELU) or 'free'."""
    cost: Cost
    class_names: list[str] | None
    num_classes: int | None


@dataclass
class ClipSketch:
    width: int
    """Of its vectors."""
    image: Cost
    text: Cost


def sketch_target(settings: TargetSettings, layers: LayersSettings) -> TargetSketch:
    """Raises ValueError for whatever makes a sweep refuse the model or its layers."""

    def look(device: str) -> TargetSketch:
        target = load_target(settings, weights=False)
        found = find_layers(target.model, target.preprocess, layers, settings.prefix_tokens)
        x = torch.zeros(BATCH, 3, *target.preprocess.size)
        signs, lowest = Signs(), {}
        with hooked(target.model, [x.name for x in found], lambda n, out: lowest.update({n: signs.of(out)})), signs:
            cost, output = _count(target.model, target.model, x)
        plain = isinstance(output, torch.Tensor) and output.ndim == 2
        kinds = [lowest[layer.name] for layer in found]
        return TargetSketch(found, kinds, cost, target.class_names, output.shape[1] if plain else None)

    return _without_numbers(look)


def sketch_clip(settings: ClipSettings) -> ClipSketch:
    """Raises ValueError naming clip or judge where there is no such model."""

    def look(device: str) -> ClipSketch:
        loaded = load_clip_model(settings, settings.key, weights=False, device=device)
        model = loaded.model
        x = torch.zeros(BATCH, 3, *loaded.preprocess.size)
        image, output = _count(model, model.encode_image, x)
        image.parameters = sum(p.numel() for p in model.visual.parameters())
        return ClipSketch(output.shape[1], image, _text_cost(model, image.parameters, loaded.context_length))

    return _without_numbers(look)


def _text_cost(model: Any, of_images: int, length: int) -> Cost:
    """Two operations per parameter and token, the table of words left out: texts cost little beside images."""
    words = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    parameters = sum(p.numel() for p in model.parameters()) - of_images
    return Cost(2.0 * max(parameters - words, 0) * length, 20.0 * length * 512, parameters, 0)


def _without_numbers(look: Callable[[str], Made]) -> Made:
    with _quiet():
        return _look(look)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning that a model has no weights, which is the point."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _look(look: Callable[[str], Made]) -> Made:
    try:
        with torch.device("meta"), _counted_attention():
            return look("meta")
    except (RuntimeError, ValueError):  # what a tensor without numbers cannot do; what is wrong is so again
        with _counted_attention():
            return look("cpu")


@contextmanager
def _counted_attention() -> Iterator[None]:
    """Attention as products that can be counted, not as one fused kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _count(model: nn.Module, call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> tuple[Cost, Any]:
    written, flops = Written(), FlopCounterMode(display=False)
    with written, flops:
        output = call(x)
    parameters = sum(p.numel() for p in model.parameters())
    cost = Cost(flops.get_total_flops() / len(x), written.values / len(x), parameters, max(x.shape[2:]))
    return cost, first_tensor(output)


class Written(TorchDispatchMode):
    """Counts the numbers that operations write; views write none."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            found = out if isinstance(out, tuple | list) else [out]
            self.values += sum(t.numel() for t in found if isinstance(t, torch.Tensor))
        return out


class Signs(TorchFunctionMode):
    """Remembers of every tensor whether a function made it that is never negative, or only a little."""

    NEVER = frozenset(["relu", "relu_", "relu6", "relu6_", "sigmoid", "sigmoid_", "softmax", "abs", "square"])
    BOUNDED = frozenset(["gelu", "silu", "silu_", "hardswish", "hardswish_", "mish", "mish_", "elu", "elu_"])

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[int, str] = {}
        self.kept: list[Any] = []  # keeps ids unique while we look

    def of(self, output: Any) -> str:
        return self.kinds.get(id(first_tensor(output)), "free")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        never = name in self.NEVER or (name.startswith("hardtanh") and tuple(args[1:2]) == (0.0,))
        kind = "never" if never else "bounded" if name in self.BOUNDED else "free"
        if isinstance(out, torch.Tensor) and (kind != "free" or name.endswith("_")):
            self.kinds[id(out)] = kind
            self.kept.append(out)
        return out


def timed(settings: TargetSettings, clip: ClipSettings, batch: int, threads: int) -> tuple[float, float]:
    """Seconds per image of the target and of CLIP on this machine, with random weights, batches as in a sweep.

    The least of a few batches: what else the machine does can only make one longer.
    """
    device = worker_device(threads)
    with _quiet():
        target, loaded = load_target(settings, weights=False), load_clip_model(clip, clip.key, weights=False)
    calls = (
        (target.model, target.model, target.preprocess),
        (loaded.model, loaded.model.encode_image, loaded.preprocess),
    )
    found = []
    for model, call, preprocess in calls:
        model.to(device)
        x = torch.zeros(batch, 3, *preprocess.size, device=device)
        seconds = []
        with torch.inference_mode():
            for _ in range(TIMED + 1):
                start = time.perf_counter()
                first_tensor(call(x)).sum().item()  # waits for a GPU
                seconds.append(time.perf_counter() - start)
        found.append(min(seconds[1:]) / batch)
    return found[0], found[1]
