"""Stage patches: where in its exemplars each unit is active.

In: exemplars, images, the target model (run once more on the images that are exemplars, and on no others). Out: patches
(one box and its crop per exemplar) and crops (the distinct ones).

Shapes: N exemplars, M maps of one grid, H x W positions.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F

from tasks.crops import MAX_CROPS, CropSettings, grids, snap, square
from tasks.forward import HookedTarget, TargetPass
from tasks.images import covering
from tasks.layers import Block, Layer
from tasks.pixels import to_device
from tasks.store import Folder, PartReport
from tasks.tables import make_table

PEAK_SHARE = 0.5
"""The active part of a map is what reaches this share of its peak, and the unit's position quantile."""
TAILS = ("top", "bottom")
RINGS = 4
"""Rings by which parts grow before it is asked which of them are whole."""
HELD = 2**21
"""Values of maps that wait for their boxes: on a GPU one call for several batches, not one a layer and batch."""

Columns = dict[str, np.ndarray]


@dataclass
class PatchesSettings:
    k: int = 20
    """Exemplars per unit and tail that become patches; at most activations.k."""
    tails: list[str] = field(default_factory=lambda: ["top"])
    """top, bottom or both."""
    crops: CropSettings = field(default_factory=CropSettings)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"patches.k={self.k}: must be at least 1")
        if not self.tails or not set(self.tails) <= set(TAILS):
            raise ValueError(f"patches.tails={self.tails}: allowed are {', '.join(TAILS)}")


@dataclass
class PatchesJob:
    out: Folder
    model: TargetPass
    exemplars: Folder
    blocks: list[Block]
    settings: PatchesSettings


class PatchesWorker:
    """Recomputes the maps of the exemplar images of a shard and cuts their active part out.

    Batches are cut on the number of an image among all exemplar images of the run, so each but the last is full and an
    image's neighbours do not depend on the shard size. A batch that two shards share is computed for both.
    """

    def __init__(self, job: PatchesJob) -> None:
        self.job, self.images = job, job.model.images
        self.target = HookedTarget(job.model)
        self.device = self.target.device
        layers = {layer.name: number for number, layer in enumerate(job.model.layers)}
        self.layer_of = np.array([layers[block.layer] for block in job.blocks])
        self.has_map = np.array([layer.layout != "vector" for layer in job.model.layers])[self.layer_of]

    @cached_property
    def wanted(self) -> Columns:
        """All exemplars that become patches, by shard; within one by layer (forward order), unit, tail and rank."""
        blocks = [self._exemplars(part) for part in range(len(self.job.blocks))]
        found = {column: np.concatenate([block[column] for block in blocks]) for column in blocks[0]}
        order = np.argsort(found["image"] // self.images.shard_size, kind="stable")
        return {column: values[order] for column, values in found.items()}

    def _exemplars(self, part: int) -> Columns:
        """Those of one unit block, by unit, tail and rank."""
        settings, read = self.job.settings, self.job.exemplars.read
        used: list[tuple[str, str, Any]] = [("rank", "<", settings.k), ("tail", "in", settings.tails)]
        table = read("exemplars", part, columns=["unit", "tail", "rank", "image", "position"], filters=used)
        found = {column: table[column].to_numpy() for column in ("unit", "rank", "image", "position")}
        found["bottom"] = pc.call_function("equal", [table["tail"], "bottom"]).to_numpy()
        found["block"] = np.full(len(table), part)
        quantiles = read("unit_stats", part, columns=["position_quantile"])["position_quantile"].to_numpy()
        found["quantile"] = quantiles[found["unit"] - self.job.blocks[part].start]
        order = np.lexsort((found["rank"], found["bottom"], found["unit"]))
        return {column: values[order] for column, values in found.items()}

    @cached_property
    def mapped(self) -> np.ndarray:
        """Numbers of the images that are exemplars of layers with positions, in order."""
        is_one = np.zeros(len(self.images), bool)
        is_one[self.wanted["image"][self.has_map[self.wanted["block"]]]] = True
        return np.flatnonzero(is_one)

    def run(self, part: int) -> PartReport:
        report = PartReport(part)
        with report.phase("read"):
            start, stop = np.searchsorted(self.wanted["image"] // self.images.shard_size, (part, part + 1))
            rows = {column: values[start:stop] for column, values in self.wanted.items()}
        with report.phase("compute"):
            boxes, fractions = self._boxes(part, rows)
            patches, crops = self._tables(rows, boxes, fractions)
        with report.phase("write"):
            groups = np.bincount(rows["block"], minlength=len(self.job.blocks)).tolist()
            self.job.out.write(part, {"patches": patches, "crops": crops}, {"patches": groups})
        report.rows = {"patches": patches.num_rows, "crops": crops.num_rows}
        return report

    def _boxes(self, part: int, rows: Columns) -> tuple[np.ndarray, np.ndarray]:
        """float32 [N, 4] boxes as shares of the model's input, and float32 [N] active shares, in the order of `rows`.

        The model runs on the batches that hold exemplars of layers with positions; other rows keep the whole input.
        """
        size, shard, layers = self.images.batch_size, self.images.shard(part), self.job.model.layers
        start, stop = np.searchsorted(self.mapped, (shard.start, shard.stop)).tolist()
        starts = covering(start, stop, size)
        batch_of, slot = np.divmod(np.searchsorted(self.mapped, rows["image"]) - starts.start, size)
        call_of = batch_of * len(layers) + self.layer_of[rows["block"]]
        order = np.flatnonzero(self.has_map[rows["block"]])
        order = order[np.argsort(call_of[order], kind="stable")]
        ends = np.bincount(call_of[order], minlength=len(starts) * len(layers)).cumsum().tolist()

        asked = (slot, rows["unit"], rows["position"])
        slots, units, seeds = (to_device(x[order].astype(np.int64), self.device) for x in asked)
        bottom, quantiles = (to_device(rows[name][order], self.device) for name in ("bottom", "quantile"))
        signs, limits = 1 - 2.0 * bottom, quantiles.masked_fill(bottom, -torch.inf)
        places, found = torch.arange(len(order), device=self.device), torch.empty(len(order), 5, device=self.device)
        held: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        first, number_of = 0, {layer.name: number for number, layer in enumerate(layers)}

        def on_layer(layer: Layer, output: Any) -> None:
            call = first + number_of[layer.name]
            own = slice(ends[call - 1] if call else 0, ends[call])
            if own.start < own.stop:
                maps_MP = layer.maps_of(output, slots[own], units[own]).float() * signs[own, None]
                held[layer.grid].append((places[own], maps_MP))

        def after_batch(_numbers: np.ndarray) -> None:
            nonlocal first
            first += len(layers)
            if sum(maps.numel() for grid in held.values() for _, maps in grid) < HELD and first < len(ends):
                return
            for grid, waiting in held.items():
                own, maps_MP = (torch.cat(parts) for parts in zip(*waiting, strict=True))
                boxes_M4, shares_M = active_boxes(maps_MP.unflatten(1, grid), seeds[own], limits[own])
                found[own] = torch.cat([boxes_M4, shares_M[:, None]], 1)
            held.clear()

        self.target.run([self.mapped[start : start + size] for start in starts], on_layer, after_batch)
        boxes, fractions = np.tile(np.array([0, 0, 1, 1], np.float32), (len(slot), 1)), np.ones(len(slot), np.float32)
        found_N5 = found.cpu().numpy()
        boxes[order], fractions[order] = found_N5[:, :4], found_N5[:, 4]
        return boxes, fractions

    def _tables(self, rows: Columns, boxes: np.ndarray, fractions: np.ndarray) -> tuple[pa.Table, pa.Table]:
        numbers, crops = rows["image"].astype(np.int64), self.job.settings.crops
        sizes, has_map = self._sizes(numbers), self.has_map[rows["block"]]
        pixels = self.target.preprocess.to_image(boxes, *sizes.T)
        pixels = np.where(has_map[:, None], pixels, np.concatenate([0 * sizes, sizes], 1))
        snapped = snap(square(pixels, crops.context), numbers, sizes, crops.sizes)
        crop_ids = np.where(has_map, snapped, numbers * MAX_CROPS)
        columns = {
            "layer": pa.array([block.layer for block in self.job.blocks]).take(pa.array(rows["block"])),
            "tail": pa.array(TAILS).take(pa.array(rows["bottom"].astype(int))),
            "image_id": self.images.table["image_id"].take(pa.array(numbers)).combine_chunks(),
            "crop_id": crop_ids,
            "active_fraction": fractions,
        }
        columns |= {column: rows[column] for column in ("unit", "rank", "image")} | _box_columns(pixels)
        return make_table("patches", columns), self._crop_table(np.unique(crop_ids))

    def _crop_table(self, crop_ids: np.ndarray) -> pa.Table:
        numbers, places = np.divmod(crop_ids, MAX_CROPS)
        boxes, levels, shape = grids(self._sizes(numbers), self.job.settings.crops.sizes)
        columns = {"crop_id": crop_ids, "image": numbers, "level": levels[shape, places]}
        return make_table("crops", columns | _box_columns(boxes[shape, places]))

    def _sizes(self, numbers: np.ndarray) -> np.ndarray:
        """int [N, 2], width and height of images."""
        return np.stack([self.images.column(name)[numbers] for name in ("width", "height")], 1)


def _box_columns(boxes_N4: np.ndarray) -> Columns:
    return {name: boxes_N4[:, i].astype(np.float32) for i, name in enumerate(("x0", "y0", "x1", "y1"))}


def active_boxes(
    maps_MHW: torch.Tensor, seeds_M: torch.Tensor, quantiles_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Box of the connected part around each map's peak, for all maps at once.

    maps_MHW float32; seeds_M int64, flat position of the peak; quantiles_M float32, the unit's position quantile.
    The threshold is max(quantile, PEAK_SHARE * peak), never above the peak; a peak at or below zero keeps its own place
    alone. Neighbours touch by side or corner. Returns float [M, 4] boxes x0, y0, x1, y1 as shares of the map, and float
    [M], the share of the map at or above the threshold.
    """
    height, width = maps_MHW.shape[1:]
    peak = maps_MHW.flatten(1).gather(1, seeds_M[:, None])[:, 0]
    threshold = torch.minimum(torch.maximum(quantiles_M, PEAK_SHARE * peak), peak)
    above = maps_MHW >= threshold[:, None, None]
    part = connected(above, seeds_M)
    rows, columns = part.any(2), part.any(1)
    edges = [_first(columns) / width, _first(rows) / height, _last(columns) / width, _last(rows) / height]
    return torch.stack(edges, 1), above.flatten(1).float().mean(1)


def connected(above_MHW: torch.Tensor, seeds_M: torch.Tensor) -> torch.Tensor:
    """bool [M, H, W], the part of each mask that hangs together with its seed; neighbours touch by side or corner.

    Every part grows ring by ring. After RINGS of them those that grew no more are whole and take no part in the next:
    the few winding ones do not hold up the rest, and a GPU is asked once for many rings.
    """
    (count, height, width), line = above_MHW.shape, above_MHW.shape[2] + 1
    inside = F.pad(above_MHW, (0, 1, 0, 1)).flatten(1).byte()  # an empty place behind every row, a row behind every map
    seeds_M1 = (seeds_M + seeds_M // width)[:, None]
    part = torch.zeros_like(inside).scatter_(1, seeds_M1, 1) & inside
    growing = torch.arange(count, device=part.device)
    for _ in range(0, height * width, RINGS):  # a part that grows takes at least one place more in each ring
        before, mask = part[growing], inside[growing].flatten()
        grown = before.flatten()
        for _ in range(RINGS):
            grown = _with_neighbours(_with_neighbours(grown, 1), line) & mask
        part[growing] = grown.view_as(before)
        growing = growing[(grown.view_as(before) != before).any(1)]
        if not len(growing):
            break
    return part.view(count, height + 1, line)[:, :-1, :-1].bool()


def _with_neighbours(places: torch.Tensor, step: int) -> torch.Tensor:
    """Bytes with what lies `step` before and behind each: whole lines of memory at once, on any device."""
    found = places.clone()
    found[step:] |= places[:-step]
    found[:-step] |= places[step:]
    return found


def _first(line_ML: torch.Tensor) -> torch.Tensor:
    return line_ML.int().argmax(1)


def _last(line_ML: torch.Tensor) -> torch.Tensor:
    return line_ML.shape[1] - line_ML.flip(1).int().argmax(1)
