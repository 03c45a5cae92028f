"""Scorers: how well each concept fits each unit.

In: the Evidence of a few units. Out: float32 scores [units, concepts]; larger is better, and only their order within a
unit means anything. Add one with @scorer(); its keyword arguments become `scorer.params`. Shapes as in tasks.evidence.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from tasks.evidence import Evidence, Sample

Score = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Scorer:
    """A way to score; an entry of SCORERS."""

    score: Score
    marginal: float = 0.0
    """For values that are log p(unit | concept): times that their marginal over all units of the layer is taken off, by
    the stage, which sees them all. Such a scorer sums over `top_k` exemplars."""
    logs: bool = False
    """Whether the scores are logarithms, so that their differences cannot serve as weights."""
    dense: bool = False
    """Whether it reads the pooled activations of the explain sample, so that there must be some."""
    after: Callable[[Evidence, torch.Tensor], torch.Tensor] | None = None
    """Makes the scores from the values without their marginal; None where these are the scores."""


SCORERS: dict[str, Scorer] = {}
SHARES = ("p_start", "p_end", "share", "top_fraction")
"""Parameters that are at most 1."""
SORTED = 2**24
"""Similarities that rank_reorder sorts at once."""


@dataclass
class ScorerSettings:
    name: str = "joint"
    params: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the scorer; the published values are the defaults."""
    keep: int = 10
    """Concepts kept per unit."""

    def __post_init__(self) -> None:
        if self.name not in SCORERS:
            raise ValueError(f"scorer.name={self.name}: allowed are {', '.join(SCORERS)}")
        _, *parameters = inspect.signature(SCORERS[self.name].score).parameters.values()
        known = {parameter.name: parameter.default for parameter in parameters}
        for key, value in self.params.items():
            if key not in known:
                allowed = ", ".join(known) or "none"
                raise ValueError(f"scorer.params.{key}: unknown for {self.name}; allowed are {allowed}")
            kind, least, most = (int, 1, 10**6) if isinstance(known[key], int) else (int | float, 0, 1e6)
            most = 1 if key in SHARES else most
            if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= most:
                whole = "whole numbers" if kind is int else "numbers"
                raise ValueError(f"scorer.params.{key}={value}: allowed are {whole} from {least} to {most:,}")
        if self.keep < 1:
            raise ValueError(f"scorer.keep={self.keep}: must be at least 1")


def scorer(**how: Any) -> Callable[[Score], Score]:
    """Register under the function's name."""

    def register(score: Score) -> Score:
        SCORERS[score.__name__] = Scorer(score, **how)
        return score

    return register


@scorer()
def mean_cosine(evidence: Evidence) -> torch.Tensor:
    """Mean CLIP similarity of the patches to the concept: (1/P) sum_p cos(patch_p, c).

    The score of "Automated Natural Language Explanation of Deep Visual Neurons with Large Models" (arXiv 2310.10708).
    """
    count_U1 = evidence.has_patch_UP.sum(1, keepdim=True).clamp(min=1)
    return (evidence.patches_UPD.sum(1) / count_U1) @ evidence.concepts_CD.T


@scorer()
def contrastive(evidence: Evidence) -> torch.Tensor:
    """How far the patches' mean similarity lies above that of random crops, in standard errors (Evidence.null_z)."""
    return evidence.null_z()


@scorer()
def weighted_mean(evidence: Evidence) -> torch.Tensor:
    """Activation-weighted mean of the image's similarity to the concept, standardised per concept. Ours.

    score = sum_x a(x)^3 (s_c(x) - mean s_c) / std s_c, up to a factor of the unit, over all explain images x with
    pooled activation a and similarity s_c(x) = cos(e(x), c): every image counts and not only the exemplars, and the
    cube lets the strong ones lead. It needs no similarity of single images, because the sum is w . c with
    w = sum_x a(x)^3 (e(x) - mean e). Dividing by the concept's own spread keeps concepts to which everything varies a
    lot from winning everywhere.
    """
    return F.normalize(evidence.weighted_UD, dim=1) @ evidence.concepts_CD.T / evidence.null_std_LC[0]


@scorer(dense=True)
def correlation(evidence: Evidence) -> torch.Tensor:
    """Pearson correlation of activation and similarity over the explain sample, what validation measures elsewhere.

    The score of Oikarinen and Weng, "Evaluating Neuron Explanations" (ICML 2025, NeuronEval), used for choosing. With
    centred vectors X it is (a X) . c / (|a| |X c|): no similarity of single images is needed. 0 for constant units.
    """
    return following(evidence.activations_US, evidence.sample)


def following(activations_US: torch.Tensor, sample: Sample) -> torch.Tensor:
    """[U, C], the correlation of any activations over the images of the sample."""
    along_UD, norm_U1 = _along(activations_US, sample)
    return along_UD @ sample.concepts_CD.T / (norm_U1 * sample.spread_C)


def _along(activations_US: torch.Tensor, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the sample of centred activation x image vector [U, D], and the activation's deviation [U, 1]."""
    a_US = activations_US.double()
    a_US = a_US - a_US.mean(1, keepdim=True)
    count = max(a_US.shape[1], 1)
    norm_U1 = (a_US.square().sum(1, keepdim=True) / count).sqrt().clamp(min=1e-12)
    return (a_US.float() @ sample.images_SD) / count, norm_U1.float()


@scorer(dense=True)
def cos_cubed(evidence: Evidence) -> torch.Tensor:
    """Cosine of the cubes of centred activations and centred similarities over the explain sample.

    cos(q^3, P_c^3) with q and P_c centred, of CLIP-Dissect (Oikarinen and Weng, ICLR 2023, section 3.3).
    """
    a_US = evidence.activations_US
    q_US = F.normalize((a_US - a_US.mean(1, keepdim=True)) ** 3, dim=1)
    return q_US @ evidence.sample.of_similarity("cubes", lambda s_SC: F.normalize(s_SC**3, dim=0, eps=1e-12))


@scorer(dense=True)
def rank_reorder(
    evidence: Evidence, *, p: float = 3.0, top_fraction: float = 0.05, scale_p: float = 0.5
) -> torch.Tensor:
    """How little the unit's largest activations change when they are put in the order of the similarities.

    CLIP-Dissect (Oikarinen and Weng, ICLR 2023, section 3.3 and the authors' code, with its defaults): of the top 5 %
    images, sum |q - reorder(q, P_c)|^p over the same for a random order, divided by (mean P_c)^0.5; negated. For the
    random order we take its exact expectation instead of five drawn ones, the same for all concepts. A mean similarity
    below 0.001 counts as that.
    """
    sample, a_US = evidence.sample, evidence.activations_US
    top = max(int(a_US.shape[1] * top_fraction), 1)
    values_UT, index_UT = a_US.sort(dim=1, descending=True, stable=True)
    values_UT, index_UT = values_UT[:, :top], index_UT[:, :top]
    random_U = (values_UT[:, :, None] - values_UT[:, None]).abs().pow(p).mean((1, 2)).clamp(min=1e-12)
    scores_UC, together = [], max(1, SORTED // (top * len(evidence.concepts_CD)))
    for values_uT, index_uT in zip(values_UT.split(together), index_UT.split(together), strict=True):
        similarity_uTC = (sample.images_SD[index_uT] + sample.mean_D) @ evidence.concepts_CD.T
        place_uTC = similarity_uTC.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        moved_uTC = values_uT[:, :, None].expand_as(place_uTC).gather(1, place_uTC)
        error_uC = (values_uT[:, :, None] - moved_uTC).abs().pow(p).mean(1)
        scores_UC.append(-error_uC / similarity_uTC.mean(1).clamp(min=1e-3) ** scale_p)
    return torch.cat(scores_UC) / random_U[:, None]


@scorer(dense=True)
def auc(evidence: Evidence, *, share: float = 0.05) -> torch.Tensor:
    """Chance that an image of the concept excites the unit more than another image does, ties half.

    The score of INVERT (Bykov et al., "Labeling Neural Representations with Inverse Recognition", NeurIPS 2023), with
    the rank sum of Mann and Whitney. INVERT has labelled images; here an image is of a concept if its similarity is
    among the largest `share` of the explain sample.
    """
    images = evidence.activations_US.shape[1]
    count = min(max(round(images * share), 1), max(images - 1, 1))

    def is_of(similarity_SC: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(similarity_SC).scatter_(0, similarity_SC.topk(count, dim=0).indices, 1)

    rank_sum_UC = ranks(evidence.activations_US) @ evidence.sample.of_similarity(("is of", count), is_of)
    return (rank_sum_UC - count * (count + 1) / 2) / (count * max(images - count, 1))


def ranks(values_US: torch.Tensor) -> torch.Tensor:
    """float32 [U, S], 1 for the smallest of each row; equal values share the mean of their ranks."""
    ordered_US, place_US = values_US.sort(dim=1)
    number_S = torch.arange(values_US.shape[1], device=values_US.device)
    starts_US = F.pad(ordered_US[:, 1:] != ordered_US[:, :-1], (1, 0), value=True)
    first_US = torch.where(starts_US, number_S, 0).cummax(1).values
    ends_US = F.pad(starts_US[:, 1:], (0, 1), value=True)
    last_US = torch.where(ends_US, number_S, values_US.shape[1]).flip(1).cummin(1).values.flip(1)
    return torch.empty_like(values_US).scatter_(1, place_US, (first_US + last_US).float() / 2 + 1)


@scorer(dense=True)
def linear(evidence: Evidence, *, terms: int = 5) -> torch.Tensor:
    """Sparse linear explanation: the coefficients of the few concepts that together follow the unit best.

    After Oikarinen and Weng, "Linear Explanations for Individual Neurons" (ICML 2024): activation ~ sum_k w_k s_k over
    the explain sample. Ours selects greedily (orthogonal matching pursuit, Pati et al. 1993) among all concepts instead
    of fitting an elastic net to candidates, and refits after each. A chosen concept's score is its standardised
    coefficient w_k std s_k / std a; another's is what it would get beside them, at most the smallest chosen one's. All
    of it follows from the covariance of the image vectors: no similarity of single images is needed.
    """
    concepts_CD, sample = evidence.concepts_CD, evidence.sample
    along_UD, norm_U1 = _along(evidence.activations_US, sample)
    chosen, weights_UK = [], torch.zeros(len(along_UD), 0, device=along_UD.device)
    scores_UC = along_UD @ concepts_CD.T / (norm_U1 * sample.spread_C)
    for _ in range(min(terms, len(concepts_CD))):
        free_UC = scores_UC if not chosen else scores_UC.scatter(1, torch.stack(chosen, 1), -torch.inf)
        chosen.append(free_UC.argmax(1))
        picked_UKD = concepts_CD[torch.stack(chosen, 1)] / sample.spread_C[torch.stack(chosen, 1)][:, :, None]
        follows_UKD = picked_UKD @ sample.covariance_DD
        gram_UKK = follows_UKD @ picked_UKD.transpose(1, 2) + 1e-4 * torch.eye(len(chosen), device=along_UD.device)
        weights_UK = torch.linalg.solve(gram_UKK, (picked_UKD @ along_UD[:, :, None])[:, :, 0])
        left_UD = along_UD - (weights_UK[:, :, None] * follows_UKD).sum(1)
        scores_UC = left_UD @ concepts_CD.T / (norm_U1 * sample.spread_C)
    coefficients_UK = weights_UK / norm_U1
    beside_UC = scores_UC.minimum(coefficients_UK.min(1, keepdim=True).values)
    return beside_UC.scatter(1, torch.stack(chosen, 1), coefficients_UK)


@scorer(marginal=1.0, logs=True)
def soft_wpmi(
    evidence: Evidence, *, top_k: int = 100, a: float = 10.0, p_start: float = 0.998, p_end: float = 0.97
) -> torch.Tensor:
    """Soft weighted pointwise mutual information of CLIP-Dissect (Oikarinen and Weng, ICLR 2023, section 3.3).

    P(c | x) = softmax_c(a cos(x, c)) for the exemplars x, whole images; p_x falls linearly from p_start to p_end with
    the rank: log p(unit | c) = sum_x log(1 + p_x (P(c | x) - 1)). The stage subtracts the log of its mean over all
    units of the layer. Defaults as published (top 100 images, a = 10).
    """
    likely_UKC, has_UK1 = _likely(evidence, top_k, a)
    rank_K = torch.arange(likely_UKC.shape[1], device=likely_UKC.device)
    inside_K1 = (p_start - rank_K / top_k * (p_start - p_end))[:, None]
    return likely_UKC.sub_(1).mul_(inside_K1).add_(1).add_(1e-7).log_().mul_(has_UK1).sum(1)


@scorer(marginal=0.6, logs=True)
def wpmi(evidence: Evidence, *, top_k: int = 28, a: float = 2.0) -> torch.Tensor:
    """Weighted pointwise mutual information of CLIP-Dissect (Oikarinen and Weng, ICLR 2023, section 3.3).

    log p(unit | c) = sum_x log P(c | x) over the exemplars, P as in soft_wpmi; the stage subtracts 0.6 times the log of
    its mean over all units of the layer. Defaults of the authors' code (top 28 images, a = 2).
    """
    likely_UKC, has_UK1 = _likely(evidence, top_k, a)
    return likely_UKC.add_(1e-7).log_().mul_(has_UK1).sum(1)


LIFT = 120
"""Times that a concept must be likelier than a random one, by the strongest images, to be the name of a unit that
another concept follows as closely over all images."""
SHARP = 20
"""Power of the relative correlation: a concept that follows the unit 3 % less closely counts half."""


def peak_or_whole(evidence: Evidence, pmi_UC: torch.Tensor) -> torch.Tensor:
    """The fits of a concept to the strongest images and to all of them, the larger one counting.

    With P = softmax_c(PMI) over C concepts and r the correlation (see `correlation`) as a share of the unit's best one,
    at least 0.001: log(r C P / LIFT + r^SHARP).
    """
    r_UC = correlation(evidence)
    r_UC = (r_UC / r_UC.amax(1, keepdim=True).clamp(min=1e-6)).clamp(min=1e-3)
    return (r_UC * len(evidence.concepts_CD) * pmi_UC.softmax(1) / LIFT + r_UC**SHARP).log()


@scorer(marginal=1.0, logs=True, dense=True, after=peak_or_whole)
def joint(evidence: Evidence, *, top_k: int = 10, a: float = 100.0) -> torch.Tensor:
    """What the strongest images show, if that is clear, else what follows the unit over all images. Ours.

    soft_wpmi over few images and with CLIP's own temperature names final layers best, correlation names hidden units
    best, and each is poor at the other's. The posterior of the first over concepts tells which unit is which: it is a
    hundred times the uniform one for units with one clear meaning and flat for the others (peak_or_whole). How it was
    found and measured: docs/design.md, section 9.
    """
    return soft_wpmi(evidence, top_k=top_k, a=a)


def _likely(evidence: Evidence, top_k: int, a: float) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax_c(a cos(x, c)) of the strongest exemplars [U, K, C], and which there are [U, K, 1].

    The first is by far the largest thing that scoring holds: callers go on in place.
    """
    exemplars_UKD = evidence.exemplars_UKD[:, :top_k]  # rows of one matrix: U small products take four times as long
    similarity_UKC = (exemplars_UKD.flatten(0, 1) @ evidence.concepts_CD.T).unflatten(0, exemplars_UKD.shape[:2])
    return similarity_UKC.mul_(a).log_softmax(2).exp_(), evidence.has_exemplar_UK[:, :top_k, None].float()


def share_asked(evidence: Evidence, chosen: ScorerSettings) -> torch.Tensor:
    """[U, 1], exemplars of each unit as a share of those that a scorer with a marginal sums over: log p(unit | concept)
    of so much of the images is compared with so much of the marginal. 1 for other scorers."""
    if not SCORERS[chosen.name].marginal:
        return torch.ones(len(evidence.has_exemplar_UK), 1, device=evidence.has_exemplar_UK.device)
    top_k = chosen.params.get("top_k", inspect.signature(SCORERS[chosen.name].score).parameters["top_k"].default)
    return evidence.has_exemplar_UK[:, :top_k].float().mean(1, keepdim=True)


def log_mean_exp(total_C: torch.Tensor, count: int) -> torch.Tensor:
    """Log of the mean, from the log of the sum."""
    return total_C - math.log(count)
