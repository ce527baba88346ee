"""What PredSim and DeInfoReg minimise: similarities of rows against those of their classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from scpl.heads import pooled
from scpl.message import Tree
from scpl.objectives import Objective
from scpl.row_losses import covariance_loss, similarity_matching_loss, variance_loss

__all__ = [
    "InformationRegularization",
    "SimilarityMatching",
    "local_classifier",
    "similarity_head",
]

MOST_FEATURES = 4096
"""What a local classifier of PredSim sees of a map at most."""


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


def similarity_head(shape: tuple[int, ...]) -> nn.Module:
    """Build what PredSim compares: ``[N, *shape] -> [N, C]``, without bias.

    Maps ``[C, H, W]`` go through a 3 x 3 convolution, and each channel becomes its standard
    deviation over the positions. Sequences ``[L, C]`` are averaged over L, and flat features (or
    maps of one pixel) taken as they are; both go through a linear layer.

    Args:
        shape: Of one sample's features.

    Raises:
        InputError: for a shape that is none of the three.

    Source:
        Nokland & Eidnes 2019, "Training Neural Networks with Local Error Signals", section 3.
    """
    layers, width = pooled(shape, 1)
    if len(shape) == 3 and shape[1] * shape[2] > 1:
        convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
        return nn.Sequential(convolution, SpreadOverPositions())
    return nn.Sequential(*layers, nn.Linear(width, width, bias=False))


def local_classifier(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build PredSim's classifier: one linear layer that begins with zeros.

    A map ``[C, H, W]`` is first averaged: its longer side is halved until at most 4096 entries are
    left (or one pixel). Sequences are averaged over L, and flat features taken as they are.

    Args:
        shape: Of one sample's features.
        num_classes: Number of logits.

    Raises:
        InputError: for a shape that is none of the three.

    Source:
        The classifier of the published PredSim code; there, sides are halved in turn.
    """
    rows, columns = shape[1:] if len(shape) == 3 else (1, 1)
    while math.prod((*shape[:1], rows, columns)) > MOST_FEATURES and rows * columns > 1:
        if rows >= columns:
            rows = (rows + 1) // 2
        else:
            columns = (columns + 1) // 2
    layers, in_features = pooled(shape, (rows, columns))
    linear = nn.Linear(in_features, num_classes)
    nn.init.zeros_(linear.weight)
    return nn.Sequential(*layers, linear)


class SpreadOverPositions(nn.Module):
    """Standard deviation of each channel over its map, in at least float32."""

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[N, C, H, W]`` to ``[N, C]``."""
        precise = torch.promote_types(features.dtype, torch.float32)
        return features.flatten(2).to(precise).std(dim=2)
