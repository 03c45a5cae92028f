"""What is known of a few units when their concepts are scored.

In: vectors and activations laid out by the stage. Out: Evidence, and what several scorers need of it.

Shapes: U units, C concepts, P patches and K exemplars per unit, L levels of crop size, S images of the explain sample,
D dimensions of CLIP.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F

CONCEPTS = 4096
"""Concepts to which the similarity of all images of the sample is known at once."""


@dataclass
class Sample:
    """The explain images whose pooled activations are stored, the same for all units of a run."""

    images_SD: torch.Tensor
    """CLIP vectors minus their mean over the sample."""
    mean_D: torch.Tensor
    """That mean."""
    concepts_CD: torch.Tensor
    made: dict[Hashable, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def covariance_DD(self) -> torch.Tensor:
        """Of the vectors; zero without images."""
        return (self.images_SD.T.double() @ self.images_SD.double() / max(len(self.images_SD), 1)).float()

    @cached_property
    def spread_C(self) -> torch.Tensor:
        """Standard deviation of the similarity of the images to each concept."""
        return ((self.concepts_CD @ self.covariance_DD) * self.concepts_CD).sum(1).clamp(min=1e-12).sqrt()

    def of_similarity(self, key: Hashable, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """float32 [S, C], `change` of the similarities minus their mean over the sample; it gets and gives [S, some
        concepts]. Made once under its key. Large: only scorers that are not linear in the similarity may ask.
        """
        if key not in self.made:
            self.made[key] = torch.empty(len(self.images_SD), len(self.concepts_CD), device=self.images_SD.device)
            parts = zip(self.made[key].split(CONCEPTS, 1), self.concepts_CD.split(CONCEPTS), strict=True)
            for part_SC, concepts_CD in parts:
                part_SC.copy_(change(self.images_SD @ concepts_CD.T))
        return self.made[key]


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
    summed_UD: torch.Tensor
    """Sum over the explain images of activation x (image vector - mean image vector)."""
    weighted_UD: torch.Tensor
    """The same of activation^3."""
    null_mean_LC: torch.Tensor
    """Mean similarity of random crops of each size to each concept."""
    null_std_LC: torch.Tensor
    sample: Sample
    activations_US: torch.Tensor
    """Pooled activations on the images of the sample."""

    def null_z(self) -> torch.Tensor:
        """[U, C], mean similarity of the patches against as many random crops of the same sizes, in standard errors.

        z = sum_p (s_pc - mean_lc) / sqrt(sum_p std_lc^2) with l the size of patch p: a concept to which everything is
        similar gets no credit for it, nor does a unit whose patches are small. Sums of patches and of sizes say it all:
        no similarity of single patches is needed.
        """
        sizes_UPL = F.one_hot(self.levels_UP, len(self.null_mean_LC)) * self.has_patch_UP[:, :, None]
        count_UL = sizes_UPL.sum(1).float()
        excess_UC = self.patches_UPD.sum(1) @ self.concepts_CD.T - count_UL @ self.null_mean_LC
        variance_UC = count_UL @ self.null_std_LC.square()
        return excess_UC / variance_UC.sqrt().clamp(min=1e-6)
