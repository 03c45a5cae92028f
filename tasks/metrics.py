"""How well a name predicts a unit, one number a unit.

In: pooled activations and similarities with the unit's own name, float [units, images], or which images are positive,
bool [units, images]. Out: float64 [units]; NaN where a row cannot tell, as each function says.

Positive are the images on which a unit, or the similarity with a name, is above all but a twentieth of a sample. The
unit's positives are the truth that a name has to find, the name's positives what it says.
"""

import numpy as np

POSITIVE = 0.95
"""Quantile of the sample above which a value is positive."""


def positives(values_UN: np.ndarray, sample_UM: np.ndarray) -> np.ndarray:
    """bool [U, N]: strictly above the 0.95 quantile of the same row's sample, which is one of its values.

    At most a twentieth of the sample are above it, ties and constant rows included. Nothing is positive without a
    sample.
    """
    if not sample_UM.shape[1]:
        return np.zeros(values_UN.shape, bool)
    return values_UN > np.quantile(sample_UM, POSITIVE, axis=1, method="inverted_cdf", keepdims=True)


def auc(score_UN: np.ndarray, positive_UN: np.ndarray) -> np.ndarray:
    """Chance that a positive image scores higher than another one, ties half (Mann and Whitney 1947).

    (sum of the positives' ranks - P (P + 1) / 2) / (P (N - P)), ranks shared by ties. NaN without positives or others;
    0.5 for constant scores.
    """
    return areas(score_UN, positive_UN)[0]


def auprc(score_UN: np.ndarray, positive_UN: np.ndarray) -> np.ndarray:
    """Average precision: mean over the positives of the share of positives among all that score at least as high.

    The area under the steps of precision and recall, as in Oikarinen, Yan and Weng (ICML 2025). Images of one score
    come together, whatever their order: constant scores give the share of positives. NaN without positives or others.
    """
    return areas(score_UN, positive_UN)[1]


def areas(score_UN: np.ndarray, positive_UN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """auc and auprc, for which one sorting does."""
    place_N, order_UN = np.arange(score_UN.shape[1]), score_UN.argsort(1)
    score_UN, positive_UN = (np.take_along_axis(x, order_UN, 1) for x in (score_UN, positive_UN))
    rises_UN = score_UN[:, 1:] != score_UN[:, :-1]
    edge = np.ones((len(score_UN), min(len(place_N), 1)), bool)
    starts_UN, ends_UN = np.concatenate([edge, rises_UN], 1), np.concatenate([rises_UN, edge], 1)
    first_UN = np.maximum.accumulate(np.where(starts_UN, place_N, 0), 1)  # of the images with the same score
    last_UN = np.minimum.accumulate(np.where(ends_UN, place_N, len(place_N))[:, ::-1], 1)[:, ::-1]
    found, count = positive_UN.sum(1), len(place_N)
    ranks = (((first_UN + last_UN) / 2 + 1) * positive_UN).sum(1)
    lower_UN = positive_UN.cumsum(1) - positive_UN  # positives before each place
    hits_UN = found[:, None] - np.take_along_axis(lower_UN, first_UN, 1)
    precision = (hits_UN / (count - first_UN) * positive_UN).sum(1)
    return _ratio(ranks - found * (found + 1) / 2, found * (count - found)), _ratio(precision, found * (found < count))


def f1(positive_UN: np.ndarray, said_UN: np.ndarray) -> np.ndarray:
    """2 B / (P + S) of P positives, S said to be and B both: harmonic mean of precision and recall. NaN without
    positives; 0 where nothing is said."""
    both, found = (positive_UN & said_UN).sum(1), positive_UN.sum(1)
    return _ratio(2 * both, (found + said_UN.sum(1)) * (found > 0))


def iou(positive_UN: np.ndarray, said_UN: np.ndarray) -> np.ndarray:
    """B / (P + S - B), intersection over union of the images (Jaccard). NaN without positives; 0 where nothing is
    said."""
    both, either = (positive_UN & said_UN).sum(1), (positive_UN | said_UN).sum(1)
    return _ratio(both, either * positive_UN.any(1))


def cosine(a_UN: np.ndarray, s_UN: np.ndarray) -> np.ndarray:
    """sum a s / sqrt(sum a^2 sum s^2), of real values or of positives; nothing is centred. NaN where a row is all 0."""
    a, s = a_UN.astype(np.float64), s_UN.astype(np.float64)
    return _ratio((a * s).sum(1), np.sqrt((a * a).sum(1) * (s * s).sum(1)))


def mad(a_UN: np.ndarray, said_UN: np.ndarray) -> np.ndarray:
    """Mean activation difference of CoSy (Kopf et al., NeurIPS 2024): mean activation on the images said to be positive
    minus that on the others, in standard deviations (divisor n) of the others.

    NaN where nothing or everything is said, or where the others are all the same.
    """
    a, others = a_UN.astype(np.float64), ~said_UN
    mean_said = _ratio((a * said_UN).sum(1), said_UN.sum(1))
    mean = _ratio((a * others).sum(1), others.sum(1))
    deviation = np.sqrt(_ratio(((a - mean[:, None]) ** 2 * others).sum(1), others.sum(1)))
    highest = np.where(others, a, -np.inf).max(1, initial=-np.inf)
    lowest = np.where(others, a, np.inf).min(1, initial=np.inf)
    return _ratio(mean_said - mean, deviation * (highest > lowest))  # the mean of equal values may be off by a last bit


def _ratio(above_U: np.ndarray, below_U: np.ndarray) -> np.ndarray:
    """NaN where the divisor is 0 or NaN."""
    unknown = np.full(len(below_U), np.nan)
    return np.divide(above_U, below_U, out=unknown, where=below_U > 0)
