"""Which layers a target model has, told by the model itself in one dry run.

In: a model and a list of presets or globs over its module paths. Out: Layers in forward order.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tasks.axes import Axes, first_tensor
from tasks.heads import SUFFIX, Heads, open_heads
from tasks.layers import Layer, LayersSettings
from tasks.pixels import Preprocess
from tasks.sae import Sae, SaeFile, load_sae

DRY_BATCH = 2
BLOCK = re.compile(
    r"(Block|BlockV2|Bottleneck|BasicBlock|InvertedResidual|DepthwiseSeparableConv|EncoderLayer|MBConv)\d?[a-z]?$"
)
ACTIVATION = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Hardswish, nn.ELU, nn.PReLU, nn.Mish, nn.Tanh)


@dataclass
class _Call:
    name: str
    module: nn.Module
    given: tuple
    output: Any
    grids: int
    """How many grids had been seen when the module returned."""


def find_layers(
    model: nn.Module, preprocess: Preprocess, settings: LayersSettings, prefix: int | None = None
) -> list[Layer]:
    """The chosen layers in forward order. Where heads are among them the model has their modules afterwards.

    Raises ValueError naming target.preprocess.size where the model does not run, layers.names where an entry matches
    nothing, or a chosen module's output cannot be read as [B,C,H,W], [B,H,W,C], [B,N,C] or [B,C], or it runs more than
    once per image; target.prefix_tokens where the tokens do not fit the grid.
    """
    if any(entry.endswith("heads") for entry in settings.names):
        open_heads(model)
    saes = {name: load_sae(path, settings.sae) for name, path in settings.saes.items()}
    axes, calls = Axes(), []
    handles = [
        m.register_forward_hook(lambda m, i, out, n=n: calls.append(_Call(n, m, i, out, len(axes.grids))))
        for n, m in model.named_modules()
        if n
    ]
    height, width = preprocess.size
    try:
        with torch.inference_mode(), axes:
            output = model(torch.zeros(DRY_BATCH, 3, height, width))
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:  # models differ in how they refuse a size
        key, reason = f"target.preprocess.size=[{height},{width}]", " ".join(str(error).split())[:300]
        raise ValueError(f"{key}: the model does not take such images: {reason}") from None
    finally:
        for handle in handles:
            handle.remove()
    prefix = prefix_tokens(model) if prefix is None else prefix
    ran = [n for call in calls for n in ([call.name, f"{call.name}.sae"] if call.name in saes else [call.name])]
    for name in set(saes) - set(ran):
        file = settings.saes[name]
        raise ValueError(f"layers.saes.{name}={file}: matches no module; allowed are paths such as {_some(ran)}")
    matches = [(entry, _match(entry, model, calls, output, ran)) for entry in settings.names]
    chosen = _choose(matches, ran)
    alike = {type(call.module): axes.layout(call.output) for call in calls if axes.layout(call.output)}
    layers = []
    for call in calls:
        latents = call.name in saes and f"{call.name}.sae" in chosen
        if call.name not in chosen and not latents:
            continue
        layout = axes.layout(call.output) or alike.get(type(call.module))
        layer = _layer(call, layout, axes.grids[: call.grids], prefix, settings)
        if layer is not None and call.name in chosen:
            layers.append(layer)
        if layer is not None and latents:
            layers.append(_latents(layer, saes[call.name], settings))
    for entry, names in matches:
        if not names & {layer.name for layer in layers}:
            raise ValueError(
                f"layers.names={entry}: no match has an output of known layout ([B,C,H,W], [B,H,W,C], [B,N,C], [B,C])"
            )
    return layers


def _choose(matches: list[tuple[str, set[str]]], ran: list[str]) -> set[str]:
    chosen = set()
    for entry, names in matches:
        once = {n for n in names if ran.count(n) == 1}
        if names and not once:
            raise ValueError(
                f"layers.names={entry}: {min(names)} runs more than once per image; choose the modules around it"
            )
        if not once:
            allowed = f"{', '.join(PRESETS)} and globs such as {_some(ran)}"
            raise ValueError(f"layers.names={entry}: matches no module; allowed are {allowed}")
        chosen |= once
    return chosen


def _some(ran: list[str]) -> str:
    return ", ".join(ran[:: max(1, len(ran) // 8)])


def _match(entry: str, model: nn.Module, calls: list[_Call], output: Any, ran: list[str]) -> set[str]:
    if entry in PRESETS:
        return PRESETS[entry](model, calls, output) & set(ran)
    return {n for n in ran if _glob(entry).fullmatch(n)}


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
    return replace(layer, num_units=call.module.num, kind="heads") if isinstance(call.module, Heads) else layer


def _latents(layer: Layer, sae: Sae, settings: LayersSettings) -> Layer:
    path, (num, width) = settings.saes[layer.name], sae.encoder_LD.shape
    if width != layer.num_units:
        raise ValueError(f"layers.saes.{layer.name}={path}: reads {width} channels, the module has {layer.num_units}")
    file = SaeFile(path, settings.sae, sae.digest, sae.decoder_LD is not None)
    return replace(layer, name=f"{layer.name}.sae", num_units=num, kind="latents", sae=file)


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
    norms = {id(c.given[0]): c.name for c in calls if isinstance(c.module, _BatchNorm) and c.given}
    convs = [c for c in calls if isinstance(c.module, nn.Conv2d)]
    return {norms.get(id(c.output), c.name) for c in convs}


def _logits(model: nn.Module, calls: list[_Call], output: Any) -> set[str]:
    """The linear layer whose output is the model's output."""
    last = [c.name for c in calls if c.output is output and isinstance(c.module, nn.Linear | nn.Conv2d)]
    return set(last[-1:])


def _all(model: nn.Module, calls: list[_Call], output: Any) -> set[str]:
    """Channels of every kind: all that the presets before this one name."""
    return set().union(*(PRESETS[name](model, calls, output) for name in ("mlp", "residual", "conv", "logits")))


def _heads(model: nn.Module, calls: list[_Call], output: Any) -> set[str]:
    """Heads of attention modules that write at the tokens that they read; what pools by attention has no map."""
    around, names = {c.name + SUFFIX: c.given for c in calls}, set()
    for call in calls:
        if isinstance(call.module, Heads):
            seen = [x for x in (*around.get(call.name, ()), call.output) if isinstance(x, torch.Tensor) and x.ndim == 3]
            if len({x.shape[:2] for x in seen}) == 1:
                names.add(call.name)
    return names


def _saes(model: nn.Module, calls: list[_Call], output: Any) -> set[str]:
    """Latents of layers.saes."""
    return {f"{c.name}.sae" for c in calls}


PRESETS = {
    "mlp": _mlp,
    "residual": _residual,
    "conv": _conv,
    "logits": _logits,
    "all": _all,
    "heads": _heads,
    "sae": _saes,
}
