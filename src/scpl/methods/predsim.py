"""PredSim: every stage learns from a local classifier and from similarities of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scpl import heads
from scpl.errors import InputError
from scpl.methods.base import Method, Site
from scpl.objectives import CrossEntropy, Objective, Sum
from scpl.similarity import SimilarityMatching, local_classifier, similarity_head

__all__ = ["PredSim"]


@dataclass(frozen=True)
class PredSim(Method):
    """Prediction and similarity matching (Nokland & Eidnes 2019).

    Each stage minimises ``(1 - w) * cross-entropy + w * similarity matching``. On the last stage
    the network's own read-out takes the place of the local classifier.

    Attributes:
        num_classes: Number of classes.
        similarity_weight: w, from 0 ("pred") to 1; at 1 classifiers learn nothing.
        head: Builds what is compared from the shape of one sample's features.
    """

    name: ClassVar[str] = "predsim"

    similarity_weight: float = 0.99
    head: heads.Head = similarity_head

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.similarity_weight <= 1:
            raise InputError(
                "similarity_weight must lie in 0 .. 1", f"Got {self.similarity_weight}"
            )

    @property
    def has_exits(self) -> bool:  # noqa: D102
        return True

    def objective(self, site: Site) -> Objective:  # noqa: D102
        similarity = SimilarityMatching(
            self.head(site.feature_shape), self.num_classes, weight=self.similarity_weight
        )
        local = site.readout
        if local is None:
            local = local_classifier(site.feature_shape, self.num_classes)
        return Sum(similarity, CrossEntropy(local, weight=1 - self.similarity_weight))
