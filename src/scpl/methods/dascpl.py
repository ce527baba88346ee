"""DASCPL: SCPL with a local classifier per stage that leaves the features alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from scpl import heads
from scpl.methods.base import CrossEntropy, Objective, Site, Sum
from scpl.methods.scpl import ContrastiveMethod

__all__ = ["DASCPL"]


@dataclass(frozen=True)
class DASCPL(ContrastiveMethod):
    """Contrast trains the layers as in SCPL, and every stage can predict (Ho 2023).

    All layers learn from contrast alone. The local classifiers learn from cross-entropy on detached
    features, so the layers end as they do under SCPL with the same settings. The last stage is that
    of the paper's SCPL, with the network's own classifier.
    """

    name: ClassVar[str] = "dascpl"

    hidden_features: int = 512
    """Width of the hidden layer of local classifiers."""
    classifier: Callable[[tuple[int, ...], int], nn.Module] | None = field(default=None)
    """Builds a local classifier from feature shape and number of classes; default: a pooled
    two-layer network."""

    def objective(self, site: Site) -> Objective:  # noqa: D102
        contrastive = self.contrast(site)
        local = site.readout or heads.local_classifier(
            site.feature_shape, site.num_classes, self.hidden_features, self.classifier
        )
        return Sum(contrastive, CrossEntropy(local, detach=True))
