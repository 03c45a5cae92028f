"""Running statistics that merge: top-k under a total order, moments, histograms.

In: activations of batches, tensors [batch, units]. Out: states whose merge over batches and shards does not depend on
how the images were cut.
"""

from functools import lru_cache

import numpy as np
import torch

EMPTY = torch.iinfo(torch.int64).min
"""Key of a free place."""

LOW_EXPONENT, STEPS = -8, 64
BINS = 2 * (STEPS + 2)
EDGES = np.concatenate(
    [
        [-np.inf],
        -(2.0 ** (LOW_EXPONENT + np.arange(STEPS, -1, -1) // 4) * (1 + np.arange(STEPS, -1, -1) % 4 / 4)),
        [0.0],
        2.0 ** (LOW_EXPONENT + np.arange(0, STEPS + 1) // 4) * (1 + np.arange(0, STEPS + 1) % 4 / 4),
        [np.inf],
    ]
)
"""Edges of the histograms: four steps per octave from 2^-8 to 2^8 on both sides of zero, whatever the data."""


def order_keys(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Values float32 [..., U] and image ranks int64 [..., 1] -> int64 keys whose order is the total order.

    Upper 32 bits: the float's bits, made monotone. Lower 32: the image's rank by the hash of its id, earlier is larger.
    Keys of different images differ, so the k largest are one set whatever the algorithm.
    """
    bits = (values + 0.0).view(torch.int32)  # adding 0.0 makes -0.0 and 0.0 equal
    monotone = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (monotone.long() << 32) | (0x7FFFFFFF - order)


def key_values(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of order_keys: float32 values and int64 image ranks."""
    monotone = (keys >> 32).astype(np.int32)
    bits = monotone ^ ((monotone >> 31) & 0x7FFFFFFF)
    return bits.view(np.float32), 0x7FFFFFFF - (keys & 0xFFFFFFFF)


class TopK:
    """The k largest keys per unit with the position of each, over any number of batches; in no order.

    All its memory is taken at the start: what is kept from batch to batch must not lie between what the model takes
    and gives back in each, or the holes between them grow.
    """

    def __init__(self, num_units: int, k: int, waiting: int, device: torch.device) -> None:
        """`waiting`: how many images more than k are held until the next merge."""
        self.k, self.filled = k, k
        self.held = torch.full((num_units, k + waiting), EMPTY, dtype=torch.int64, device=device)
        self.held_at = torch.full((num_units, k + waiting), -1, dtype=torch.int32, device=device)
        self.least = torch.full((num_units,), EMPTY, dtype=torch.int64, device=device)
        """The k-th best of the last merge."""

    @property
    def keys(self) -> torch.Tensor:
        """int64 [U, k], of the last merge."""
        return self.held[:, : self.k]

    @property
    def positions(self) -> torch.Tensor:
        """int32 [U, k]."""
        return self.held_at[:, : self.k]

    def enters(self, keys_BU: torch.Tensor) -> torch.Tensor:
        """bool [B, U]: whether a key beats the k-th best of the last merge."""
        return keys_BU > self.least

    def add(self, keys_BU: torch.Tensor, positions_BU: torch.Tensor) -> None:
        """At most `waiting` images between two merges."""
        places = slice(self.filled, self.filled + len(keys_BU))
        self.held[:, places], self.held_at[:, places] = keys_BU.T, positions_BU.T
        self.filled = places.stop

    def merge(self) -> None:
        """Fold the waiting batches in; several at once, because it costs the same for few and for many."""
        if self.filled > self.k:
            keys, positions = self.held[:, : self.filled], self.held_at[:, : self.filled]
            if keys.is_cuda:
                chosen = keys.topk(self.k, dim=1, sorted=False).indices
            else:  # several times as fast as topk
                chosen = torch.from_numpy(np.argpartition(keys.numpy(), -self.k, axis=1)[:, -self.k :].copy())
            best, places = keys.gather(1, chosen), positions.gather(1, chosen)
            self.keys.copy_(best)
            self.positions.copy_(places)
            self.least = best.amin(1)
            self.filled = self.k


class Moments:
    """Count, mean, squared deviations, extremes and histogram per unit; float64 and int64."""

    def __init__(self, num_units: int, device: torch.device) -> None:
        def full(value: float) -> torch.Tensor:
            return torch.full((num_units,), value, dtype=torch.float64, device=device)

        self.count, self.nonfinite, self.mean, self.m2 = full(0), full(0), full(0), full(0)
        self.minimum, self.maximum = full(np.inf), full(-np.inf)
        self.histogram = torch.zeros(num_units, BINS, dtype=torch.int64, device=device)

    def add(self, values_BU: torch.Tensor, finite_BU: torch.Tensor, valid_B: torch.Tensor) -> None:
        """Fold in a group of images: rows outside `valid_B` are padding; entries outside `finite_BU` count apart."""
        x = torch.where(finite_BU, values_BU, 0).double()
        count = finite_BU.sum(0).double()
        mean = x.sum(0) / count.clamp(min=1)
        m2 = torch.where(finite_BU, x - mean, 0).square().sum(0)
        merged = self.count + count
        share = count / merged.clamp(min=1)
        delta = mean - self.mean
        self.m2 = self.m2 + m2 + delta.square() * self.count * share
        self.mean = self.mean + delta * share
        self.count = merged
        self.nonfinite += (valid_B[:, None] & ~finite_BU).sum(0)
        self.minimum = torch.minimum(self.minimum, torch.where(finite_BU, x, np.inf).amin(0))
        self.maximum = torch.maximum(self.maximum, torch.where(finite_BU, x, -np.inf).amax(0))
        count_bins(self.histogram, torch.where(finite_BU, values_BU, np.nan)[:, :, None])


def count_bins(histogram_UN: torch.Tensor, maps_BUP: torch.Tensor) -> None:
    """Add the float32 values of all maps to the histograms over EDGES, in place; what is not finite counts nowhere."""
    units = torch.arange(len(histogram_UN), dtype=torch.int32, device=histogram_UN.device) * (BINS + 1)
    if maps_BUP.stride(1) == 1:  # in the order in which they lie
        values, units = maps_BUP.transpose(1, 2), units[None, None, :]
    else:
        values, units = maps_BUP, units[None, :, None]
    bins = bin_of(values).add_(units).reshape(-1)
    if bins.is_cuda:  # where bincount would wait for the largest of them
        counts = torch.zeros(len(histogram_UN) * (BINS + 1), dtype=torch.int64, device=bins.device)
        counts.scatter_add_(0, bins.long(), torch.ones_like(counts[:1]).expand(len(bins)))
    else:
        counts = bins.bincount(minlength=len(histogram_UN) * (BINS + 1))
    histogram_UN += counts.view(len(histogram_UN), BINS + 1)[:, :BINS]


def bin_of(values: torch.Tensor) -> torch.Tensor:
    """int32 index of the bin of EDGES of each float32 value, BINS where it is not finite."""
    codes = (values + 0.0).contiguous().view(torch.int32)  # adding 0.0 makes -0.0 and 0.0 equal
    codes = codes.bitwise_right_shift_(21).bitwise_and_(0x7FF)
    return _bin_of_code(values.device).index_select(0, codes.view(-1)).view(values.shape)


@lru_cache(maxsize=8)
def _bin_of_code(device: torch.device) -> torch.Tensor:
    """int32 [2048], bin of all floats with these upper 11 bits: sign, exponent and the first two of the mantissa."""
    values = ((torch.arange(2048) << 21) | 1).int().view(torch.float32)
    step = ((torch.arange(2048) & 0x3FF) - ((127 + LOW_EXPONENT) << 2) + 1).clamp(0, STEPS + 1)
    bins = torch.where(values < 0, STEPS + 1 - step, STEPS + 2 + step)
    return torch.where(values.isfinite(), bins, BINS).int().to(device)


def quantile(histogram_UN: np.ndarray, share: float) -> np.ndarray:
    """Approximate quantile per unit [U], linear inside its bin; outer bins give their inner edge, empty rows 0."""
    total = histogram_UN.sum(1)
    wanted = share * total
    cumulated = histogram_UN.cumsum(1)
    index = (cumulated < wanted[:, None]).sum(1).clip(0, BINS - 1)
    rows = np.arange(len(histogram_UN))
    before = cumulated[rows, index] - histogram_UN[rows, index]
    inside = (wanted - before) / histogram_UN[rows, index].clip(min=1)
    low = np.maximum(EDGES[index], EDGES[1])
    high = np.minimum(EDGES[index + 1], EDGES[-2])
    return np.where(total > 0, low + inside.clip(0, 1) * (high - low), 0.0).astype(np.float32)
