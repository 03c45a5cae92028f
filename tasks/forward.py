"""Running the target model over batches of a shard, layer outputs handed out while they exist.

In: settings of the target, its layers, an ImageList or arrays of pixels. Out: calls `on_layer(layer, output)` during
every forward pass; where the layer's units are heads or latents, with what its reader made of the output.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from tasks.axes import first_tensor
from tasks.clip import DTYPES
from tasks.discovery import find_layers
from tasks.images import ImageList
from tasks.layers import Layer, LayersSettings, by_module, hooked, readers
from tasks.pixels import Preprocess, to_device
from tasks.target import TargetSettings, load_target


def worker_device(threads: int) -> torch.device:
    """CUDA where this process may use it, else the CPU; sets the number of CPU threads, which numbers depend on.

    Raises ValueError where the process was given a GPU that torch cannot use: a CPU would take weeks for its work.
    """
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32: TF32 has no more digits than half precision
    if torch.cuda.is_available():
        return torch.device("cuda")
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "-1")
    if given not in ("", "-1"):
        lack = "is built without CUDA" if torch.version.cuda is None else "finds no driver and card that it can use"
        raise ValueError(f"CUDA_VISIBLE_DEVICES={given}: torch {torch.__version__} {lack}; use CPUs: cluster=local")
    return torch.device("cpu")


@dataclass
class TargetPass:
    """What a stage needs to run the target model over images."""

    images: ImageList
    target: TargetSettings
    layers: list[Layer]
    dtype: str
    threads: int
    """Torch threads on a CPU."""
    channels_last: bool = True
    """Whether the model takes images whose channels lie side by side: convolutions are then faster."""
    digest: str | None = None
    """Of the model that was fingerprinted; None for random weights, which no file can change."""


class _AllSeen(Exception):
    """Leaves the model when the last of its layers has run: what comes after nobody asked for."""


class HookedTarget:
    """The target model on the worker's device, with its chosen layers.

    Raises ValueError where the weights are no longer those of the fingerprint, or others on this machine."""

    def __init__(self, work: TargetPass) -> None:
        target = load_target(work.target)
        if work.digest and work.digest != target.digest():
            key = "checkpoint" if work.target.checkpoint else "name"
            value = work.target.checkpoint or work.target.name
            raise ValueError(f"target.{key}={value}: has changed since the sweep began, or is another on this machine")
        self.device, self.dtype = worker_device(work.threads), DTYPES[work.dtype]
        self.layers = work.layers
        self.images, self.preprocess = work.images, target.preprocess
        self.layout = torch.channels_last if work.channels_last else torch.contiguous_format
        self.model: Any = cast(Any, target.model).to(self.device, self.dtype, memory_format=self.layout)
        self.readers = readers(self.model, work.layers)
        self.shuffled = work.target.shuffled

    def run(
        self,
        batches: list[np.ndarray],
        on_layer: Callable[[Layer, Any], None],
        after_batch: Callable[[np.ndarray], None],
    ) -> None:
        """One forward pass per batch of image numbers, up to the last layer: `on_layer` per layer as it runs, then
        `after_batch`."""
        self._run(self.inputs(batches), on_layer, after_batch)

    def inputs(self, batches: list[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Each batch of image numbers with the model's input for it, on the device."""
        seen = [self.images.partner[numbers] for numbers in batches] if self.shuffled else batches
        for batch, pixels in zip(batches, self.images.batches(seen, self.preprocess), strict=True):
            yield batch, self._input(pixels)

    def _input(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.preprocess.normalise(pixels.to(self.device, non_blocking=True))
        return x.to(self.dtype, memory_format=self.layout)

    def run_arrays(self, arrays_NHWC: np.ndarray, on_layer: Callable[[Layer, Any], None]) -> None:
        """The same over uint8 arrays that are in no list, in whole batches: black images fill the last one up."""
        size = self.images.batch_size
        batches = (arrays_NHWC[start : start + size] for start in range(0, len(arrays_NHWC), size))
        self._run(((batch, self._input(self._padded(batch))) for batch in batches), on_layer, lambda _: None)

    @torch.inference_mode()
    def _run(
        self,
        batches: Iterable[tuple[np.ndarray, torch.Tensor]],
        on_layer: Callable[[Layer, Any], None],
        after_batch: Callable[[np.ndarray], None],
    ) -> None:
        layers, ahead = by_module(self.layers), set[str]()

        def on_output(name: str, output: Any) -> None:
            for layer in layers[name]:
                reader = self.readers.get(layer.name)
                on_layer(layer, reader.read(first_tensor(output)) if reader else output)
            ahead.discard(name)
            if not ahead:
                raise _AllSeen

        with hooked(self.model, list(layers), on_output):
            for batch, x in batches:
                ahead.update(layers)
                with suppress(_AllSeen):
                    self.model(x)
                after_batch(batch)

    def _padded(self, arrays_NHWC: np.ndarray) -> torch.Tensor:
        batch = np.zeros((self.images.batch_size, *self.preprocess.size, 3), np.uint8)
        for slot, array in enumerate(arrays_NHWC):
            batch[slot] = self.preprocess.pixels(Image.fromarray(array))
        return to_device(batch, self.device)


@dataclass
class Description:
    """What the flow must know of a target model before any worker starts."""

    layers: list[Layer]
    digest: str
    preprocess: Preprocess
    class_names: list[str] | None
    num_classes: int | None
    """Width of the model's output; None where that is no [B, classes]."""
    channels_last: bool
    """False for a model whose own code needs the rows of a channel side by side (a `view` of a feature map)."""


def describe(settings: TargetSettings, layers: LayersSettings) -> Description:
    """Load the model once, find its layers by one dry run, hash its weights. Raises ValueError naming the key."""
    target = load_target(settings)
    digest = target.digest()  # before modules of heads are put into the model
    found = find_layers(target.model, target.preprocess, layers, settings.prefix_tokens)
    blank, channels_last = torch.zeros(1, 3, *target.preprocess.size), True
    with torch.inference_mode():
        try:
            model = cast(Any, target.model).to(memory_format=torch.channels_last)
            output = model(blank.to(memory_format=torch.channels_last))
        except RuntimeError:
            model, channels_last = cast(Any, target.model).to(memory_format=torch.contiguous_format), False
            output = model(blank)
    num_classes = output.shape[1] if isinstance(output, torch.Tensor) and output.ndim == 2 else None
    names = len(target.class_names or [])
    if settings.class_names and num_classes not in (None, names):
        raise ValueError(f"target.class_names={settings.class_names}: {names} names for {num_classes} outputs")
    return Description(found, digest, target.preprocess, target.class_names, num_classes, channels_last)
