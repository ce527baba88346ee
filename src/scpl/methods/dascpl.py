"""DASCPL: SCPL with a local classifier per stage that leaves the features alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scpl.methods.base import CrossEntropy, LocalClassifiers, Objective, Site, Sum
from scpl.methods.scpl import ContrastiveMethod

__all__ = ["DASCPL"]


@dataclass(frozen=True)
class DASCPL(LocalClassifiers, ContrastiveMethod):
    """Contrast trains the layers as in SCPL, and every stage can predict (Ho 2023).

    All layers learn from contrast alone. The local classifiers learn from cross-entropy on detached
    features, so the layers end as they do under SCPL with the same settings. The last stage is that
    of the paper's SCPL, with the network's own classifier.
    """

    name: ClassVar[str] = "dascpl"

    def objective(self, site: Site) -> Objective:  # noqa: D102
        contrast = self.contrast(site)
        local = CrossEntropy(self.classifier_of(site), detach=True, task=site.task)
        return Sum(contrast, local)
