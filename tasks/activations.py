"""Stage activations: every unit of the chosen layers over one shard of images, in one pass.

In: images, image embeddings, the target model. Out: candidates (top and bottom k per unit), stats (mergeable moments,
histograms and sums), pooled (activations and negative sides, of the stored images). Memory does not grow with the
number of images.

Shapes: B images of a batch, G of a group of batches, U units of a layer, P positions, D dimensions of CLIP,
K candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tasks.decoding import prefetch
from tasks.forward import HookedTarget, TargetPass
from tasks.layers import Block, Layer
from tasks.moments import BINS, EMPTY, Moments, TopK, count_bins, key_values, order_keys
from tasks.pixels import to_device
from tasks.signs import RECTIFIED
from tasks.store import Folder, PartReport
from tasks.tables import Lists, make_table, matrix

GROUP = 8
"""Batches folded into the running statistics at once; cut on the global number of the batch."""
WRITERS = 4
"""Threads in which a shard's tables are made and encoded beside a GPU. A worker without one has no CPU for them, and
what threads free glibc keeps apart: peaks were 4 % higher with them."""


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


class Extreme:
    """The largest value of every map (sign 1), or the smallest (-1), and its place where it is asked for.

    Values are reduced as they lie in memory, several times faster than in the order of the maps. A GPU finds value and
    place in one pass; to ask it which images need a place would be to wait for it. A CPU finds values much faster than
    places: where units lie side by side it goes row by row of the grid, so that a place is one of few in one row.
    """

    def __init__(self, maps_BUP: torch.Tensor, grid: tuple[int, int], sign: int) -> None:
        best, self.find = (torch.amax, torch.max) if sign > 0 else (torch.amin, torch.min)
        self.maps_BUP, self.rows_BHU = maps_BUP, None
        together = maps_BUP.stride(1) == 1
        if maps_BUP.is_cuda:
            lying = (maps_BUP.transpose(1, 2), 1) if together else (maps_BUP, 2)
            values_BU, self.places_BU = self.find(*lying)
        elif together:
            self.maps_BHWU = maps_BUP.transpose(1, 2).unflatten(1, grid)
            self.rows_BHU = best(self.maps_BHWU, 2)
            values_BU = best(self.rows_BHU, 1)
        else:
            values_BU = best(maps_BUP, 2)
        self.values_BU = values_BU.float()

    def places(self, wanted_BU: torch.Tensor) -> torch.Tensor:
        """int32 [B, U], flat position of the first such value; -1 where a CPU need not look for it."""
        if wanted_BU.is_cuda:
            return self.places_BU.int()
        image, unit = wanted_BU.nonzero(as_tuple=True)
        if self.rows_BHU is None:
            found = self.find(self.maps_BUP[image, unit], 1).indices
        else:
            row = self.find(self.rows_BHU[image, :, unit], 1).indices
            column = self.find(self.maps_BHWU[image, row, :, unit], 1).indices
            found = row * self.maps_BHWU.shape[2] + column
        places_BU = torch.full(wanted_BU.shape, -1, dtype=torch.int32)
        places_BU[image, unit] = found.int()
        return places_BU


@dataclass
class Room:
    """What a layer's state holds, per unit."""

    k: int
    """Candidates of a tail."""
    group: int
    """Images of a group of batches."""
    stored: int
    """Images of the shard whose pooled activations are kept."""
    width: int
    """Of CLIP's vectors."""


class LayerState:
    """What is known of one layer's units [start, stop) after the batches seen so far."""

    def __init__(self, layer: Layer, chosen: slice, pool: str, room: Room, device: torch.device) -> None:
        units = chosen.stop - chosen.start
        self.layer, self.chosen, self.pool = layer, chosen, pool
        self.top, self.bottom = (TopK(units, room.k, room.group, device) for _ in range(2))
        self.moments = Moments(units, device)
        self.low = torch.full((units,), np.inf, device=device)
        self.prefix_maximum = torch.full((units,), -np.inf, device=device)
        self.position_histogram = torch.zeros(units, BINS, dtype=torch.int64, device=device)
        self.sums_2U = torch.zeros(2, units, dtype=torch.float64, device=device)
        self.embedding_sums_2UD = torch.zeros(2, units, room.width, dtype=torch.float64, device=device)
        self.explain_count = torch.zeros(units, dtype=torch.int64, device=device)
        self.group_2GU = torch.empty(2, room.group, units, device=device)
        self.waiting = 0
        pooled_2SU = torch.from_numpy(np.zeros((2, room.stored, units), np.float32))  # takes memory where it is written
        self.pooled_2SU = pooled_2SU.pin_memory() if device.type == "cuda" else pooled_2SU
        self.stored = 0

    def see(self, output: Any, batch: "Images") -> None:
        """Reduce the layer's output on one batch, before the model goes on."""
        maps_BUP = self.layer.maps(output, self.chosen)
        peak, trough = (Extreme(maps_BUP, self.layer.grid, sign) for sign in (1, -1))
        prefix = self.layer.prefix_maps(output, self.chosen)
        if prefix is not None:
            self._extreme(self.prefix_maximum, prefix.amax(2).float(), batch, torch.maximum, -np.inf)
        self._extreme(self.low, trough.values_BU, batch, torch.minimum, np.inf)
        values_BU, low_BU = peak.values_BU, trough.values_BU
        if self.pool != "max":
            values_BU = low_BU = self.layer.pooled(output, self.pool, self.chosen)
        self._rank(self.top, values_BU, peak, batch.explain[:, None] & values_BU.isfinite(), batch)
        below_BU = batch.explain[:, None] & low_BU.isfinite() & (low_BU < 0)
        if below_BU.is_cuda or below_BU.any():
            self._rank(self.bottom, -low_BU, trough, below_BU, batch)
        rows = slice(self.waiting, self.waiting + len(values_BU))
        self.group_2GU[0, rows], self.group_2GU[1, rows] = values_BU, low_BU
        self.waiting = rows.stop
        if len(batch.sampled):
            x, back = (maps_BUP, False) if maps_BUP.stride(1) != 1 else (maps_BUP.transpose(1, 2), True)
            chosen = x[batch.sampled].float()  # copied as it lies
            count_bins(self.position_histogram, chosen.transpose(1, 2) if back else chosen)

    def _extreme(
        self, running: torch.Tensor, values_BU: torch.Tensor, batch: "Images", pick: Any, neutral: float
    ) -> None:
        keep = batch.valid[:, None] & values_BU.isfinite()
        reduced = torch.where(keep, values_BU, neutral)
        running.copy_(pick(running, reduced.amax(0) if neutral < 0 else reduced.amin(0)))

    def _rank(
        self, tail: TopK, values_BU: torch.Tensor, extreme: Extreme, keep_BU: torch.Tensor, batch: "Images"
    ) -> None:
        keys_BU = torch.where(keep_BU, order_keys(values_BU, batch.order[:, None]), EMPTY)
        tail.add(keys_BU, extreme.places(tail.enters(keys_BU)))

    def fold(self, group: "Images") -> None:
        """Fold the waiting batches into the running statistics."""
        values_GU, low_GU = self.group_2GU[:, : self.waiting]
        self.waiting = 0
        finite = group.valid[:, None] & values_GU.isfinite()
        self.top.merge()
        self.bottom.merge()
        self.moments.add(values_GU, finite, group.valid)
        keep = finite & group.explain[:, None]
        a_GU = torch.where(keep, values_GU, 0)
        for power, x_GU in enumerate((a_GU, a_GU**3)):
            self.sums_2U[power] += x_GU.double().sum(0)
            self.embedding_sums_2UD[power] += x_GU.T @ group.embeddings  # float64 += float32, without a copy
        self.explain_count += keep.sum(0)
        rows = slice(self.stored, self.stored + len(group.stored))
        self.stored = rows.stop
        self.pooled_2SU[0, rows].copy_(torch.where(finite, values_GU, 0)[group.stored], non_blocking=True)
        below = finite & low_GU.isfinite() & (low_GU < RECTIFIED)
        negative = torch.where(below, -low_GU, 0)[group.stored]
        if negative.is_cuda or negative.any():  # to ask a GPU is to wait for it
            self.pooled_2SU[1, rows].copy_(negative, non_blocking=True)


@dataclass
class Images:
    """What is known of the images of a shard, or of consecutive batches of it, on the device; rows are slots."""

    valid: torch.Tensor
    explain: torch.Tensor
    order: torch.Tensor
    embeddings: torch.Tensor
    """[slots, D], zero outside explain."""
    stored: torch.Tensor
    """int64, slots whose pooled activations are kept."""
    sampled: torch.Tensor
    """int64, slots whose positions enter the histogram."""


class ActivationsWorker:
    """One pass of the target model over a shard."""

    def __init__(self, job: ActivationsJob) -> None:
        self.job, self.images = job, job.model.images
        self.target = HookedTarget(job.model)
        self.device = self.target.device
        self.writers = WRITERS if self.device.type == "cuda" else 0

    def run(self, part: int) -> PartReport:
        report = PartReport(part)
        with report.phase("read"):
            embeddings_ND = matrix(self.job.image_embeddings.read("image_embeddings", part)["embedding"]).astype(
                np.float32
            )
        with report.phase("compute"):
            stored = int(self.images.stored[np.array(self.images.shard(part))].sum())
            room = Room(self.job.settings.k, GROUP * self.images.batch_size, stored, embeddings_ND.shape[1])
            states = {x.name: self._states(x, room) for x in self.job.model.layers}
            self._pass(part, states, embeddings_ND)
        with report.phase("write"):
            tables, groups = self._tables(states)
            self.job.out.write(part, tables, groups, self.writers)
        report.rows = {name: table.num_rows for name, table in tables.items()}
        nonfinite = sum(int(s.moments.nonfinite.sum()) for s in chain.from_iterable(states.values()))
        report.skipped = {"nonfinite_activations": nonfinite} if nonfinite else {}
        return report

    def _states(self, layer: Layer, room: Room) -> list[LayerState]:
        """One for all units of a layer; one for each block of latents, whose maps are too many to hold together."""
        chosen = [slice(0, layer.num_units)]
        if layer.kind == "latents":
            chosen = [slice(block.start, block.stop) for block in self.job.blocks if block.layer == layer.name]
        return [LayerState(layer, units, self.job.pool, room, self.device) for units in chosen]

    def _pass(self, part: int, states: dict[str, list[LayerState]], embeddings_ND: np.ndarray) -> None:
        batches, size = self.images.shard_batches(part), self.images.batch_size
        cut = self._images(part, embeddings_ND, len(batches) * size)
        seen = [cut(i * size, (i + 1) * size) for i in range(len(batches))]
        full = [i + 1 for i, numbers in enumerate(batches) if (numbers[0] // size + 1) % GROUP == 0]
        groups = {j: cut(i * size, j * size) for i, j in pairwise(sorted({0, *full, len(batches)}))}
        done = 0

        def on_layer(layer: Layer, output: Any) -> None:
            for state in states[layer.name]:
                state.see(output, seen[done])

        def after_batch(_numbers: np.ndarray) -> None:
            nonlocal done
            done += 1
            if done in groups:
                for state in chain.from_iterable(states.values()):
                    state.fold(groups[done])

        self.target.run(batches, on_layer, after_batch)
        if self.device.type == "cuda":  # once a shard: all that was copied on the way has come
            torch.cuda.synchronize(self.device)

    def _images(self, part: int, embeddings_ND: np.ndarray, slots: int) -> Callable[[int, int], Images]:
        """Cuts slots [start, stop) of the shard out of what lies on the device, to which all is copied at once."""
        images, numbers = self.images, np.array(self.images.shard(part))
        explain = images.explain[numbers]
        columns = (images.ok[numbers], explain, images.order[numbers], embeddings_ND * explain[:, None])
        whole = [to_device(_padded(values, slots), self.device) for values in columns]
        chosen = [np.flatnonzero(mask[numbers]) for mask in (images.stored, images.sampled)]
        copies = [to_device(places, self.device) for places in chosen]

        def cut(start: int, stop: int) -> Images:
            inside = (slice(*np.searchsorted(places, (start, stop))) for places in chosen)
            return Images(
                *(values[start:stop] for values in whole), *(p[i] - start for p, i in zip(copies, inside, strict=True))
            )

        return cut

    def _tables(self, states: dict[str, list[LayerState]]) -> tuple[dict[str, pa.Table], dict[str, list[int]]]:
        by_rank = np.argsort(self.images.order)

        def of_block(block: Block) -> tuple[pa.Table, pa.Table, pa.Table]:
            state = next(s for s in states[block.layer] if block.start < s.chosen.stop)
            units = slice(block.start - state.chosen.start, block.stop - state.chosen.start)
            return _candidates(state, block, units, by_rank), _stats(state, block, units), _pooled(state, block, units)

        found = zip(*prefetch(of_block, self.job.blocks, self.writers, self.writers), strict=True)
        tables = dict(zip(("candidates", "stats", "pooled"), found, strict=True))
        groups = {name: [t.num_rows for t in blocks] for name, blocks in tables.items()}
        return {name: pa.concat_tables(blocks) for name, blocks in tables.items()}, groups


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    """With zeros, or False, behind."""
    return np.concatenate([values, np.zeros((length - len(values), *values.shape[1:]), values.dtype)])


def _candidates(state: LayerState, block: Block, units: slice, by_rank: np.ndarray) -> pa.Table:
    tails = []
    signed = (state.bottom.keys[units].amax(1) != EMPTY).cpu().numpy()
    for tail, top, rows, sign in (("top", state.top, slice(None), 1), ("bottom", state.bottom, signed, -1)):
        keys, positions = top.keys[units].cpu().numpy()[rows], top.positions[units].cpu().numpy()[rows]
        best_first = np.argsort(keys, axis=1)[:, ::-1]
        keys, positions = (np.take_along_axis(values, best_first, 1) for values in (keys, positions))
        filled = keys != EMPTY
        values, order = key_values(keys[filled])
        columns = {"image": by_rank[order].astype(np.int32), "activation": sign * values, "position": positions[filled]}
        numbers = np.arange(block.start, block.stop)[rows]
        lists = {c: Lists(filled.sum(1), values) for c, values in columns.items()}
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
    values_2US = state.pooled_2SU[:, :, units].mT.contiguous().numpy()
    # A power of two: float16 keeps the same 11 bits of a value whatever the scale, so its shard leaves no trace.
    _, exponent = np.frexp(np.abs(values_2US).max((0, 2), initial=0))
    scale = np.ldexp(np.float32(1), exponent - 11).astype(np.float32)
    columns = {"layer": [block.layer] * len(block), "unit": np.arange(block.start, block.stop), "scale": scale}
    activation, negative = (values_2US / scale[:, None]).astype(np.float16)
    return make_table("pooled", columns | {"activation": activation, "negative": negative})
