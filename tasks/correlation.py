"""Correlation of activations with similarities, and what chance does to it.

In: pooled activations and similarities over the same images. Out: Pearson correlations, their intervals and p values,
and how sure it is that one similarity follows a unit better than another.
"""

import numpy as np
import torch

from tasks.images import ImageList
from tasks.store import Folder
from tasks.tables import matrix

DRAWS, SEED = 1000, 0
"""Of the bootstrap."""
CONSTANT = 1e-12
"""Variance in a draw, of a row whose own is 1, below which it is constant there: what rounding leaves of none. Also of
similarities, which float16 vectors cannot tell apart by less."""


def read_pooled(activations: Folder, shard: int, block: int, column: str = "activation") -> np.ndarray:
    """float32 [units of the block, stored images of the shard]; `column` is activation or negative."""
    table = activations.read("pooled", shard, columns=["scale", column], group=block)
    values = matrix(table[column], None if len(table[column].combine_chunks().flatten()) else 0)
    return values.astype(np.float32) * table["scale"].to_numpy()[:, None]


def read_block(activations: Folder, images: ImageList, block: int, column: str = "activation") -> np.ndarray:
    """float32 [units of the block, stored images], all shards of them."""
    return np.concatenate([read_pooled(activations, shard, block, column) for shard in range(images.num_shards)], 1)


def correlations(a_UN: np.ndarray, s_NC: np.ndarray) -> np.ndarray:
    """Pearson correlation float64 [U, C] of each row of a with each column of s; NaN where one is constant or N < 4."""
    if a_UN.shape[1] < 4:
        return np.full((len(a_UN), s_NC.shape[1]), np.nan)
    a, s = a_UN.astype(np.float64), s_NC.astype(np.float64)
    a, s = a - a.mean(1, keepdims=True), s - s.mean(0)
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(s, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norms > 0, product(a, s) / norms, np.nan).clip(-1, 1)


def followed(a_UN: np.ndarray, images_ND: np.ndarray, concepts_URD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson correlations float64 [U, R] of each row of a with the similarities x.c to its own few concepts c, and of
    these with those to the first; NaN where one is constant or N < 4.

    Of no image the similarity is needed: the covariance of a with x.c is that with x, times c, and the variance of x.c
    is c'Sc, with S the covariance of the images' vectors; the covariance of x.c with x.d is c'Sd.
    """
    units, few, width = concepts_URD.shape
    if len(images_ND) < 4:
        return np.full((units, few), np.nan), np.full((units, few), np.nan)
    x_ND, c_URD = images_ND.astype(np.float64), concepts_URD.astype(np.float64)
    x_ND -= x_ND.mean(0)
    along_UD = product(standardised(a_UN), x_ND)
    spread_URD = product(c_URD.reshape(-1, width), product(x_ND.T, x_ND)).reshape(units, few, width)
    variance_UR = np.einsum("urd,urd->ur", spread_URD, c_URD) / len(x_ND)
    deviation_UR = np.sqrt(np.where(variance_UR > CONSTANT, variance_UR, np.nan))
    r_UR = np.einsum("ud,urd->ur", along_UD, c_URD) / len(x_ND) / deviation_UR
    with_first_UR = np.einsum("ud,urd->ur", spread_URD[:, 0], c_URD) / len(x_ND) / deviation_UR / deviation_UR[:, :1]
    return r_UR.clip(-1, 1), with_first_UR.clip(-1, 1)


def product(a_NK: np.ndarray, b_KM: np.ndarray) -> np.ndarray:
    """Matrix product by torch, whose threads the worker sets; NumPy takes its own from the environment."""
    return (torch.from_numpy(np.ascontiguousarray(a_NK)) @ torch.from_numpy(np.ascontiguousarray(b_KM))).numpy()


def fisher(r: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """95 % interval and one-sided p of no positive correlation: atanh(r) is normal, deviation 1 / sqrt(count - 3)."""
    from scipy.stats import norm  # here, so that what only reads activations needs no scipy

    if count < 4:
        unknown = np.full(len(r), np.nan)
        return unknown, unknown, unknown
    z, deviation = np.arctanh(r.clip(-0.999999, 0.999999)), 1 / np.sqrt(count - 3)
    return np.tanh(z - 1.96 * deviation), np.tanh(z + 1.96 * deviation), norm.sf(z / deviation)


def standardised(x_UN: np.ndarray) -> np.ndarray:
    """float64 [U, N]: each row with mean 0 and standard deviation 1 (divisor N); NaN where it is constant."""
    x = x_UN.astype(np.float64)
    same = x.max(1, initial=-np.inf) <= x.min(1, initial=np.inf)  # of equal values the mean may be off by a last bit
    x -= x.mean(1, keepdims=True)
    deviation = np.sqrt((x * x).mean(1))
    return x / np.where(same, np.nan, deviation)[:, None]


def paired(a_UN: np.ndarray, s_UN: np.ndarray) -> np.ndarray:
    """Pearson correlation float64 [U] of each row with its own partner; NaN where one is constant or N < 4."""
    if a_UN.shape[1] < 4:
        return np.full(len(a_UN), np.nan)
    return (standardised(a_UN) * standardised(s_UN)).mean(1).clip(-1, 1)


def permutation_p(a_UN: np.ndarray, s_UN: np.ndarray) -> np.ndarray:
    """One-sided p value float64 [U] of the correlation of each row with its own partner, had the images been shuffled.

    Nothing is drawn. Over all N! permutations r has mean 0, variance 1 / (N - 1) and skewness
    g_a g_s sqrt(N - 1) / (N - 2), with g = mean(z^3) of the standardised row: of E[r^3], the sum over i, j, k of
    z_i z_j z_k E[t_i t_j t_k] / N^3, three equal indices are 1, two equal ones 3 / (N - 1), and three different ones
    4 / ((N - 1) (N - 2)) times g_a g_s / N^2, together g_a g_s / ((N - 1) (N - 2)).

    The tail is that of the Pearson type III (shifted gamma) distribution with these moments (Mielke and Berry,
    Permutation Methods, 2007; Winkler et al., NeuroImage 141, 2016). Where the skewness is negative that ends at
    2 / -skewness, which the permutations do not: p is at least the normal tail there, and beyond that of r itself. Nor
    is it below the share of permutations that move none but the m images on which the unit is lowest and so change
    nothing, m! / N!: a unit that one image of 123 excites cannot have less than 1 / 123. NaN where a row is constant or
    N < 4.
    """
    from scipy.special import gammaln
    from scipy.stats import norm, pearson3

    count = a_UN.shape[1]
    if count < 4:
        return np.full(len(a_UN), np.nan)
    a, s = standardised(a_UN), standardised(s_UN)
    skewness = (a * a * a).mean(1) * (s * s * s).mean(1) * np.sqrt(count - 1) / (count - 2)
    z = (a * s).mean(1) * np.sqrt(count - 1)
    end = 2 / np.where(skewness < 0, -skewness, np.finfo(float).tiny)
    lowest = (a_UN == a_UN.min(1, keepdims=True)).sum(1)
    same = np.exp(gammaln(lowest + 1) - gammaln(count + 1))
    return np.maximum(pearson3.sf(z, skewness), np.maximum(norm.sf(np.maximum(z, end)), same))


def redrawn(count: int) -> np.ndarray:
    """float64 [N, DRAWS], how often each of `count` images is in each draw of as many, with replacement.

    The same for all units, so that their intervals can be compared.
    """
    if not count:
        return np.zeros((0, DRAWS))
    times = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), DRAWS)
    return np.ascontiguousarray(times.T, np.float64)


def bootstrap(a_UN: np.ndarray, s_UN: np.ndarray, times_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval, two float64 [U], of the correlation of each row with its own partner.

    Quantiles 0.025 and 0.975 of the correlations over redrawn images (Efron's percentile interval), from the weighted
    moments of all draws and units at once: r = (m_as - m_a m_s) / sqrt((m_aa - m_a^2) (m_ss - m_s^2)). A draw in which
    a row is constant shows no correlation and counts as 0. NaN where a row is constant or N < 4.

    Takes about 80 U N bytes beside `times_ND`: callers with many units slice them.
    """
    units, count = a_UN.shape
    if count < 4:
        return np.full(units, np.nan), np.full(units, np.nan)
    a, s = standardised(a_UN), standardised(s_UN)
    moments = product(np.concatenate([a, s, a * a, s * s, a * s]), times_ND) / count
    m_a, m_s, m_aa, m_ss, m_as = moments.reshape(5, units, -1)
    v_a, v_s = m_aa - m_a**2, m_ss - m_s**2
    with np.errstate(invalid="ignore", divide="ignore"):
        r_UD = (m_as - m_a * m_s) / np.sqrt(v_a * v_s)
    r_UD = np.where((v_a < CONSTANT) | (v_s < CONSTANT), 0, r_UD).clip(-1, 1)
    lower, upper = np.quantile(r_UD, (0.025, 0.975), axis=1)
    return lower, upper


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
