"""SCPL: every stage learns from a supervised contrastive loss (arXiv 2602.00062)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias, get_args

from torch import nn

from scpl import heads
from scpl.errors import InputError, unknown_name
from scpl.methods.base import Method, Site
from scpl.objectives import Contrastive, CrossEntropy, Normalization, Objective, Sum

__all__ = ["SCPL", "HeadFactory"]

HeadFactory: TypeAlias = Callable[[tuple[int, ...]], nn.Module]


@dataclass(frozen=True)
class SCPL(Method):
    """Supervised contrastive parallel learning.

    Each stage minimises the supervised contrastive loss of a projection of its features. The
    last stage also trains the network's classifier with cross-entropy; as in the paper its
    gradient does not reach the stage's layers, so every layer learns from contrast alone.

    Attributes:
        num_classes: Number of classes.
        temperature: Temperature of the contrastive loss.
        normalization: ``"paper"`` divides an anchor's loss by its positives + 1 (the authors'
            code), ``"supcon"`` by its positives (Khosla et al. 2020).
        head: Builds a projection head from the shape of one sample's features.
        classifier_gradient: Let the classifier's cross-entropy reach the last stage's layers.
    """

    name: ClassVar[str] = "scpl"

    temperature: float = 0.1
    normalization: Normalization = "paper"
    head: HeadFactory = field(default_factory=heads.PooledMLP)
    classifier_gradient: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise InputError("temperature must be more than 0", f"Got {self.temperature}")
        if self.normalization not in get_args(Normalization):
            raise unknown_name("normalization", self.normalization, get_args(Normalization))

    def objective(self, site: Site) -> Objective:  # noqa: D102
        contrastive = Contrastive(
            self.head(site.feature_shape), self.temperature, self.normalization
        )
        if site.readout is None:
            return contrastive
        return Sum(contrastive, CrossEntropy(site.readout, detach=not self.classifier_gradient))
