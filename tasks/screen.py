"""Stage screen: how much the logit of each image's class would fall without each unit, to first order.

In: images of the select and validate splits, the target model. Out: classes (of each image, and what the model
predicts), screen (sums over the select images of each class, for every unit), screen_counts (images behind them).

One forward and one backward pass serve all units of all layers: activation x gradient, summed over positions, is the
first-order term of the fall of the logit when the unit is set to zero (Molchanov et al. 2017, attribution patching).
The sum of gradients alone is stored too: with the mean activation m, effect - m x gradient is the same for setting the
unit to its mean, which is only known when all shards are done.

Shapes: B images of a batch, U units of all layers side by side, C classes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tasks.axes import first_tensor
from tasks.classes import NO_CLASS, labelled
from tasks.forward import HookedTarget, TargetPass
from tasks.heads import Heads
from tasks.layers import Block, Layer, by_module, hooked
from tasks.sae import Sae
from tasks.store import Folder, PartReport
from tasks.tables import make_table


@dataclass
class ScreenJob:
    out: Folder
    model: TargetPass
    blocks: list[Block]
    positions: str
    """all, patches or prefix: where the units would be set to zero."""
    index_of: dict[str, int]
    """Class of each label; empty where the images have no labels that name classes: then the model predicts them."""


class ScreenWorker:
    """Passes of the target model, forward and back, over the held-out images of one shard."""

    def __init__(self, job: ScreenJob) -> None:
        self.job, self.images = job, job.model.images
        self.target = HookedTarget(job.model)

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int64, class of each image; None where the model predicts them."""
        return labelled(self.images, self.job.index_of) if self.job.index_of else None

    def run(self, part: int) -> PartReport:
        report, shard = PartReport(part), self.images.shard(part)
        with report.phase("compute"):
            predicted = np.full(len(shard), NO_CLASS)
            layers = self.job.model.layers
            sums = ClassSums(sum(layer.num_units for layer in layers), self.target.device)
            for numbers, x in self._inputs(part, "select"):
                labels = None if self.labels is None else self.labels[numbers]
                target = self.target
                found = first_order(target.model, layers, x, labels, self.job.positions, target.readers)
                predicted[numbers - shard.start] = found.predicted[: len(numbers)]
                sums.add(found, len(numbers))
            with torch.inference_mode():
                for numbers, x in self._inputs(part, "validate"):
                    predicted[numbers - shard.start] = self.target.model(x).argmax(1)[: len(numbers)].cpu().numpy()
            tables = {"classes": self._classes(part, predicted), **self._sums(sums)}
        with report.phase("write"):
            groups = [len(block) for block in self.job.blocks]
            self.job.out.write(part, tables, {"screen": groups})
        report.rows = {name: table.num_rows for name, table in tables.items()}
        report.skipped = {"nonfinite_effects": sums.nonfinite} if sums.nonfinite else {}
        return report

    def _inputs(self, part: int, split: str) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """The shard's images of a split in full batches: other images have no part in this stage."""
        shard, size = np.array(self.images.shard(part)), self.images.batch_size
        members = shard[self.images.split[shard] == split]
        return self.target.inputs([members[i : i + size] for i in range(0, len(members), size)])

    def _classes(self, part: int, predicted: np.ndarray) -> pa.Table:
        shard = np.array(self.images.shard(part))
        seen = predicted != NO_CLASS
        own = predicted if self.labels is None else self.labels[shard]
        columns = {"image": shard[seen], "class_index": pa.array(own[seen], mask=own[seen] == NO_CLASS)}
        return make_table("classes", columns | {"predicted": predicted[seen]})

    def _sums(self, sums: "ClassSums") -> dict[str, pa.Table]:
        (effect, gradient), activation = sums.stacked(), sums.activation.cpu().numpy()
        rows, start = [], 0
        for block in self.job.blocks:
            units = slice(start, start := start + len(block))
            columns = {"layer": [block.layer] * len(block), "unit": np.arange(block.start, block.stop)}
            columns |= {"effect": effect[units], "gradient": gradient[units], "activation": activation[units]}
            rows.append(make_table("screen", columns))
        classes = sorted(sums.images)
        counts = make_table("screen_counts", {"class_index": classes, "images": [sums.images[c] for c in classes]})
        return {"screen": pa.concat_tables(rows), "screen_counts": counts}


@dataclass
class FirstOrder:
    """What one batch says, padding included."""

    predicted: np.ndarray
    """int64 [B], the class of the largest logit."""
    classes: np.ndarray
    """int64 [B], the class whose logit was followed; NO_CLASS for images that have none."""
    effect_BU: torch.Tensor
    """float64, sum over positions of activation x gradient."""
    gradient_BU: torch.Tensor
    """float64, sum over positions of the gradient."""
    activation_BU: torch.Tensor
    """float64, mean over positions of the activation."""


def first_order(
    model: torch.nn.Module,
    layers: list[Layer],
    x: torch.Tensor,
    labels: np.ndarray | None,
    positions: str,
    readers: Mapping[str, Heads | Sae] | None = None,
) -> FirstOrder:
    """One pass forward and back. `labels` [at most B] are the classes to follow; None: what the model predicts.
    `readers` are those of layers whose units are not channels.

    All is zero for a layer whose output is the model's own, which says nothing, and for one that no gradient reaches.
    """
    modules = by_module(layers)
    found = {y.name: torch.zeros(3, len(x), y.num_units, dtype=torch.float64, device=x.device) for y in layers}
    passed_on: dict[str, torch.Tensor] = {}

    def on_layer(name: str, output: Any) -> Any:
        a = first_tensor(output)
        kept, passed_on[name] = a.detach().clone(), a.clone()  # what follows may write over the output and its input

        def on_gradient(gradient: torch.Tensor) -> None:
            for layer in modules[name]:
                places = [layer.places(t, positions) for t in (kept, gradient)]
                reader = (readers or {}).get(layer.name)
                for units, *seen in reader.along(*places) if reader else [(slice(None), *places)]:
                    values, slopes = (t.reshape(len(x), -1, t.shape[-1]) for t in seen)
                    found[layer.name][0, :, units] = (values * slopes).sum(1)
                    found[layer.name][1, :, units] = slopes.sum(1)
                    found[layer.name][2, :, units] = values.mean(1)

        if a.requires_grad:
            passed_on[name].register_hook(on_gradient)
        return (passed_on[name], *output[1:]) if isinstance(output, tuple | list) else passed_on[name]

    with hooked(model, list(modules), on_layer):
        logits = model(x.requires_grad_())
    predicted = classes = logits.argmax(1).cpu().numpy()
    if labels is not None:
        classes = np.full(len(x), NO_CLASS)
        classes[: len(labels)] = labels
    followed = torch.from_numpy(classes.clip(min=0)).to(x.device)
    logits.gather(1, followed[:, None]).sum().backward()
    for name, output in passed_on.items():
        if output is logits:
            for layer in modules[name]:
                found[layer.name].zero_()
    sums = torch.cat([found[layer.name] for layer in layers], 2)
    return FirstOrder(predicted, classes, *sums)


class ClassSums:
    """Sums over images by class, float64 [U] each: only of classes that occur, so they never outgrow the images."""

    def __init__(self, num_units: int, device: torch.device) -> None:
        self.images: dict[int, int] = {}
        self.sums: dict[int, torch.Tensor] = {}
        self.activation = torch.zeros(num_units, dtype=torch.float64, device=device)
        self.nonfinite = 0

    def add(self, found: FirstOrder, count: int) -> None:
        """The first `count` images of a batch, in order; the same on every device, which sums by index are not."""
        values_3BU = torch.stack([found.effect_BU, found.gradient_BU, found.activation_BU])[:, :count]
        finite = values_3BU.isfinite()
        self.nonfinite += int((~finite).any(0).sum())
        values_3BU = torch.where(finite.all(0), values_3BU, 0)
        for image, own in enumerate(found.classes[:count].tolist()):
            if own == NO_CLASS:
                continue
            self.images[own] = self.images.get(own, 0) + 1
            if own not in self.sums:
                self.sums[own] = torch.zeros_like(values_3BU[:2, 0])
            self.sums[own] += values_3BU[:2, image]
            self.activation += values_3BU[2, image]

    def stacked(self) -> np.ndarray:
        """float32 [2, U, classes that occur], effects and gradients, classes in order of their index."""
        found = [self.sums[own].float().cpu().numpy() for own in sorted(self.sums)]
        return np.stack(found, 2) if found else np.zeros((2, len(self.activation), 0), np.float32)
