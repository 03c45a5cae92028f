"""Stage exemplars: the shards' candidates and statistics merged, one unit block at a time.

In: candidates and stats of every shard. Out: exemplars (the top k images of each unit under the total order, the bottom
k of units that go below zero) and unit_stats (one row a unit). An image that excites a unit no more than the one that
excites it least says nothing about it: a unit that three images excite has three exemplars, a dead one none.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tasks.images import ImageList
from tasks.layers import Block
from tasks.moments import EMPTY, order_keys, quantile
from tasks.store import Folder, PartReport
from tasks.tables import make_table, matrix

POSITION_QUANTILE = 0.995
"""Share of positions below the threshold of a unit's map, as in Network Dissection (Bau et al. 2017: 0.005 above)."""
HELD = 32
"""Shards whose candidates are held until all but the best are let go: memory does not grow with the shards."""


@dataclass
class ExemplarsJob:
    out: Folder
    images: ImageList
    activations: Folder
    blocks: list[Block]
    k: int


class ExemplarsWorker:
    """Merges one unit block over all shards, in shard order."""

    def __init__(self, job: ExemplarsJob) -> None:
        self.job = job

    def run(self, part: int) -> PartReport:
        report, job, block = PartReport(part), self.job, self.job.blocks[part]
        tails, stats = [Best(tail, job.k, job.images) for tail in ("top", "bottom")], Stats(block)
        for shard in range(job.images.num_shards):
            with report.phase("read"):
                candidates = job.activations.read("candidates", shard, group=part)
                of_shard = job.activations.read("stats", shard, group=part)
            with report.phase("compute"):
                stats.add(of_shard)
                for best in tails:
                    best.add(candidates)
        with report.phase("compute"):
            exemplars = pa.concat_tables([best.table(block, stats) for best in tails])
            written = {"exemplars": exemplars, "unit_stats": stats.table()}
        with report.phase("write"):
            job.out.write(part, written)
        report.rows = {name: table.num_rows for name, table in written.items()}
        return report


class Best:
    """The k best candidates of each unit in one tail, of all shards so far."""

    def __init__(self, tail: str, k: int, images: ImageList) -> None:
        self.tail, self.k, self.images = tail, k, images
        self.held: list[dict[str, np.ndarray]] = []

    def add(self, candidates: pa.Table) -> None:
        """Of the next shard, as it is stored: lists of units."""
        rows = candidates.filter(pc.call_function("equal", [candidates["tail"], self.tail]))
        lists = {name: rows[name].combine_chunks() for name in ("image", "activation", "position")}
        lengths = np.diff(lists["image"].offsets.to_numpy())
        held = {name: values.flatten().to_numpy() for name, values in lists.items()}
        self.held.append(held | {"unit": np.repeat(rows["unit"].to_numpy(), lengths)})
        if len(self.held) > HELD:
            self._let_go()

    def _let_go(self) -> np.ndarray:
        """Hold the best alone, by unit and rank; their ranks."""
        columns = {name: np.concatenate([held[name] for held in self.held]) for name in self.held[0]}
        sign = 1 if self.tail == "top" else -1
        order = torch.from_numpy(self.images.order[columns["image"]])
        rank, best = _best(columns["unit"], order_keys(torch.from_numpy(sign * columns["activation"]), order), self.k)
        self.held = [{name: values[best] for name, values in columns.items()}]
        return rank

    def table(self, block: Block, stats: "Stats") -> pa.Table:
        """In exemplars' schema, without those that lie no higher (bottom: lower) than all images do."""
        rank, columns = self._let_go(), self.held[0]
        activation, unit = columns["activation"], columns["unit"] - block.start
        above, below = activation > stats.columns["minimum"][unit], activation < stats.columns["maximum"][unit]
        excites = above if self.tail == "top" else below
        rank, columns = rank[excites], {name: values[excites] for name, values in columns.items()}
        said = {"layer": [block.layer] * len(rank), "tail": pa.repeat(self.tail, len(rank)), "rank": rank}
        return make_table("exemplars", columns | said | {"image_id": self.images.ids[columns["image"]]})


def _best(units: np.ndarray, keys: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest keys of each unit, by unit and rank: int [n] ranks from 0, int [n] places among the keys.

    The keys of a unit become a row of a matrix: its top-k is found much sooner than all of them are sorted.
    """
    if not len(units):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    row = units - units.min()
    counts = np.bincount(row)
    order = np.argsort(row.astype(np.min_scalar_type(len(counts))), kind="stable")  # of 16 bits NumPy sorts by radix
    starts = counts.cumsum() - counts
    place = np.arange(len(row)) - np.repeat(starts, counts)
    laid = torch.full((len(counts), int(counts.max())), EMPTY)
    laid[torch.from_numpy(row[order]), torch.from_numpy(place)] = keys[torch.from_numpy(order)]
    top, column = laid.topk(min(k, laid.shape[1]), dim=1)
    filled = (top != EMPTY).numpy()
    return np.nonzero(filled)[1], order[(starts[:, None] + column.numpy())[filled]]


ADDED = ("nonfinite", "explain_count", "sum", "sum_cubed")
ADDED_LISTS = ("embedding_sum", "embedding_sum_cubed", "position_histogram", "histogram")


class Stats:
    """Statistics of a block's units, of all shards so far, by Chan's parallel formulas in shard order."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.columns: dict[str, np.ndarray] = {}

    def add(self, shard: pa.Table) -> None:
        """Of the next shard."""
        found = {name: shard[name].to_numpy() for name in ("mean", "m2", "minimum", "low", "maximum", *ADDED)}
        found |= {name: matrix(shard[name]) for name in ADDED_LISTS}
        found["count"] = shard["count"].to_numpy().astype(np.float64)
        for name in ("embedding_sum", "embedding_sum_cubed"):
            found[name] = found[name].astype(np.float64)
        if shard["prefix_maximum"].null_count == 0:
            found["prefix_maximum"] = shard["prefix_maximum"].to_numpy()
        self.columns = self._merged(found) if self.columns else found

    def _merged(self, new: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        old = self.columns
        total = old["count"] + new["count"]
        share, delta = new["count"] / np.maximum(total, 1), new["mean"] - old["mean"]
        merged = {name: old[name] + new[name] for name in (*ADDED, *ADDED_LISTS)}
        merged |= {name: np.minimum(old[name], new[name]) for name in ("minimum", "low")}
        merged |= {name: np.maximum(old[name], new[name]) for name in ("maximum", "prefix_maximum") if name in old}
        merged |= {"count": total, "mean": old["mean"] + delta * share}
        return merged | {"m2": old["m2"] + new["m2"] + delta**2 * old["count"] * share}

    def table(self) -> pa.Table:
        """In the schema of unit_stats."""
        block, found = self.block, self.columns
        columns = {"prefix_maximum": pa.nulls(len(block), pa.float32())} | found
        columns["count"] = found["count"].astype(np.int64)
        columns["std"] = np.sqrt(columns.pop("m2") / np.maximum(found["count"], 1))
        columns["position_quantile"] = quantile(columns.pop("position_histogram"), POSITION_QUANTILE)
        return make_table(
            "unit_stats", columns | {"layer": [block.layer] * len(block), "unit": np.arange(block.start, block.stop)}
        )
