"""PredSim: every stage learns from a local classifier and from similarities of its projections."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from scpl import heads
from scpl.errors import InputError
from scpl.heads import pooled
from scpl.losses.similarity import similarity_matching_loss
from scpl.methods.base import CrossEntropy, Method, Objective, Site, Sum
from scpl.partition.values import Tree

__all__ = ["PredSim"]

_MOST_FEATURES = 4096  # what a local classifier sees of a map at most


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

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:
        loss = similarity_matching_loss(self.whole(self.head(features)), target, self._num_classes)
        return {"similarity": self.weight * loss}


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
        return nn.Sequential(convolution, DeviationOverPositions())
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
    while math.prod((*shape[:1], rows, columns)) > _MOST_FEATURES and rows * columns > 1:
        if rows >= columns:
            rows = (rows + 1) // 2
        else:
            columns = (columns + 1) // 2
    layers, in_features = pooled(shape, (rows, columns))
    linear = nn.Linear(in_features, num_classes)
    nn.init.zeros_(linear.weight)
    return nn.Sequential(*layers, linear)


class DeviationOverPositions(nn.Module):
    """Standard deviation of each channel over its map, in at least float32."""

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[N, C, H, W]`` to ``[N, C]``."""
        precise = torch.promote_types(features.dtype, torch.float32)
        return features.flatten(2).to(precise).std(dim=2)


@dataclass(frozen=True)
class PredSim(Method):
    """Prediction and similarity matching (Nokland & Eidnes 2019).

    Each stage minimises ``(1 - w) * cross-entropy + w * similarity matching``. On the last stage
    the network's own readout takes the place of the local classifier.
    """

    name: ClassVar[str] = "predsim"
    tasks: ClassVar[tuple[str, ...]] = ("classes",)  # similarities of one-hot labels

    similarity_weight: float = 0.99
    """Weight w of the similarities, from 0 to 1 (classifiers learn nothing); the rest is the local
    classifier's."""
    head: heads.Head = similarity_head
    """Builds what is compared from the shape of one sample's features."""

    def __post_init__(self) -> None:
        if not 0 <= self.similarity_weight <= 1:
            raise InputError(
                "`similarity_weight` must lie in 0 .. 1", f"Got {self.similarity_weight}"
            )

    def objective(self, site: Site) -> Objective:  # noqa: D102
        similarity = SimilarityMatching(
            site.head(self.head), site.num_classes, weight=self.similarity_weight
        )
        classifier = site.readout
        if classifier is None:
            classifier = site.head(lambda shape: local_classifier(shape, site.num_classes))
        weight = 1 - self.similarity_weight
        return Sum(similarity, CrossEntropy(classifier, weight=weight, task=site.task))
