"""Scorers: how well each concept fits each unit.

In: the Evidence of a few units. Out: float32 scores [units, concepts]; larger is better, and only their order within a
unit means anything. Add one with @scorer; its keyword arguments become `scorer.params`.

Shapes: U units, C concepts, P patches and K exemplars per unit, L levels of crop size, D dimensions of CLIP.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

PMI: set[str] = set()
"""Scorers that subtract the marginal of their own values over all units of the layer."""
SCORERS: dict[str, Callable[..., torch.Tensor]] = {}


@dataclass
class ScorerSettings:
    name: str = "weighted_mean"
    params: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the scorer; the published values are the defaults."""
    keep: int = 10
    """Concepts kept per unit."""

    def __post_init__(self) -> None:
        if self.name not in SCORERS:
            raise ValueError(f"scorer.name={self.name}: allowed are {', '.join(SCORERS)}")
        allowed = list(inspect.signature(SCORERS[self.name]).parameters)[1:]
        for key in self.params:
            if key not in allowed:
                raise ValueError(
                    f"scorer.params.{key}: unknown for {self.name}; allowed are {', '.join(allowed) or 'none'}"
                )
        if self.keep < 1:
            raise ValueError(f"scorer.keep={self.keep}: must be at least 1")


@dataclass
class Evidence:
    """What is known of a few units of one layer; everything float32 unless said."""

    concepts_CD: torch.Tensor
    patches_UPD: torch.Tensor
    """CLIP vectors of the patches, strongest first; zero where a unit has fewer."""
    has_patch_UP: torch.Tensor
    """bool"""
    levels_UP: torch.Tensor
    """int64, crop size of each patch."""
    exemplars_UKD: torch.Tensor
    """CLIP vectors of the whole exemplar images, strongest first; zero where a unit has fewer."""
    has_exemplar_UK: torch.Tensor
    """bool"""
    weighted_UD: torch.Tensor
    """Sum over the explain images of activation^3 x (image vector - mean image vector)."""
    null_mean_LC: torch.Tensor
    """Mean similarity of random crops of each size to each concept."""
    null_std_LC: torch.Tensor

    def patch_similarity(self) -> torch.Tensor:
        """[U, P, C]"""
        return self.patches_UPD @ self.concepts_CD.T

    def null_z(self) -> torch.Tensor:
        """[U, C], mean similarity of the patches against as many random crops of the same sizes, in standard errors.

        z = sum_p (s_pc - mean_lc) / sqrt(sum_p std_lc^2) with l the size of patch p: a concept to which everything is
        similar gets no credit for it, nor does a unit whose patches are small.
        """
        has_UP1 = self.has_patch_UP[:, :, None].float()
        excess = ((self.patch_similarity() - self.null_mean_LC[self.levels_UP]) * has_UP1).sum(1)
        variance = (self.null_std_LC[self.levels_UP].square() * has_UP1).sum(1)
        return excess / variance.sqrt().clamp(min=1e-6)


def scorer(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Register under the function's name."""
    SCORERS[function.__name__] = function
    return function


def pmi(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Register a scorer whose values are log p(unit | concept) up to the layer's marginal, which `scores` subtracts."""
    PMI.add(function.__name__)
    return scorer(function)


@scorer
def mean_cosine(evidence: Evidence) -> torch.Tensor:
    """Mean CLIP similarity of the patches to the concept: (1/P) sum_p cos(patch_p, c).

    The score of "Automated Natural Language Explanation of Deep Visual Neurons with Large Models" (arXiv 2310.10708).
    """
    count_U1 = evidence.has_patch_UP.sum(1, keepdim=True).clamp(min=1)
    return (evidence.patches_UPD.sum(1) / count_U1) @ evidence.concepts_CD.T


@scorer
def contrastive(evidence: Evidence) -> torch.Tensor:
    """How far the patches' mean similarity lies above that of random crops, in standard errors (Evidence.null_z)."""
    return evidence.null_z()


@scorer
def weighted_mean(evidence: Evidence) -> torch.Tensor:
    """Activation-weighted mean of the image's similarity to the concept, standardised per concept. Ours.

    score = sum_x a(x)^3 (s_c(x) - mean s_c) / std s_c, up to a factor of the unit, over all explain images x with
    pooled activation a and similarity s_c(x) = cos(e(x), c): every image counts and not only the exemplars, and the
    cube lets the strong ones lead. It needs no similarity of single images, because the sum is w . c with
    w = sum_x a(x)^3 (e(x) - mean e). Dividing by the concept's own spread keeps concepts to which everything varies a
    lot from winning everywhere.
    """
    return F.normalize(evidence.weighted_UD, dim=1) @ evidence.concepts_CD.T / evidence.null_std_LC[0]


@pmi
def soft_wpmi(
    evidence: Evidence, *, top_k: int = 100, a: float = 10.0, p_start: float = 0.998, p_end: float = 0.97
) -> torch.Tensor:
    """Soft weighted pointwise mutual information of CLIP-Dissect (Oikarinen and Weng, ICLR 2023, section 3.3).

    P(c | x) = softmax_c(a cos(x, c)) for the exemplars x, whole images; p_x falls linearly from p_start to p_end with
    the rank: log p(unit | c) = sum_x log(1 + p_x (P(c | x) - 1)). The stage subtracts the log of its mean over all
    units of the layer. Defaults as published (top 100 images, a = 10).
    """
    exemplars = evidence.exemplars_UKD[:, :top_k]
    has = evidence.has_exemplar_UK[:, :top_k]
    rank = torch.arange(exemplars.shape[1], device=exemplars.device)
    inside_K = p_start - rank / top_k * (p_start - p_end)
    found = []
    for unit, keep in zip(exemplars, has, strict=True):  # U is a chunk of a few units; [U, K, C] at once would not fit
        likely_KC = (a * (unit[keep] @ evidence.concepts_CD.T)).softmax(1)
        found.append((1 + inside_K[keep, None] * (likely_KC - 1) + 1e-7).log().sum(0))
    return torch.stack(found)


def unexplained(weighted_UD: torch.Tensor, concept_UD: torch.Tensor, covariance_DD: torch.Tensor) -> torch.Tensor:
    """Evidence.weighted_UD of what one concept per unit leaves of it: the part of activation^3 that does not follow the
    similarity s_c linearly. One step of matching pursuit (Mallat and Zhang 1993).

    With y = activation^3 and centred vectors X [N, D], covariance S = X'X / N: the regression of y on s_c = X c has the
    slope w.c / (N c'Sc), so X'(y - slope s_c) = w - (w.c / c'Sc) S c.
    """
    follows_UD = concept_UD @ covariance_DD
    spread_U1 = (follows_UD * concept_UD).sum(1, keepdim=True).clamp(min=1e-12)
    return weighted_UD - (weighted_UD * concept_UD).sum(1, keepdim=True) / spread_U1 * follows_UD


def log_mean_exp(total_C: torch.Tensor, count: int) -> torch.Tensor:
    """Log of the mean, from the log of the sum."""
    return total_C - math.log(count)
