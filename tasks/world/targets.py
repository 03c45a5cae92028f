"""The world's target models: a small ResNet and two small ViTs that know the world and carry planted units.

In: a folder, a seed. Out: <net>.safetensors with the weights and the list of planted units with their measured AUROC.
The nets are timm's own, so they are loaded like any other model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tasks.world.concepts import CONCEPTS
from tasks.world.planting import TWO_VALUED, Depths, Planted, Teacher, plan
from tasks.world.training import Recipe, Scenes, to_input, train
from tasks.world.truth import NO, UNSURE, YES, Album, concepts_seen, phrases_seen, stream


@dataclass
class Net:
    """One architecture, and what is planted at which depth."""

    name: str
    timm: str
    kwargs: dict[str, Any]
    depths: Depths
    head: str
    recipe: Recipe
    start: str | None = None
    """Net whose weights it goes on from."""

    @property
    def vit(self) -> bool:
        return "embed_dim" in self.kwargs


INPUT = 64
"""Pixels of the nets' input: scenes are made smaller, so that a net sees more of them in the same time."""
VIT = {"num_classes": len(CONCEPTS), "img_size": INPUT, "patch_size": 2, "embed_dim": 128, "depth": 6, "num_heads": 4}
VIT |= {"mlp_ratio": 2.0, "no_embed_class": True}
VIT_DEPTHS = Depths(
    colour=["blocks.1.mlp.act", "blocks.2.mlp.act"],
    pattern=["blocks.2.mlp.act", "blocks.3.mlp.act"],
    scene=["blocks.2.mlp.act", "blocks.3.mlp.act"],
    kind=["blocks.4.mlp.act", "blocks.5.mlp.act"],
    layout=["blocks.5.mlp.act"],
    free=["blocks.1.mlp.act", "blocks.2.mlp.act", "blocks.3.mlp.act", "blocks.4.mlp.act"],
    special=["blocks.4.mlp.act", "blocks.5.mlp.act"],
)
NETS = {
    net.name: net
    for net in (
        Net(
            "resnet",
            "resnet18",
            {
                "num_classes": len(CONCEPTS),
                "layers": [1, 1, 1, 1],
                "channels": [48, 96, 160, 224],
                "stem_width": 24,
                "stem_type": "deep",
                "output_stride": 16,
            },
            Depths(
                colour=["layer1.0", "layer2.0"],
                pattern=["layer2.0", "layer3.0"],
                scene=["layer2.0", "layer3.0"],
                kind=["layer3.0", "layer4.0"],
                layout=["layer4.0"],
                free=["layer2.0", "layer3.0", "layer4.0"],
                special=[],
            ),
            "fc",
            Recipe(steps=3200, batch=128, rate=2e-3, reuse=2),
        ),
        Net("vit", "vit_tiny_r_s16_p8_224", VIT, VIT_DEPTHS, "head", Recipe(steps=3500, batch=128, rate=2e-3, reuse=2)),
        Net(
            "vit_registers",
            "vit_tiny_r_s16_p8_224",
            VIT | {"reg_tokens": 4},
            VIT_DEPTHS,
            "head",
            Recipe(steps=400, batch=128, rate=5e-4, reuse=2),
            start="vit",
        ),
    )
}


def build(net: Net, seed: int) -> nn.Module:
    import timm
    from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

    torch.manual_seed(seed)
    model: Any = timm.create_model(net.timm, **net.kwargs)
    if net.vit:  # the usual small random start is lost beside what the stem sends: corners were never learned from it
        grid, dim = model.patch_embed.grid_size, net.kwargs["embed_dim"]
        model.pos_embed.data[0] = build_sincos2d_pos_embed(grid, dim, interleave_sin_cos=True)
    return model


def before_activation(net: Net, model: nn.Module, layer: str) -> nn.Module:
    """The activation function whose input decides a layer's units."""
    return model.get_submodule(layer if net.vit else f"{layer}.act2")


@contextmanager
def inputs(net: Net, model: nn.Module, numbers: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """While inside, every forward pass fills the dict with each layer's pre-activations [B, units, prefix + G]."""
    found: dict[str, torch.Tensor] = {}

    def keep(layer: str, _module: nn.Module, given: tuple[torch.Tensor]) -> None:
        x = given[0]  # indexing copies, before the activation function overwrites it in place
        found[layer] = x[:, :, numbers[layer]].transpose(1, 2) if net.vit else x[:, numbers[layer]].flatten(2)

    handles = [
        before_activation(net, model, layer).register_forward_pre_hook(partial(keep, layer)) for layer in numbers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def train_target(
    folder: Path, name: str, seed: int, device: torch.device, recipe: Recipe | None = None, count: int = 2000
) -> tuple[list[Planted], np.ndarray, dict[str, float]]:
    """Train and write <name>.safetensors; the planted units, the AUROC of each on `count` fresh scenes (NaN where none
    applies), figures. A net with a `start` goes on from that net's weights, which must be in the folder."""
    net = NETS[name]
    recipe = recipe or net.recipe
    model = build(net, seed).to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if net.start:
        model.load_state_dict(load_file(folder / f"{net.start}.safetensors"), strict=False)  # all but the new tokens
    lesson = Lesson(net, model, seed, device, recipe)
    with inputs(net, model, {layer: t.numbers for layer, t in lesson.teachers.items()}) as lesson.z:
        train(model, lesson.loss, recipe, device, name)
    fix(net, model, lesson.units)
    set_thresholds(net, model, lesson.units, stream(f"{seed}/{name}/thresholds", 0, count, unseen=False), device)
    folder.mkdir(parents=True, exist_ok=True)
    halves = {k: t.half() if t.is_floating_point() else t for k, t in model.state_dict().items()}
    save_file({k: t.cpu().contiguous() for k, t in halves.items()}, folder / f"{name}.safetensors")
    model.load_state_dict(halves)  # measured as it ships
    units = [*lesson.units, *(Planted(net.head, i, "logit", (concept,)) for i, concept in enumerate(CONCEPTS))]
    return units, *measure(net, model, units, device, count)


class Lesson:
    """One step's scenes and targets, and the loss on them."""

    def __init__(self, net: Net, model: nn.Module, seed: int, device: torch.device, recipe: Recipe) -> None:
        self.net, self.model, self.device = net, model, device
        shapes = _shapes(net, model, device)
        self.units = plan(net.depths, {layer: width for layer, (width, _) in shapes.items()}, seed)
        prefix = getattr(model, "num_prefix_tokens", 0)
        self.teachers = {
            layer: Teacher([u for u in self.units if u.layer == layer], grid, prefix, device)
            for layer, (_, grid) in shapes.items()
        }
        self.scenes, self.album = Scenes(f"{seed}/{net.name}", recipe), None
        self.z: dict[str, torch.Tensor] = {}

    def loss(self, step: int) -> torch.Tensor:
        """Of the net's own task, to tell which concepts a scene shows, and of every layer's planted units."""
        fix(self.net, self.model, self.units)
        found, images = self.scenes.batch()
        if found is not self.album:  # every scene is used a few times
            self.album = found
            self.truth = torch.from_numpy(concepts_seen(found)).to(self.device)
        pixels = to_input(found.pixels[images], self.device, INPUT).contiguous(memory_format=torch.channels_last)
        logits = self.model(pixels).float()
        known, true = self.truth[images] != UNSURE, self.truth[images] == YES
        value = (F.binary_cross_entropy_with_logits(logits, true.float(), reduction="none") * known).sum() / known.sum()
        for layer, teacher in self.teachers.items():
            value = value + teacher.loss(self.z[layer], teacher.batch(found, images))
        return value


def _shapes(net: Net, model: nn.Module, device: torch.device) -> dict[str, tuple[int, int]]:
    """Layer -> number of its units and side of its grid, for the layers where something is planted."""
    d, found = net.depths, {}
    layers = sorted({*d.colour, *d.pattern, *d.scene, *d.kind, *d.layout, *d.free, *d.special})

    def keep(layer: str, _module: nn.Module, given: tuple[torch.Tensor]) -> None:
        shape = given[0].shape
        prefix = getattr(model, "num_prefix_tokens", 0)
        found[layer] = (shape[2], round((shape[1] - prefix) ** 0.5)) if net.vit else (shape[1], shape[2])

    handles = [before_activation(net, model, layer).register_forward_pre_hook(partial(keep, layer)) for layer in layers]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, INPUT, INPUT, device=device))
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def fix(net: Net, model: nn.Module, units: list[Planted]) -> None:
    """Set dead and always-on units by hand."""
    for unit in units:
        if unit.kind not in ("dead", "always_on"):
            continue
        on, u = unit.kind == "always_on", unit.unit
        block: Any = model.get_submodule(unit.layer.removesuffix(".mlp.act"))
        if net.vit:
            weight, bias = block.mlp.fc1.weight, block.mlp.fc1.bias
            weight[u] = 0.02 * torch.sin(torch.arange(weight.shape[1]) + u).to(weight) if on else 0.0
            bias[u] = 2.0 if on else -10.0
        else:
            for norm in (block.bn2, block.downsample[-1]):
                norm.weight[u], norm.bias[u] = (0.05, 1.0) if on else (0.0, -1.0)


@torch.no_grad()
def set_thresholds(net: Net, model: nn.Module, units: list[Planted], found: Album, device: torch.device) -> None:
    """Raise the bias of each unit that means something so that 99 % of the scenes that show it get it above zero: what
    the activation function cuts off is lost to all that reads the unit."""
    for unit, peak in zip(units, peaks(net, model, units, found, device), strict=True):
        if unit.kind not in (*TWO_VALUED, "duplicate"):
            continue
        shown = peak[shows(found, unit) == YES]
        if len(shown):
            shift = max(0.0, 0.05 - float(np.quantile(shown, 0.01)))
            block: Any = model.get_submodule(unit.layer.removesuffix(".mlp.act"))
            (block.mlp.fc1 if net.vit else block.bn2).bias[unit.unit] += shift


# --- what they can do


def shows(found: Album, unit: Planted) -> np.ndarray:
    """int8 [N] of YES, NO, UNSURE: whether scenes show any of a unit's concepts."""
    truth = phrases_seen(found, list(unit.concepts))
    return np.where((truth == YES).any(1), YES, np.where((truth == UNSURE).any(1), UNSURE, NO))


@torch.no_grad()
def peaks(
    net: Net,
    model: nn.Module,
    units: list[Planted],
    found: Album,
    device: torch.device,
    act: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> np.ndarray:
    """float32 [units, scenes], the largest of `act` of the input to the activation function over an image's patches;
    logits as they are."""
    model.eval()
    layers = {u.layer: [v for v in units if v.layer == u.layer] for u in units if u.kind != "logit"}
    prefix, values = getattr(model, "num_prefix_tokens", 0), np.zeros((len(units), len(found)), np.float32)
    rows = {layer: [i for i, u in enumerate(units) if u.layer == layer] for layer in [*layers, net.head]}
    with inputs(net, model, {layer: torch.tensor([u.unit for u in these]) for layer, these in layers.items()}) as z:
        for start in range(0, len(found), 100):
            part = slice(start, start + 100)
            logits = model(to_input(found.pixels[part], device, INPUT)).float()
            for layer in layers:
                values[rows[layer], part] = act(z[layer].float())[:, :, prefix:].amax(2).T.cpu().numpy()
            values[rows[net.head], part] = logits[:, [units[i].unit for i in rows[net.head]]].T.cpu().numpy()
    return values


@torch.no_grad()
def measure(
    net: Net, model: nn.Module, units: list[Planted], device: torch.device, count: int
) -> tuple[np.ndarray, dict[str, float]]:
    """AUROC of every unit's largest activation over an image against its truth on `count` fresh scenes."""
    found = stream("targets/hold-out", 0, count)
    act = F.gelu if net.vit else F.relu
    auroc = np.full(len(units), np.nan)
    for i, peak in enumerate(peaks(net, model, units, found, device, act)):
        if units[i].concepts and units[i].kind != "special_token_only":
            auroc[i] = area(peak, shows(found, units[i]))
    figures = {}
    for kind in dict.fromkeys(u.kind for u in units):
        values = np.array([a for a, u in zip(auroc, units, strict=True) if u.kind == kind and np.isfinite(a)])
        if len(values):
            figures |= {f"AUROC {kind} mean": float(values.mean()), f"AUROC {kind} least": float(values.min())}
    for family in dict.fromkeys(u.family for u in units if u.kind == "mono"):
        values = [a for a, u in zip(auroc, units, strict=True) if u.kind == "mono" and u.family == family]
        figures[f"AUROC mono {family} least"] = float(min(values))
    return auroc, figures


def area(score: np.ndarray, label: np.ndarray) -> float:
    """Area under the receiver operating characteristic, ties half; UNSURE ones are left out."""
    from scipy.stats import rankdata

    score, true = score[label != UNSURE], (label == YES)[label != UNSURE]
    yes, no = int(true.sum()), int((~true).sum())
    return float((rankdata(score)[true].sum() - yes * (yes + 1) / 2) / (yes * no)) if yes and no else float("nan")
