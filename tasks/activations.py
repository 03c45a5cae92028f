"""Stage activations: every unit of the chosen layers over one shard of images, in one pass.

In: images, image embeddings, the target model. Out: candidates (top and bottom k per unit), stats (mergeable moments,
histograms and sums), pooled (activations and negative sides, of the stored images). Memory does not grow with the
number of images.

Shapes: B images of a batch, G of a group of batches, U units of a layer, P positions, D dimensions of CLIP,
K candidates.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tasks.forward import HookedTarget, TargetPass
from tasks.layers import Block, Layer
from tasks.moments import BINS, EMPTY, Moments, TopK, count_bins, key_values, order_keys
from tasks.store import Folder, PartReport
from tasks.tables import make_table, matrix

GROUP = 8
"""Batches folded into the running statistics at once; cut on the global number of the batch."""


@dataclass
class ActivationsSettings:
    k: int = 100
    """Exemplars kept per unit and tail."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"activations.k={self.k}: must be at least 1")


@dataclass
class ActivationsJob:
    out: Folder
    model: TargetPass
    image_embeddings: Folder
    blocks: list[Block]
    pool: str
    settings: ActivationsSettings


class LayerState:
    """What is known of one layer's units [start, stop) after the batches seen so far."""

    def __init__(self, layer: Layer, chosen: slice, k: int, width: int, pool: str, device: torch.device) -> None:
        units = chosen.stop - chosen.start
        self.layer, self.chosen, self.pool = layer, chosen, pool
        self.top, self.bottom = TopK(units, k, device), TopK(units, k, device)
        self.moments = Moments(units, device)
        self.low = torch.full((units,), np.inf, device=device)
        self.prefix_maximum = torch.full((units,), -np.inf, device=device)
        self.position_histogram = torch.zeros(units, BINS, dtype=torch.int64, device=device)
        self.sums_2U = torch.zeros(2, units, dtype=torch.float64, device=device)
        self.embedding_sums_2UD = torch.zeros(2, units, width, dtype=torch.float64, device=device)
        self.explain_count = torch.zeros(units, dtype=torch.int64, device=device)
        self.group: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.pooled: list[torch.Tensor] = []
        self.negative: list[torch.Tensor] = []

    def see(self, output: Any, batch: "Batch") -> None:
        """Reduce the layer's output on one batch, before the model goes on."""
        maps_BUP = self.layer.maps(output, self.chosen)
        peak_BU, trough_BU = maps_BUP.amax(2).float(), maps_BUP.amin(2).float()
        prefix = self.layer.prefix_maps(output, self.chosen)
        if prefix is not None:
            self._extreme(self.prefix_maximum, prefix.amax(2).float(), batch, torch.maximum, -np.inf)
        self._extreme(self.low, trough_BU, batch, torch.minimum, np.inf)
        values_BU, low_BU = peak_BU, trough_BU
        if self.pool != "max":
            values_BU = low_BU = self.layer.pooled(output, self.pool, self.chosen)
        self._rank(self.top, values_BU, maps_BUP, batch.explain[:, None] & values_BU.isfinite(), batch)
        below = batch.explain[:, None] & low_BU.isfinite() & (low_BU < 0)
        if below.is_cuda or below.any():
            self._rank(self.bottom, -low_BU, -maps_BUP, below, batch)
        self.group.append((values_BU, low_BU))
        if len(batch.sampled):
            maps = maps_BUP[batch.sampled].float()
            count_bins(self.position_histogram, maps, torch.ones(maps.shape[:2], dtype=torch.bool, device=maps.device))

    def _extreme(
        self, running: torch.Tensor, values_BU: torch.Tensor, batch: "Batch", pick: Any, neutral: float
    ) -> None:
        keep = batch.valid[:, None] & values_BU.isfinite()
        reduced = torch.where(keep, values_BU, neutral)
        running.copy_(pick(running, reduced.amax(0) if neutral < 0 else reduced.amin(0)))

    def _rank(
        self, tail: TopK, values_BU: torch.Tensor, maps_BUP: torch.Tensor, keep_BU: torch.Tensor, batch: "Batch"
    ) -> None:
        keys = torch.where(keep_BU, order_keys(values_BU, batch.order[:, None]), EMPTY)
        if keys.is_cuda:
            positions = maps_BUP.argmax(2).int()
        else:  # a CPU finds a maximum much faster than its place: look only where the image becomes a candidate
            positions = torch.full_like(keys, -1, dtype=torch.int32)
            image, unit = tail.enters(keys).nonzero(as_tuple=True)
            positions[image, unit] = maps_BUP[image, unit].argmax(1).int()
        tail.add(keys, positions)

    def fold(self, group: "Group") -> None:
        """Fold the waiting batches into the running statistics."""
        values_GU, low_GU = (torch.cat(batches) for batches in zip(*self.group, strict=True))
        self.group = []
        finite = group.valid[:, None] & values_GU.isfinite()
        self.top.merge()
        self.bottom.merge()
        self.moments.add(values_GU, finite, group.valid)
        keep = finite & group.explain[:, None]
        a_GU = torch.where(keep, values_GU, 0)
        for power, x_GU in enumerate((a_GU, a_GU**3)):
            self.sums_2U[power] += x_GU.double().sum(0)
            self.embedding_sums_2UD[power] += (x_GU.T @ group.embeddings).double()
        self.explain_count += keep.sum(0)
        self.pooled.append(torch.where(finite, values_GU, 0)[group.stored].cpu())
        below = finite & low_GU.isfinite() & (low_GU < 0)
        negative = torch.where(below, -low_GU, 0)[group.stored].cpu()
        self.negative.append(negative if negative.any() else torch.zeros(1, 1).expand_as(negative))  # takes no memory


@dataclass
class Batch:
    """Masks of one batch on the device; `sampled` holds slots whose positions enter the histogram."""

    valid: torch.Tensor
    explain: torch.Tensor
    order: torch.Tensor
    sampled: torch.Tensor


@dataclass
class Group:
    """The same for the images of a group of batches, with their image embeddings [G, D] (zero outside explain)."""

    valid: torch.Tensor
    explain: torch.Tensor
    stored: torch.Tensor
    embeddings: torch.Tensor


class ActivationsWorker:
    """One pass of the target model over a shard."""

    def __init__(self, job: ActivationsJob) -> None:
        self.job, self.images = job, job.model.images
        self.target = HookedTarget(job.model)
        self.device = self.target.device

    def run(self, part: int) -> PartReport:
        report = PartReport(part)
        with report.phase("read"):
            first = self.images.shard(part).start
            embeddings_ND = matrix(self.job.image_embeddings.read("image_embeddings", part)["embedding"]).astype(
                np.float32
            )
        with report.phase("compute"):
            states = {x.name: self._states(x, embeddings_ND.shape[1]) for x in self.job.model.layers}
            self._pass(part, states, embeddings_ND, first)
        with report.phase("write"):
            tables, groups = self._tables(states)
            self.job.out.write(part, tables, groups)
        report.rows = {name: table.num_rows for name, table in tables.items()}
        nonfinite = sum(int(s.moments.nonfinite.sum()) for s in chain.from_iterable(states.values()))
        report.skipped = {"nonfinite_activations": nonfinite} if nonfinite else {}
        return report

    def _states(self, layer: Layer, width: int) -> list[LayerState]:
        """One for all units of a layer; one for each block of latents, whose maps are too many to hold together."""
        chosen = [slice(0, layer.num_units)]
        if layer.kind == "latents":
            chosen = [slice(block.start, block.stop) for block in self.job.blocks if block.layer == layer.name]
        k, pool = self.job.settings.k, self.job.pool
        return [LayerState(layer, units, k, width, pool, self.device) for units in chosen]

    def _pass(self, part: int, states: dict[str, list[LayerState]], embeddings_ND: np.ndarray, first: int) -> None:
        batches = self.images.shard_batches(part)
        masks = {int(numbers[0]): self._batch(numbers) for numbers in batches}
        group: list[np.ndarray] = []
        current = iter(masks.values())
        batch = next(current)

        def on_layer(layer: Layer, output: Any) -> None:
            for state in states[layer.name]:
                state.see(output, batch)

        def after_batch(numbers: np.ndarray) -> None:
            nonlocal batch
            group.append(numbers)
            last = numbers[0] == batches[-1][0]
            if last or (numbers[0] // self.images.batch_size + 1) % GROUP == 0:
                folded = self._group(group, embeddings_ND, first)
                for state in chain.from_iterable(states.values()):
                    state.fold(folded)
                group.clear()
            batch = batch if last else next(current)

        self.target.run(batches, on_layer, after_batch)

    def _padded(self, values: np.ndarray, numbers: np.ndarray, fill: Any) -> torch.Tensor:
        padded = np.full(self.images.batch_size, fill, dtype=values.dtype)
        padded[: len(numbers)] = values[numbers]
        return torch.from_numpy(padded).to(self.device)

    def _batch(self, numbers: np.ndarray) -> Batch:
        images = self.images
        sampled = torch.from_numpy(np.flatnonzero(images.sampled[numbers])).to(self.device)
        explain = self._padded(images.explain, numbers, False)
        return Batch(self._padded(images.ok, numbers, False), explain, self._padded(images.order, numbers, 0), sampled)

    def _group(self, batches: list[np.ndarray], embeddings_ND: np.ndarray, first: int) -> Group:
        images, size = self.images, self.images.batch_size
        embeddings = np.zeros((len(batches) * size, embeddings_ND.shape[1]), np.float32)
        for slot, numbers in enumerate(batches):
            known = embeddings_ND[numbers - first] * images.explain[numbers][:, None]
            embeddings[slot * size : slot * size + len(numbers)] = known
        columns = (images.ok, images.explain, images.stored)
        valid, explain, stored = (torch.cat([self._padded(c, n, False) for n in batches]) for c in columns)
        return Group(valid, explain, stored, torch.from_numpy(embeddings).to(self.device))

    def _tables(self, states: dict[str, list[LayerState]]) -> tuple[dict[str, pa.Table], dict[str, list[int]]]:
        by_rank = np.argsort(self.images.order)
        candidates, stats, pooled = [], [], []
        for block in self.job.blocks:
            state = next(s for s in states[block.layer] if block.start < s.chosen.stop)
            units = slice(block.start - state.chosen.start, block.stop - state.chosen.start)
            candidates.append(_candidates(state, block, units, by_rank))
            stats.append(_stats(state, block, units))
            pooled.append(_pooled(state, block, units))
        tables = {"candidates": candidates, "stats": stats, "pooled": pooled}
        groups = {name: [t.num_rows for t in found] for name, found in tables.items()}
        return {name: pa.concat_tables(found) for name, found in tables.items()}, groups


def _candidates(state: LayerState, block: Block, units: slice, by_rank: np.ndarray) -> pa.Table:
    tails = []
    signed = (state.bottom.keys[units, 0] != EMPTY).cpu().numpy()
    for tail, top, rows, sign in (("top", state.top, slice(None), 1), ("bottom", state.bottom, signed, -1)):
        keys, positions = top.keys[units].cpu().numpy()[rows], top.positions[units].cpu().numpy()[rows]
        filled = keys != EMPTY
        values, order = key_values(keys[filled])
        offsets = pa.array(np.concatenate([[0], filled.sum(1).cumsum()]).astype(np.int32))
        columns = {"image": by_rank[order].astype(np.int32), "activation": sign * values, "position": positions[filled]}
        numbers = np.arange(block.start, block.stop)[rows]
        lists = {c: pa.ListArray.from_arrays(offsets, pa.array(v)) for c, v in columns.items()}
        keys_of = {"layer": [block.layer] * len(numbers), "unit": numbers, "tail": [tail] * len(numbers)}
        tails.append(make_table("candidates", keys_of | lists))
    return pa.concat_tables(tails)


def _stats(state: LayerState, block: Block, units: slice) -> pa.Table:
    def get(tensor: torch.Tensor, dtype: Any) -> np.ndarray:
        return tensor[units].cpu().numpy().astype(dtype)

    m = state.moments
    prefix = pa.nulls(len(block), pa.float32()) if not state.layer.prefix else get(state.prefix_maximum, np.float32)
    columns = {
        "layer": [block.layer] * len(block),
        "unit": np.arange(block.start, block.stop),
        "count": get(m.count, np.int64),
        "nonfinite": get(m.nonfinite, np.int64),
        "mean": get(m.mean, np.float64),
        "m2": get(m.m2, np.float64),
        "minimum": get(m.minimum, np.float32),
        "maximum": get(m.maximum, np.float32),
        "low": get(state.low, np.float32),
        "prefix_maximum": prefix,
        "histogram": get(m.histogram, np.int64),
        "position_histogram": get(state.position_histogram, np.int64),
        "explain_count": get(state.explain_count, np.int64),
        "sum": get(state.sums_2U[0], np.float64),
        "sum_cubed": get(state.sums_2U[1], np.float64),
        "embedding_sum": get(state.embedding_sums_2UD[0], np.float32),
        "embedding_sum_cubed": get(state.embedding_sums_2UD[1], np.float32),
    }
    return make_table("stats", columns)


def _pooled(state: LayerState, block: Block, units: slice) -> pa.Table:
    both = {"activation": state.pooled, "negative": state.negative}
    values_US = {c: torch.cat([x[:, units] for x in parts]).T.contiguous().numpy() for c, parts in both.items()}
    # A power of two: float16 keeps the same 11 bits of a value whatever the scale, so its shard leaves no trace.
    _, exponent = np.frexp(np.maximum(*(np.abs(v).max(1, initial=0) for v in values_US.values())))
    scale = np.ldexp(np.float32(1), exponent - 11).astype(np.float32)
    columns = {"layer": [block.layer] * len(block), "unit": np.arange(block.start, block.stop), "scale": scale}
    return make_table("pooled", columns | {c: (v / scale[:, None]).astype(np.float16) for c, v in values_US.items()})
