"""DASCPL: SCPL with a local classifier per stage that leaves the features alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from scpl import heads
from scpl.methods.base import CrossEntropy, Objective, Site, Sum
from scpl.methods.scpl import SCPL

__all__ = ["DASCPL"]


@dataclass(frozen=True)
class DASCPL(SCPL):
    """Contrast trains the layers as in SCPL, and every stage can predict (Ho 2023).

    All layers learn from contrast alone. The local classifiers learn from cross-entropy on detached
    features, so the layers end as they do under SCPL with the same settings. The last stage is that
    of SCPL, with the network's own classifier.

    Attributes:
        num_classes: Number of classes.
        hidden_features: Width of the local classifiers' hidden layer.
        classifier: Builds a local classifier from feature shape and number of classes;
            a pooled two-layer network by default.
    """

    name: ClassVar[str] = "dascpl"

    cross_entropy: float = 0.0
    classifier_gradient: bool = False
    hidden_features: int = 512
    classifier: Callable[[tuple[int, ...], int], nn.Module] | None = field(default=None)

    @property
    def has_exits(self) -> bool:  # noqa: D102
        return True

    def objective(self, site: Site) -> Objective:  # noqa: D102
        contrastive = super().objective(site)
        if site.readout is not None:
            return contrastive
        local = heads.local_classifier(
            site.feature_shape, self.num_classes, self.hidden_features, self.classifier
        )
        return Sum(contrastive, CrossEntropy(local, detach=True))
