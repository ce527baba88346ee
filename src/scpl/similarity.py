"""Objectives that compare similarities of rows with those of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from scpl.functional import covariance_loss, similarity_matching_loss, variance_loss
from scpl.message import Tree
from scpl.objectives import Objective

__all__ = ["InformationRegularization", "SimilarityMatching"]


@final
class SimilarityMatching(Objective):
    """Similarity matching loss of a projection of the features (PredSim).

    Args:
        head: Maps features to ``[N, D]``; discarded after training.
        num_classes: Number of classes.
        weight: Factor on the loss.
    """

    def __init__(self, head: nn.Module, num_classes: int, *, weight: float = 1.0) -> None:
        super().__init__()
        self.head = head
        self.weight = weight
        self._num_classes = num_classes

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:  # noqa: D102
        loss = similarity_matching_loss(self.head(features), target, self._num_classes)
        return {"similarity": self.weight * loss}


@final
class InformationRegularization(Objective):
    """Variance, invariance and covariance of a projection, and a classifier on it (DeInfoReg).

    Args:
        head: Maps features to ``[N, D]``.
        num_classes: Number of classes.
        classifier: Maps the projection to logits ``[N, C]``; None where the network's own read-out
            is trained beside this objective.
        weight: Factor on the classifier's cross-entropy, whose gradient reaches the layers.
    """

    def __init__(
        self,
        head: nn.Module,
        num_classes: int,
        classifier: nn.Module | None = None,
        *,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.head = head
        self.classifier = classifier
        self.weight = weight
        self._num_classes = num_classes

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:  # noqa: D102
        projections = self.head(features)
        terms = {
            "variance": variance_loss(projections),
            "invariance": similarity_matching_loss(projections, target, self._num_classes),
            "covariance": covariance_loss(projections),
        }
        if self.classifier is not None:
            logits = self.classifier(projections)
            with torch.autocast(logits.device.type, enabled=False):
                loss = functional.cross_entropy(logits.float(), target)
            terms["cross_entropy"] = self.weight * loss
        return terms

    def predict(self, features: Tree) -> Tensor | None:  # noqa: D102
        return None if self.classifier is None else self.classifier(self.head(features))

    def reader(self, earlier: Sequence[Objective]) -> nn.Module | None:  # noqa: D102
        return None if self.classifier is None else nn.Sequential(self.head, self.classifier)
