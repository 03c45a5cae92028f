"""Correlation of activations with similarities, and what chance does to it.

In: pooled activations and similarities over the same images. Out: Pearson correlations, their intervals and p values,
and how sure it is that one similarity follows a unit better than another.
"""

import numpy as np
import torch
from scipy.stats import norm

from tasks.images import ImageList
from tasks.store import Folder
from tasks.tables import matrix


def read_pooled(activations: Folder, shard: int, block: int) -> np.ndarray:
    """float32 [units of the block, stored images of the shard]."""
    table = activations.read("pooled", shard, group=block)
    values = matrix(table["activation"], None if len(table["activation"].combine_chunks().flatten()) else 0)
    return values.astype(np.float32) * table["scale"].to_numpy()[:, None]


def read_block(activations: Folder, images: ImageList, block: int) -> np.ndarray:
    """float32 [units of the block, stored images], all shards of them."""
    return np.concatenate([read_pooled(activations, shard, block) for shard in range(images.num_shards)], 1)


def correlations(a_UN: np.ndarray, s_NC: np.ndarray) -> np.ndarray:
    """Pearson correlation float64 [U, C] of each row of a with each column of s; NaN where one is constant or N < 4."""
    if a_UN.shape[1] < 4:
        return np.full((len(a_UN), s_NC.shape[1]), np.nan)
    a, s = a_UN.astype(np.float64), s_NC.astype(np.float64)
    a, s = a - a.mean(1, keepdims=True), s - s.mean(0)
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(s, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norms > 0, product(a, s) / norms, np.nan).clip(-1, 1)


def product(a_NK: np.ndarray, b_KM: np.ndarray) -> np.ndarray:
    """Matrix product by torch, whose threads the worker sets; NumPy takes its own from the environment."""
    return (torch.from_numpy(np.ascontiguousarray(a_NK)) @ torch.from_numpy(np.ascontiguousarray(b_KM))).numpy()


def fisher(r: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """95 % interval and one-sided p of no positive correlation: atanh(r) is normal, deviation 1 / sqrt(count - 3)."""
    if count < 4:
        unknown = np.full(len(r), np.nan)
        return unknown, unknown, unknown
    z, deviation = np.arctanh(r.clip(-0.999999, 0.999999)), 1 / np.sqrt(count - 3)
    return np.tanh(z - 1.96 * deviation), np.tanh(z + 1.96 * deviation), norm.sf(z / deviation)


def paired(a_UN: np.ndarray, s_UN: np.ndarray) -> np.ndarray:
    """Pearson correlation float64 [U] of each row with its own partner; NaN where one is constant or N < 4."""
    if a_UN.shape[1] < 4:
        return np.full(len(a_UN), np.nan)
    a, s = a_UN.astype(np.float64), s_UN.astype(np.float64)
    a, s = a - a.mean(1, keepdims=True), s - s.mean(1, keepdims=True)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(s, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norms > 1e-12, (a * s).sum(1) / norms, np.nan).clip(-1, 1)


def better(r_new: np.ndarray, r_old: np.ndarray, between: np.ndarray, count: int) -> np.ndarray:
    """By how many standard errors one similarity follows a unit better than another, over the same `count` images.

    `between` is the correlation of the two similarities. z of Meng, Rosenthal and Rubin (Psychological Bulletin 1992,
    equations 1 to 3): (atanh r_new - atanh r_old) sqrt((N - 3) / (2 (1 - between) h)), h = (1 - f m) / (1 - m), with m
    the mean of the squared correlations and f = (1 - between) / (2 (1 - m)), at most 1. NaN where it is not known.
    """
    limit = 0.999999
    r_new, r_old = np.clip(r_new, -limit, limit), np.clip(r_old, -limit, limit)
    apart = 1 - np.clip(between, -limit, limit)
    m = (r_new**2 + r_old**2) / 2
    h = (1 - np.minimum(apart / (2 * (1 - m)), 1) * m) / (1 - m)
    return (np.arctanh(r_new) - np.arctanh(r_old)) * np.sqrt(max(count - 3, 0) / (2 * apart * h))
