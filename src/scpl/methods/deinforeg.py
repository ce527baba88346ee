"""DeInfoReg: every stage regularises the information in a projection of its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import Tensor, nn

from scpl import heads
from scpl.errors import InputError
from scpl.losses.similarity import covariance_loss, similarity_matching_loss, variance_loss
from scpl.methods.base import CrossEntropy, Method, Objective, Site, Sum
from scpl.partition.values import Tree
from scpl.tasks import Classes, Task

__all__ = ["DeInfoReg"]


@final
class InformationRegularisation(Objective):
    """Variance, invariance and covariance of a projection, and a classifier on it (DeInfoReg).

    Args:
        head: Maps features to ``[N, D]``.
        num_classes: Number of classes.
        classifier: Maps the projection to logits ``[N, C]``; None where the network's own readout
            is trained beside this objective.
        weight: Factor on the classifier's cross-entropy, whose gradient reaches the layers.
        task: The classes, with their weights.
    """

    def __init__(
        self,
        head: nn.Module,
        num_classes: int,
        classifier: nn.Module | None = None,
        *,
        weight: float = 1.0,
        task: Task | None = None,
    ) -> None:
        super().__init__()
        self.task = task or Classes()
        self.head = head
        self.classifier = classifier
        self.weight = weight
        self._num_classes = num_classes

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:
        projections = self.whole(self.head(features))
        terms = {
            "variance": variance_loss(projections),
            "invariance": similarity_matching_loss(projections, target, self._num_classes),
            "covariance": covariance_loss(projections),
        }
        if self.classifier is not None:
            logits = self.classifier(projections)
            terms[self.task.loss_name] = self.weight * self.task.loss(logits, target)
        return terms

    def exit_module(self, earlier: Sequence[Objective]) -> nn.Module | None:
        return None if self.classifier is None else nn.Sequential(self.head, self.classifier)


@dataclass(frozen=True)
class DeInfoReg(Method):
    """Decoupled information regularisation (arXiv 2506.18193).

    Each stage minimises variance + invariance + covariance of a projection, and a little
    cross-entropy of a classifier on the projection. On the last stage that classifier is the
    network's own readout, on the features. (The published code reports the best of all stages'
    classifiers on the test data; here the last stage predicts.)
    """

    name: ClassVar[str] = "deinforeg"
    tasks: ClassVar[tuple[str, ...]] = ("classes",)  # similarities of one-hot labels

    classifier_weight: float = 0.001
    """Factor on the cross-entropy of the classifiers; above 0."""
    head: heads.Head = field(default_factory=lambda: heads.PooledMLP(out_features=512))
    """Builds a projection head from the shape of one sample's features. The published code has
    three layers of width 2048 with BatchNorm for images."""

    def __post_init__(self) -> None:
        if not self.classifier_weight > 0:
            raise InputError(
                "`classifier_weight` must be more than 0", f"Got {self.classifier_weight}"
            )

    def objective(self, site: Site) -> Objective:  # noqa: D102
        head = site.head(self.head)
        if site.readout is not None:
            return Sum(
                InformationRegularisation(head, site.num_classes),
                CrossEntropy(site.readout, weight=self.classifier_weight, task=site.task),
            )
        length = site.length(head)
        local = nn.Sequential(nn.ReLU(), nn.Linear(length, site.num_classes))
        return InformationRegularisation(
            head, site.num_classes, local, weight=self.classifier_weight, task=site.task
        )
