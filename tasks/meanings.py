"""What a concept explains of a unit: its share of the patches, and what another concept adds to it.

In: Evidence of a few units and concepts of theirs. Out: shares of the patches, and the concept that adds most.
"""

import torch

from tasks.evidence import Evidence

ADDS, LEADS = 0.15, 0.2
"""A second meaning must add this share of what the first one says, and lead the median concept by this share of the
first's lead. Of planted units with two meanings 53 of 60 show both so, and 4 % of those with one get a second
(docs/design.md, section 9)."""
SHARE_Z = 1.645
"""A patch matches a concept if its similarity is above the 95 % quantile of random crops, taken as normal."""
CLUSTER = 0.2
"""Share of the patches below which they are no meaning of their own."""


def above_median(values_UC: torch.Tensor) -> torch.Tensor:
    return values_UC - values_UC.median(1, keepdim=True).values


def adding(evidence: Evidence, first_U1: torch.Tensor, covariance_DD: torch.Tensor) -> torch.Tensor:
    """int64 [U, 1], of the concepts with a lead (LEADS) the one that fits best what the first leaves unexplained: the
    other half of a unit that means two things, which near-synonyms of the first would crowd out. -1 where none adds
    enough (ADDS). All by the plain sums: cubes listen to the stronger half alone."""
    first_UD, spread_C = evidence.concepts_CD[first_U1[:, 0]], evidence.null_std_LC[0]
    fits_UC, rest_UC = (
        sums_UD @ evidence.concepts_CD.T / spread_C
        for sums_UD in (evidence.summed_UD, unexplained(evidence.summed_UD, first_UD, covariance_DD))
    )
    lead_UC, rest_UC = above_median(fits_UC), rest_UC.scatter(1, first_U1, -torch.inf)
    rest_UC = rest_UC.masked_fill(lead_UC <= LEADS * lead_UC.gather(1, first_U1).clamp(min=0), -torch.inf)
    gain_U1, adds_U1 = rest_UC.max(1, keepdim=True)
    return adds_U1.where(gain_U1 > ADDS * fits_UC.gather(1, first_U1), -1)


def unexplained(summed_UD: torch.Tensor, concept_UD: torch.Tensor, covariance_DD: torch.Tensor) -> torch.Tensor:
    """Evidence.summed_UD of what one concept per unit leaves of it: the part of the activation that does not follow the
    similarity s_c linearly. One step of matching pursuit (Mallat and Zhang 1993).

    With y = activation and centred vectors X [N, D], covariance S = X'X / N: the regression of y on s_c = X c has the
    slope w.c / (N c'Sc), so X'(y - slope s_c) = w - (w.c / c'Sc) S c.
    """
    follows_UD = concept_UD @ covariance_DD
    spread_U1 = (follows_UD * concept_UD).sum(1, keepdim=True).clamp(min=1e-12)
    return summed_UD - (summed_UD * concept_UD).sum(1, keepdim=True) / spread_U1 * follows_UD


def _patch_z(evidence: Evidence, index_UR: torch.Tensor) -> torch.Tensor:
    """[U, P, R], similarity of each patch to a few concepts per unit, in standard deviations above random crops."""
    levels_UP1, index_U1R = evidence.levels_UP[:, :, None], index_UR[:, None]
    similarity_UPR = evidence.patches_UPD @ evidence.concepts_CD[index_UR].transpose(1, 2)
    return (similarity_UPR - evidence.null_mean_LC[levels_UP1, index_U1R]) / evidence.null_std_LC[levels_UP1, index_U1R]


def share(evidence: Evidence, index_UR: torch.Tensor) -> torch.Tensor:
    """[U, R], share of each unit's patches that match each of its kept concepts."""
    matches_UPR = (_patch_z(evidence, index_UR) > SHARE_Z) & evidence.has_patch_UP[:, :, None]
    return matches_UPR.sum(1) / evidence.has_patch_UP.sum(1, keepdim=True).clamp(min=1)


def meaning_shares(evidence: Evidence, first_U1: torch.Tensor, adds_U1: torch.Tensor) -> torch.Tensor:
    """[U, 2], share of each unit's patches that the first concept fits best and that the one that adds to it does; 1
    and 0 where nothing adds, or to less than CLUSTER of them. The patches' two clusters, with the concepts as centres.
    """
    z_UP2 = _patch_z(evidence, torch.cat([first_U1, adds_U1.clamp(min=0)], 1))
    other_UP = (z_UP2[:, :, 1] > z_UP2[:, :, 0]) & evidence.has_patch_UP & (adds_U1 >= 0)
    other_U = other_UP.sum(1) / evidence.has_patch_UP.sum(1).clamp(min=1)
    other_U = torch.where(other_U >= CLUSTER, other_U, 0)
    return torch.stack([1 - other_U, other_U], 1)
