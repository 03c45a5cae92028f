"""Layers of a target model: how many units, and where in the image each position lies.

In: the output of a layer's module. Out: views of it as maps [batch, units, positions], pooled activations; hooks on the
modules. Which layers a model has is found out in tasks/discovery.py.

The units of a layer are the channels of a module's output; or attention heads, or the latents of a sparse autoencoder,
which a reader makes of what passes there. What a Layer is asked about is the output, or what its reader made of it.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from tasks.axes import first_tensor
from tasks.heads import Heads, open_heads
from tasks.sae import AT_ONCE, Latents, Sae, SaeFile, SaeSettings, Units, load_sae

POOLS = ("max", "mean", "cls")
POSITIONS = ("all", "patches", "prefix")
ALL = slice(None)


@dataclass
class LayersSettings:
    names: list[str] = field(default_factory=lambda: ["mlp"])
    """Presets (mlp, residual, conv, logits, all, heads, sae) and globs over module paths: * within a path step, ** over
    several. A glob that ends in heads sees those of attention modules, as blocks.3.attn.heads."""
    pool: str = "max"
    """How the map of an image becomes its activation: max, mean, or cls (the first prefix token)."""
    saes: dict[str, str] = field(default_factory=dict)
    """Sparse autoencoders: path of a module, and of the safetensors file that encodes its output. The layer of blocks.7
    is called blocks.7.sae, and the preset sae is all of them."""
    sae: SaeSettings = field(default_factory=SaeSettings)
    """How their encoders work, where the files do not say."""

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("layers.names is empty: give presets such as mlp, or globs over module paths")
        if self.pool not in POOLS:
            raise ValueError(f"layers.pool={self.pool}: allowed are {', '.join(POOLS)}")
        if "sae" in self.names and not self.saes:
            raise ValueError("layers.names=sae: layers.saes is empty; allowed is {module: file.safetensors}")
        if self.saes and not any(entry.endswith("sae") for entry in self.names):
            raise ValueError(f"layers.saes={self.saes}: layers.names has no entry for them; add sae")


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
    kind: str = "channels"
    """What a unit is: a channel of the module's output, or one of its heads or latents."""
    sae: SaeFile | None = None

    @property
    def module(self) -> str:
        """Path of the module whose output is looked at."""
        return self.name.removesuffix(".sae") if self.kind == "latents" else self.name

    def identity(self) -> dict[str, Any]:
        """What numbers depend on, for fingerprints: not where an SAE lies; of channels no word about other kinds."""
        found = asdict(self) | {"sae": self.sae and self.sae.digest}
        return {k: v for k, v in found.items() if self.kind != "channels" or k not in ("kind", "sae")}

    def maps(self, output: Any, units: Units = ALL) -> torch.Tensor:
        """View [B, units, positions] of the output, prefix tokens left out; positions run row by row."""
        if isinstance(output, Latents):
            return self.maps(output[units])
        x = first_tensor(output)
        if self.layout == "chw":
            x = x.flatten(2)
        elif self.layout == "hwc":
            x = x.flatten(1, 2).transpose(1, 2)
        else:
            x = x[:, self.prefix :].transpose(1, 2) if self.layout == "tokens" else x[:, :, None]
        return x[:, units]

    def maps_of(self, output: Any, images_M: torch.Tensor, units_M: torch.Tensor) -> torch.Tensor:
        """[M, positions], the maps of pairs of an image of the batch and a unit."""
        if not isinstance(output, Latents):
            return self.maps(output)[images_M, units_M]
        maps = []
        for images, units in zip(images_M.split(AT_ONCE), units_M.split(AT_ONCE), strict=True):
            distinct, place = units.unique(return_inverse=True)
            maps.append(self.maps(output, distinct)[images, place])
        return torch.cat(maps)

    def prefix_maps(self, output: Any, units: Units = ALL) -> torch.Tensor | None:
        """View [B, units, prefix tokens], None where the layer has none."""
        if not self.prefix:
            return None
        if isinstance(output, Latents):
            return self.prefix_maps(output[units])
        return first_tensor(output)[:, : self.prefix].transpose(1, 2)[:, units]

    def places(self, x: torch.Tensor, positions: str) -> torch.Tensor:
        """View [B, ..., units] of the module's output tensor: all positions, or only patch or prefix tokens."""
        x = x.movedim(1, -1) if self.layout in ("chw", "vector") else x
        if self.layout != "tokens" or positions == "all":
            return x
        return x[:, self.prefix :] if positions == "patches" else x[:, : self.prefix]

    def pooled(self, output: Any, pool: str, units: Units = ALL) -> torch.Tensor:
        """float32 [B, units], the activation of each image; cls is the mean where the layer has no prefix tokens."""
        if isinstance(output, Latents):
            return self.pooled(output[units], pool)
        if pool == "max":
            return self.maps(output).amax(2).float()[:, units]
        prefix = None if pool == "mean" else self.prefix_maps(output)
        return (self.maps(output).float().mean(2) if prefix is None else prefix[:, :, 0].float())[:, units]


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


def by_module(layers: list[Layer]) -> dict[str, list[Layer]]:
    """The layers that look at each module's output."""
    found: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        found[layer.module].append(layer)
    return found


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


def readers(model: nn.Module, layers: list[Layer]) -> dict[str, Heads | Sae]:
    """By name of the layer: what makes its units of its module's output, where they are not its channels.

    Puts the modules of the chosen heads into the model. Raises ValueError where the file of an SAE is another by now.
    """
    open_heads(model, {layer.name for layer in layers if layer.kind == "heads"})
    found: dict[str, Heads | Sae] = {}
    for layer in layers:
        module = model.get_submodule(layer.module)
        if isinstance(module, Heads):
            found[layer.name] = module
        elif layer.sae is not None:
            sae = load_sae(layer.sae.path, layer.sae.settings)
            if sae.digest != layer.sae.digest:
                raise ValueError(f"layers.saes: {layer.sae.path} has changed since the sweep began; start it again")
            found[layer.name] = sae.to(next(model.parameters()).device, layer.layout == "chw")
    return found
