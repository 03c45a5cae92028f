"""Stage exemplars: the shards' candidates and statistics merged, one unit block at a time.

In: candidates and stats of every shard. Out: exemplars (the top k images of each unit under the total order, the bottom
k of units that go below zero) and unit_stats (one row a unit).
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
        shards = range(job.images.num_shards)
        with report.phase("read"):
            candidates = [job.activations.read("candidates", s, group=part) for s in shards]
            stats = [job.activations.read("stats", s, group=part) for s in shards]
        with report.phase("compute"):
            exemplars = pa.concat_tables(
                [
                    merge_candidates([_tail(c, tail) for c in candidates], tail, job.k, job.images)
                    for tail in ("top", "bottom")
                ]
            )
            written = {"exemplars": exemplars, "unit_stats": merge_stats(stats, block)}
        with report.phase("write"):
            job.out.write(part, written)
        report.rows = {name: table.num_rows for name, table in written.items()}
        return report


def _tail(candidates: pa.Table, tail: str) -> pa.Table:
    return candidates.filter(pc.call_function("equal", [candidates["tail"], tail]))


def merge_candidates(shards: list[pa.Table], tail: str, k: int, images: ImageList) -> pa.Table:
    """The k best candidates of each unit over all shards, in exemplars' schema."""
    rows = pa.concat_tables(shards)
    lists = {c: rows[c].combine_chunks() for c in ("image", "activation", "position")}
    lengths = np.diff(lists["image"].offsets.to_numpy())
    unit = np.repeat(rows["unit"].to_numpy(), lengths)
    image, activation, position = (lists[c].flatten().to_numpy() for c in ("image", "activation", "position"))
    sign = 1 if tail == "top" else -1
    keys = order_keys(torch.from_numpy(sign * activation), torch.from_numpy(images.order[image]))
    rank, best = _best(unit, keys, k)
    columns = {"unit": unit[best], "rank": rank, "image": image[best]}
    columns |= {"activation": activation[best], "position": position[best]}
    columns |= {"layer": rows["layer"].take(pa.array(np.zeros_like(best))).combine_chunks()}
    columns |= {"tail": pa.repeat(tail, len(best)), "image_id": images.ids[columns["image"]]}
    return make_table("exemplars", columns)


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


def merge_stats(shards: list[pa.Table], block: Block) -> pa.Table:
    """Statistics of the whole dataset from those of its shards, by Chan's parallel formulas, in shard order."""

    def stack(name: str) -> np.ndarray:
        return np.stack([s[name].to_numpy() for s in shards])

    count, mean, m2 = stack("count").astype(np.float64), stack("mean"), stack("m2")
    merged_count, merged_mean, merged_m2 = count[0], mean[0], m2[0]
    for shard in range(1, len(shards)):
        total = merged_count + count[shard]
        share = count[shard] / np.maximum(total, 1)
        delta = mean[shard] - merged_mean
        merged_m2 = merged_m2 + m2[shard] + delta**2 * merged_count * share
        merged_mean = merged_mean + delta * share
        merged_count = total
    columns = {
        name: sum(matrix(s[name]).astype(np.float64) for s in shards)
        for name in ("embedding_sum", "embedding_sum_cubed")
    }
    columns |= {name: stack(name).sum(0) for name in ("nonfinite", "explain_count", "sum", "sum_cubed")}
    columns |= {"minimum": stack("minimum").min(0), "maximum": stack("maximum").max(0), "low": stack("low").min(0)}
    has_prefix = shards[0]["prefix_maximum"].null_count == 0
    prefix = stack("prefix_maximum").max(0) if has_prefix else pa.nulls(len(block), pa.float32())
    positions = np.asarray(sum(matrix(s["position_histogram"]) for s in shards))
    columns |= {
        "layer": [block.layer] * len(block),
        "unit": np.arange(block.start, block.stop),
        "count": merged_count.astype(np.int64),
        "mean": merged_mean,
        "std": np.sqrt(merged_m2 / np.maximum(merged_count, 1)),
        "prefix_maximum": prefix,
        "position_quantile": quantile(positions, POSITION_QUANTILE),
        "histogram": sum(matrix(s["histogram"]) for s in shards),
    }
    return make_table("unit_stats", columns)
