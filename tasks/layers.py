"""Layers of a target model: which modules, how many units, and where in the image each position lies.

In: a model and a list of presets or globs over its module paths. Out: Layers in forward order, told apart from the
model itself by one dry run, and views of their outputs as maps [batch, units, positions].
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tasks.axes import Axes, first_tensor
from tasks.pixels import Preprocess

POOLS = ("max", "mean", "cls")
POSITIONS = ("all", "patches", "prefix")
DRY_BATCH = 2
BLOCK = re.compile(
    r"(Block|BlockV2|Bottleneck|BasicBlock|InvertedResidual|DepthwiseSeparableConv|EncoderLayer|MBConv)\d?[a-z]?$"
)
ACTIVATION = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Hardswish, nn.ELU, nn.PReLU, nn.Mish, nn.Tanh)


@dataclass
class LayersSettings:
    names: list[str] = field(default_factory=lambda: ["mlp"])
    """Presets (mlp, residual, conv, logits, all) and globs over module paths: * within a path step, ** over several."""
    pool: str = "max"
    """How the map of an image becomes its activation: max, mean, or cls (the first prefix token)."""

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError(f"layers.names is empty: allowed are {', '.join(PRESETS)} and globs over module paths")
        if self.pool not in POOLS:
            raise ValueError(f"layers.pool={self.pool}: allowed are {', '.join(POOLS)}")


@dataclass
class Layer:
    name: str
    num_units: int
    layout: str
    """chw, hwc, tokens or vector: [B,C,H,W], [B,H,W,C], [B,N,C], [B,C]."""
    grid: tuple[int, int] = (1, 1)
    """Height and width of the map; (1, 1) for vectors."""
    prefix: int = 0
    """Tokens in front of the grid (CLS, registers)."""

    def maps(self, output: Any) -> torch.Tensor:
        """View [B, units, positions] of the module's output, prefix tokens left out; positions run row by row."""
        x = first_tensor(output)
        if self.layout == "chw":
            return x.flatten(2)
        if self.layout == "hwc":
            return x.flatten(1, 2).transpose(1, 2)
        return x[:, self.prefix :].transpose(1, 2) if self.layout == "tokens" else x[:, :, None]

    def prefix_maps(self, output: Any) -> torch.Tensor | None:
        """View [B, units, prefix tokens], None where the layer has none."""
        return first_tensor(output)[:, : self.prefix].transpose(1, 2) if self.prefix else None

    def places(self, x: torch.Tensor, positions: str) -> torch.Tensor:
        """View [B, ..., units] of the module's output tensor: all positions, or only patch or prefix tokens."""
        x = x.movedim(1, -1) if self.layout in ("chw", "vector") else x
        if self.layout != "tokens" or positions == "all":
            return x
        return x[:, self.prefix :] if positions == "patches" else x[:, : self.prefix]

    def pooled(self, output: Any, pool: str) -> torch.Tensor:
        """float32 [B, units], the activation of each image; cls is the mean where the layer has no prefix tokens."""
        if pool == "max":
            return self.maps(output).amax(2).float()
        prefix = self.prefix_maps(output)
        return self.maps(output).float().mean(2) if pool == "mean" or prefix is None else prefix[:, :, 0].float()


@dataclass
class Block:
    """Units [start, stop) of one layer: the slice of work of the stages that go by units."""

    layer: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def unit_blocks(layers: list[Layer], size: int) -> list[Block]:
    """All units cut into blocks of at most `size`, never across layers."""
    return [Block(x.name, i, min(i + size, x.num_units)) for x in layers for i in range(0, x.num_units, size)]


@contextmanager
def hooked(model: nn.Module, names: list[str], call: Any) -> Iterator[None]:
    """While inside, `call(name, output)` runs as soon as each named module has its output, and may return another."""
    modules = dict(model.named_modules())
    handles = [modules[n].register_forward_hook(lambda _m, _i, out, n=n: call(n, out)) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Call:
    name: str
    output: Any
    input_id: int
    grids: int
    """How many grids had been seen when the module returned."""


def find_layers(
    model: nn.Module, preprocess: Preprocess, settings: LayersSettings, prefix: int | None = None
) -> list[Layer]:
    """The chosen layers in forward order.

    Raises ValueError naming layers.names where an entry matches nothing, or a chosen module's output cannot be read as
    [B,C,H,W], [B,H,W,C], [B,N,C] or [B,C], or it runs more than once per image; target.prefix_tokens where the tokens
    do not fit the grid.
    """
    axes, calls = Axes(), []
    handles = [
        m.register_forward_hook(
            lambda _m, i, out, n=n: calls.append(_Call(n, out, id(i[0]) if i else 0, len(axes.grids)))
        )
        for n, m in model.named_modules()
        if n
    ]
    try:
        with torch.inference_mode(), axes:
            output = model(torch.zeros(DRY_BATCH, 3, *preprocess.size))
    finally:
        for handle in handles:
            handle.remove()
    prefix = prefix_tokens(model) if prefix is None else prefix
    chosen = _choose(model, calls, output, settings.names)
    modules = dict(model.named_modules())
    alike = {type(modules[call.name]): axes.layout(call.output) for call in calls if axes.layout(call.output)}
    layers = []
    for call in calls:
        if call.name in chosen:
            layout = axes.layout(call.output) or alike.get(type(modules[call.name]))
            layers.append(_layer(call, layout, axes.grids[: call.grids], prefix, settings))
    layers = [layer for layer in layers if layer is not None]
    for entry, names in _matches(model, calls, output, settings.names):
        if not names & {layer.name for layer in layers}:
            raise ValueError(
                f"layers.names={entry}: no match has an output of known layout ([B,C,H,W], [B,H,W,C], [B,N,C], [B,C])"
            )
    return layers


def _choose(model: nn.Module, calls: list[_Call], output: Any, entries: list[str]) -> set[str]:
    chosen, ran = set(), [call.name for call in calls]
    for entry, names in _matches(model, calls, output, entries):
        once = {n for n in names if ran.count(n) == 1}
        if names and not once:
            raise ValueError(
                f"layers.names={entry}: {min(names)} runs more than once per image; choose the modules around it"
            )
        if not once:
            known = ", ".join(ran[:: max(1, len(ran) // 8)])
            raise ValueError(
                f"layers.names={entry}: matches no module; allowed are {', '.join(PRESETS)} and globs such as {known}"
            )
        chosen |= once
    return chosen


def _matches(model: nn.Module, calls: list[_Call], output: Any, entries: list[str]) -> list[tuple[str, set[str]]]:
    ran = {call.name for call in calls}
    found = []
    for entry in entries:
        if entry in PRESETS:
            found.append((entry, PRESETS[entry](model, calls, output) & ran))
        else:
            found.append((entry, {n for n in ran if _glob(entry).fullmatch(n)}))
    return found


def _glob(entry: str) -> re.Pattern:
    steps = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return re.compile("".join(steps.get(s, re.escape(s)) for s in re.split(r"(\*\*|\*|\?)", entry)))


def _layer(
    call: _Call, layout: str | None, grids: list[tuple[int, int]], prefix: int, settings: LayersSettings
) -> Layer | None:
    x = first_tensor(call.output)
    if not isinstance(x, torch.Tensor) or x.ndim not in (2, 3, 4) or x.shape[0] != DRY_BATCH:
        return None
    if x.ndim == 2:
        return Layer(call.name, x.shape[1], "vector")
    if x.ndim == 4:
        if layout is None:
            raise ValueError(
                f"layers.names: cannot tell the channels of {call.name} from the model; choose the modules inside"
            )
        grid = x.shape[2:] if layout == "chw" else x.shape[1:3]
        layer = Layer(call.name, x.shape[1] if layout == "chw" else x.shape[3], layout, (int(grid[0]), int(grid[1])))
    else:
        patches = x.shape[1] - prefix
        grid = next((g for g in reversed(grids) if g[0] * g[1] == patches), None)
        if grid is None:
            expected = f"{prefix} prefix tokens leave {patches} for a grid, and none of that size was seen"
            raise ValueError(f"target.prefix_tokens={prefix}: layer {call.name} has {x.shape[1]} tokens; {expected}")
        layer = Layer(call.name, x.shape[2], "tokens", grid, prefix)
    if settings.pool == "cls" and not layer.prefix:
        raise ValueError(f"layers.pool=cls: layer {call.name} has no CLS token; allowed are max, mean")
    return layer


def prefix_tokens(model: nn.Module) -> int:
    """Tokens in front of the patch tokens, as the model states them (timm, torchvision and open_clip conventions)."""
    for module in model.modules():
        count = getattr(module, "num_prefix_tokens", None)
        if isinstance(count, int):
            return count
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        found = [own[n] for n in ("class_token", "cls_token", "class_embedding") if n in own]
        if found:
            registers = [own[n].shape[-2] for n in ("register_tokens", "reg_token") if n in own]
            return 1 + sum(registers)
    return 0


def _mlp(model: nn.Module, calls: list[_Call], output: Any) -> set[str]:
    """Hidden units of MLPs: the activation function between two linear layers; behind the gate in gated MLPs."""
    names = set()
    for path, parent in model.named_modules():
        children = list(parent.named_children())
        kinds = [
            isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)) for _, m in children
        ]
        for i, (name, child) in enumerate(children):
            is_activation = isinstance(child, ACTIVATION) or "GELU" in type(child).__name__
            if not (is_activation and any(kinds[:i]) and any(kinds[i + 1 :])):
                continue
            conv_only = not any(isinstance(m, nn.Linear) for _, m in children)
            if conv_only and "mlp" not in path.lower():
                continue
            gated = "glu" in type(parent).__name__.lower() and "norm" in dict(children)
            names.add(f"{path}.{'norm' if gated else name}".lstrip("."))
    return names


def _residual(model: nn.Module, calls: list[_Call], output: Any) -> set[str]:
    """Outputs of the outermost residual blocks."""
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{n}.") for n in names)
        if (
            name
            and BLOCK.search(type(module).__name__)
            and not inside
            and not isinstance(module, nn.Sequential | nn.ModuleList)
        ):
            names.append(name)
    return set(names)


def _conv(model: nn.Module, calls: list[_Call], output: Any) -> set[str]:
    """Convolutions; where a batch norm takes a convolution's output, the norm's output stands for it.

    A convolution before its norm has arbitrary scale and even sign, so its largest values are not what the net uses.
    """
    modules = dict(model.named_modules())
    norms = {c.input_id: c.name for c in calls if isinstance(modules[c.name], nn.modules.batchnorm._BatchNorm)}
    convs = [c for c in calls if isinstance(modules[c.name], nn.Conv2d)]
    return {norms.get(id(c.output), c.name) for c in convs}


def _logits(model: nn.Module, calls: list[_Call], output: Any) -> set[str]:
    """The linear layer whose output is the model's output."""
    modules = dict(model.named_modules())
    last = [c.name for c in calls if c.output is output and isinstance(modules[c.name], nn.Linear | nn.Conv2d)]
    return set(last[-1:])


def _all(model: nn.Module, calls: list[_Call], output: Any) -> set[str]:
    """Everything that another preset names."""
    return set().union(*(PRESETS[name](model, calls, output) for name in ("mlp", "residual", "conv", "logits")))


PRESETS = {"mlp": _mlp, "residual": _residual, "conv": _conv, "logits": _logits, "all": _all}
