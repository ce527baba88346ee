"""What one stage minimises: its local objective.

An objective is a module of its own, beside the layers of its stage. It sees the features of its
stage, the target that travels with the batch, and what the objective of the stage before handed
on (`carry`); no gradient leaves the stage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from scpl.errors import InputError
from scpl.functional import observed_contrastive_loss
from scpl.message import Tree, tree_map

__all__ = [
    "ClassifiedContrast",
    "Contrastive",
    "CrossEntropy",
    "Normalization",
    "Nothing",
    "Objective",
    "Sum",
]

Normalization: TypeAlias = Literal["paper", "supcon"]


class Objective(nn.Module, ABC):
    """What one stage minimises."""

    observed: dict[str, Tensor]
    """What the last `forward` noticed beside its loss: detached scalars by name, which are reported
    and not minimised. They stay where they are, so noticing costs no device sync."""

    def __init__(self) -> None:
        super().__init__()
        self.observed = {}

    @abstractmethod
    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:
        """Compute the terms of the loss; the stage minimises their sum.

        Args:
            features: What the stage hands on, ``[N, ...]``, still attached to its layers.
            target: Class indices ``[N]``.
            carry: What `hand_on` of the stage before returned.

        Returns:
            Scalar terms by name, in float32.
        """

    def hand_on(self, target: Tensor, carry: Tree) -> Tree:
        """Return what the next stage's objective gets as `carry`: nothing, by default.

        It is called before the loss and without gradients, because a stage sends its result on
        before it learns from it.
        """
        return None

    def predict(self, features: Tree) -> Tensor | None:
        """Return logits ``[N, C]`` read out of this stage's features, or None."""
        return None


@final
class Nothing(Objective):
    """No objective of its own: the stage learns from the gradient of a later one."""

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:  # noqa: D102
        return {}


@final
class Contrastive(Objective):
    """Supervised contrastive loss of a projection of the features (SCPL, section 3).

    Args:
        head: Projection head, maps features to ``[N, D]``; discarded after training.
        temperature: Divides the similarities.
        normalization: See `scpl.functional.supervised_contrastive_loss`.
        weight: Factor on the loss.
        standardise: See the same.
    """

    def __init__(
        self,
        head: nn.Module,
        temperature: float = 0.1,
        normalization: Normalization = "paper",
        *,
        weight: float = 1.0,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        self.standardise = standardise
        self.head = head
        self.temperature = temperature
        self.normalization: Normalization = normalization
        self.weight = weight

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:  # noqa: D102
        loss, self.observed = observed_contrastive_loss(
            self.head(features),
            target,
            temperature=self.temperature,
            normalization=self.normalization,
            standardise=self.standardise,
        )
        return {"contrastive": self.weight * loss}


@final
class CrossEntropy(Objective):
    """Cross-entropy of a classifier on the features.

    Args:
        classifier: Maps features to logits ``[N, C]``.
        detach: Keep the gradient of the classifier's loss away from the stage's layers.
        label_smoothing: Share of the target that is spread evenly over all classes.
    """

    def __init__(
        self, classifier: nn.Module, *, detach: bool = False, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.detach = detach
        self.label_smoothing = label_smoothing

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:  # noqa: D102
        logits = self.classifier(tree_map(Tensor.detach, features) if self.detach else features)
        self.observed = {"accuracy": _accuracy(logits, target)}
        return {"cross_entropy": _cross_entropy(logits, target, self.label_smoothing)}

    def predict(self, features: Tree) -> Tensor:  # noqa: D102
        logits: Tensor = self.classifier(features)
        return logits


@final
class ClassifiedContrast(Objective):
    r"""Contrast and classify one projection of the features.

    The loss is :math:`(1 - w) L_{contrastive} + w L_{cross-entropy}`, and both look at the features
    through the same head, so the second costs next to nothing.

    Args:
        head: Maps features to ``[N, D]``; discarded after training.
        classifier: Maps projections to logits ``[N, C]``; discarded after training.
        share: w, above 0 and at most 1. At 1 there is no contrast.
        temperature: Divides the similarities.
        normalization: See `scpl.functional.supervised_contrastive_loss`.
        label_smoothing: Share of the target that is spread evenly over all classes.
        standardise: See `scpl.functional.supervised_contrastive_loss`.
    """

    def __init__(
        self,
        head: nn.Module,
        classifier: nn.Module,
        *,
        share: float = 0.5,
        temperature: float = 0.1,
        normalization: Normalization = "paper",
        label_smoothing: float = 0.0,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        self.head = head
        self.classifier = classifier
        self.standardise = standardise
        self.share = share
        self.temperature = temperature
        self.normalization: Normalization = normalization
        self.label_smoothing = label_smoothing

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:  # noqa: D102
        projections = self.head(features)
        terms: dict[str, Tensor] = {}
        observed: dict[str, Tensor] = {}
        if self.share < 1:
            contrastive, observed = observed_contrastive_loss(
                projections,
                target,
                temperature=self.temperature,
                normalization=self.normalization,
                standardise=self.standardise,
            )
            terms["contrastive"] = (1 - self.share) * contrastive
        logits = self.classifier(projections)
        self.observed = {**observed, "accuracy": _accuracy(logits, target)}
        entropy = _cross_entropy(logits, target, self.label_smoothing)
        return {**terms, "local_cross_entropy": self.share * entropy}

    def predict(self, features: Tree) -> Tensor:  # noqa: D102
        logits: Tensor = self.classifier(self.head(features))
        return logits


@final
class Sum(Objective):
    """Several objectives on the same features; each term keeps its name.

    Args:
        parts: The objectives. All get the same carry; predictions, and what is handed on, come
            from the last one that has any.
    """

    def __init__(self, *parts: Objective) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:  # noqa: D102
        terms: dict[str, Tensor] = {}
        self.observed = {}
        for part in self.parts:
            assert isinstance(part, Objective)
            for name, term in part(features, target, carry).items():
                if name in terms:
                    raise InputError(
                        "Terms of a loss must have different names", f"Got {name!r} twice"
                    )
                terms[name] = term
            self.observed.update(part.observed)
        return terms

    def hand_on(self, target: Tensor, carry: Tree) -> Tree:  # noqa: D102
        for part in reversed(self.parts):
            assert isinstance(part, Objective)
            onward = part.hand_on(target, carry)
            if onward is not None:
                return onward
        return None

    def predict(self, features: Tree) -> Tensor | None:  # noqa: D102
        for part in reversed(self.parts):
            assert isinstance(part, Objective)
            logits = part.predict(features)
            if logits is not None:
                return logits
        return None


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Share of a mini-batch that is classified right, as a tensor."""
    return (logits.detach().argmax(dim=1) == target).float().mean()


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return functional.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)
