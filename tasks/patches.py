"""Stage patches: where in its exemplars each unit is active.

In: exemplars re-keyed by image, images, the target model (run once more on the images that are exemplars). Out: patches
(one box and its crop per exemplar) and crops (the distinct ones).

Shapes: M maps of one layer and batch, H x W positions.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F

from tasks.crops import MAX_CROPS, CropSettings, crop_grid, snap, square
from tasks.forward import HookedTarget, TargetPass
from tasks.layers import Block, Layer
from tasks.store import Folder, PartReport
from tasks.tables import make_table

PEAK_SHARE = 0.5
"""The active part of a map is what reaches this share of its peak, and the unit's position quantile."""
EXEMPLAR_COLUMNS = ["layer", "unit", "tail", "rank", "image", "activation", "position"]


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
        if not self.tails or not set(self.tails) <= {"top", "bottom"}:
            raise ValueError(f"patches.tails={self.tails}: allowed are top, bottom")


@dataclass
class PatchesJob:
    out: Folder
    model: TargetPass
    exemplars: Folder
    blocks: list[Block]
    settings: PatchesSettings


class PatchesWorker:
    """Recomputes the maps of the exemplar images of a shard and cuts their active part out."""

    def __init__(self, job: PatchesJob) -> None:
        self.job, self.images = job, job.model.images
        self.target = HookedTarget(job.model)
        self.device = self.target.device

    def run(self, part: int) -> PartReport:
        report = PartReport(part)
        with report.phase("read"):
            wanted = self._wanted(part)
        with report.phase("compute"):
            boxes, fractions = self._boxes(part, wanted)
            patches, crops = self._tables(wanted, boxes, fractions)
        with report.phase("write"):
            self.job.out.write(part, {"patches": patches, "crops": crops}, {"patches": self._groups(patches)})
        report.rows = {"patches": patches.num_rows, "crops": crops.num_rows}
        return report

    def _wanted(self, part: int) -> pa.Table:
        """Exemplars that lie in this shard, sorted by layer (forward order), unit, tail and rank."""
        shard, exemplars = self.images.shard(part), self.job.exemplars
        within: list[tuple[str, str, Any]] = [("image", ">=", shard.start), ("image", "<", shard.stop)]
        within += [("rank", "<", self.job.settings.k), ("tail", "in", self.job.settings.tails)]
        layers = {layer.name: number for number, layer in enumerate(self.job.model.layers)}
        unit_stats = exemplars.read_all("unit_stats", columns=["layer", "unit", "position_quantile"])
        found = exemplars.read_all("exemplars", columns=EXEMPLAR_COLUMNS, filters=within)
        found = found.join(unit_stats, ["layer", "unit"])
        place = np.array([layers[name] for name in found["layer"].to_pylist()], np.int64)
        tail = pc.call_function("equal", [found["tail"], "bottom"]).to_numpy()
        order = np.lexsort((found["rank"].to_numpy(), tail, found["unit"].to_numpy(), place))
        return found.take(order)

    def _boxes(self, part: int, wanted: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """float [N, 4] boxes as shares of the model's input, and float [N] active shares, in the order of `wanted`.

        The model runs on the batches that hold exemplars of layers with positions; other rows keep the whole input.
        """
        column = {c: wanted[c].to_numpy(zero_copy_only=False) for c in wanted.column_names}
        batch_of, slot = np.divmod(column["image"] - self.images.shard(part).start, self.images.batch_size)
        rows_of = _group_rows(column["layer"], batch_of, np.flatnonzero(self._has_map(column["layer"])))
        boxes, fractions = np.tile([0.0, 0.0, 1.0, 1.0], (len(slot), 1)), np.ones(len(slot))
        running = sorted({batch for _, batch in rows_of})
        current = iter(running)
        batch = next(current, -1)

        def device(values: np.ndarray, dtype: type) -> torch.Tensor:
            return torch.from_numpy(values.astype(dtype)).to(self.device)

        def on_layer(layer: Layer, output: Any) -> None:
            rows = rows_of.get((layer.name, batch))
            if rows is None:
                return
            top = column["tail"][rows] == "top"
            at, units = device(slot[rows], np.int64), device(column["unit"][rows], np.int64)
            maps_MHW = layer.maps_of(output, at, units).float().unflatten(1, layer.grid)
            maps_MHW *= device(np.where(top, 1, -1), np.float32)[:, None, None]
            quantiles = device(np.where(top, column["position_quantile"][rows], -np.inf), np.float32)
            found = active_boxes(maps_MHW, device(column["position"][rows], np.int64), quantiles)
            boxes[rows], fractions[rows] = found[0].cpu().numpy(), found[1].cpu().numpy()

        def after_batch(_numbers: np.ndarray) -> None:
            nonlocal batch
            batch = next(current, -1)

        batches = self.images.shard_batches(part)
        self.target.run([batches[b] for b in running], on_layer, after_batch)
        return boxes, fractions

    def _has_map(self, layers: np.ndarray) -> np.ndarray:
        """bool, whether the layer of each row has positions."""
        return np.isin(layers.astype(str), [layer.name for layer in self.job.model.layers if layer.layout != "vector"])

    def _tables(self, wanted: pa.Table, boxes: np.ndarray, fractions: np.ndarray) -> tuple[pa.Table, pa.Table]:
        images, crops = self.images, self.job.settings.crops
        numbers = wanted["image"].to_numpy().astype(np.int64)
        width, height = images.column("width")[numbers], images.column("height")[numbers]
        whole = np.stack([0 * width, 0 * width, width, height], 1).astype(np.float64)
        has_map = self._has_map(wanted["layer"].to_numpy(zero_copy_only=False))
        pixels = np.where(has_map[:, None], self.target.preprocess.to_image(boxes, width, height), whole)
        snapped = snap(square(pixels, crops.context), numbers, np.stack([width, height], 1), crops.sizes)
        crop_ids = np.where(has_map, snapped, numbers * MAX_CROPS)
        columns = {c: wanted[c] for c in ("layer", "unit", "tail", "rank", "image")}
        columns |= {"image_id": images.ids[numbers], "crop_id": crop_ids, "active_fraction": fractions}
        patches = make_table("patches", {c: _plain(v) for c, v in (columns | _box_columns(pixels)).items()})
        return patches, self._crop_table(np.unique(crop_ids))

    def _crop_table(self, crop_ids: np.ndarray) -> pa.Table:
        numbers, places = np.divmod(crop_ids, MAX_CROPS)
        width, height = self.images.column("width"), self.images.column("height")
        grids = [crop_grid(int(width[i]), int(height[i]), self.job.settings.crops.sizes) for i in numbers]
        chosen = [(boxes[p], levels[p]) for (boxes, levels), p in zip(grids, places, strict=True)]
        columns = {"crop_id": crop_ids, "image": numbers, "level": [level for _, level in chosen]}
        boxes = np.array([box for box, _ in chosen]).reshape(-1, 4)  # also where a shard has no exemplars
        return make_table("crops", columns | _box_columns(boxes))

    def _groups(self, patches: pa.Table) -> list[int]:
        """Rows of each unit block; the table is sorted by layer and unit."""
        layer, unit = patches["layer"].to_numpy(zero_copy_only=False), patches["unit"].to_numpy()
        return [int(((layer == b.layer) & (unit >= b.start) & (unit < b.stop)).sum()) for b in self.job.blocks]


def _plain(values: Any) -> Any:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _box_columns(boxes_N4: np.ndarray) -> dict[str, np.ndarray]:
    return {name: boxes_N4[:, i].astype(np.float32) for i, name in enumerate(("x0", "y0", "x1", "y1"))}


def _group_rows(layers: np.ndarray, batches: np.ndarray, rows: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """Of the given rows, their numbers by (layer, batch)."""
    found: dict[tuple[str, int], list[int]] = defaultdict(list)
    for row, layer, batch in zip(rows.tolist(), layers[rows], batches[rows].tolist(), strict=True):
        found[layer, batch].append(row)
    return {key: np.array(numbers) for key, numbers in found.items()}


def active_boxes(
    maps_MHW: torch.Tensor, seeds_M: torch.Tensor, quantiles_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Box of the connected part around each map's peak, for all maps at once.

    maps_MHW float32; seeds_M int64, flat position of the peak; quantiles_M float32, the unit's position quantile.
    The threshold is max(quantile, PEAK_SHARE * peak), never above the peak; a peak at or below zero keeps its own place
    alone. Neighbours touch by side or corner. Returns float [M, 4] boxes x0, y0, x1, y1 as shares of the map, and float
    [M], the share of the map at or above the threshold.
    """
    count, height, width = maps_MHW.shape
    peak = maps_MHW.flatten(1).gather(1, seeds_M[:, None])[:, 0]
    threshold = torch.minimum(torch.maximum(quantiles_M, PEAK_SHARE * peak), peak)
    above = maps_MHW >= threshold[:, None, None]
    part = F.one_hot(seeds_M, height * width).view(count, height, width).bool()
    while True:
        grown = (F.max_pool2d(part[:, None].float(), 3, 1, 1)[:, 0] > 0) & above
        if torch.equal(grown, part):
            break
        part = grown
    rows, columns = part.any(2), part.any(1)
    edges = [_first(columns) / width, _first(rows) / height, _last(columns) / width, _last(rows) / height]
    return torch.stack(edges, 1), above.flatten(1).float().mean(1)


def _first(line_ML: torch.Tensor) -> torch.Tensor:
    return line_ML.int().argmax(1)


def _last(line_ML: torch.Tensor) -> torch.Tensor:
    return line_ML.shape[1] - line_ML.flip(1).int().argmax(1)
