"""What one stage minimises: its local objective.

An objective is a module of its own, beside the layers of its stage. It sees the features of its
stage, the target that travels with the batch, and what the objective of the stage before handed
on (`carry`); no gradient leaves the stage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from scpl.errors import InputError
from scpl.functional import compare, contrastive_loss
from scpl.message import Tree, tree_map
from scpl.observations import observe_accuracy, observe_contrast

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

    def share(self, received: Tree) -> Tree:
        """Tell the next stage's objective what it needs for its predictions.

        It is called at the beginning of every evaluation, before the first `predict`, in the order
        of the stages. What is received is passed on, by default.

        Args:
            received: What `share` of the stage before returned; None on the first stage.
        """
        return received

    def reader(self, earlier: Sequence[Objective]) -> nn.Module | None:
        """Return the module from this stage's features to logits that `predict` applies, or None.

        It is put together of modules of this objective and of earlier ones, for export.

        Args:
            earlier: The objectives of all stages before, in order.
        """
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
        standardise: See the same.
        weight: Factor on the loss.
    """

    def __init__(
        self,
        head: nn.Module,
        temperature: float = 0.1,
        normalization: Normalization = "paper",
        *,
        standardise: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.head = head
        self.temperature = temperature
        self.normalization: Normalization = normalization
        self.standardise = standardise
        self.weight = weight

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:  # noqa: D102
        return {"contrastive": self.weight * self.contrast(self.head(features), target)}

    def contrast(self, projections: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of projections ``[N, D]``, and observe it."""
        compared = compare(
            projections, target, temperature=self.temperature, standardise=self.standardise
        )
        self.observed = observe_contrast(compared, projections, self.normalization)
        return contrastive_loss(compared, self.normalization)


@final
class ClassifiedContrast(Objective):
    r"""Contrast and classify one projection of the features.

    The loss is :math:`(1 - w) L_{contrastive} + w L_{cross-entropy}`, and both look at the features
    through the same head, so the second costs next to nothing.

    Args:
        contrastive: The contrast, with its head; its weight is 1 - w.
        classifier: Maps projections to logits ``[N, C]``; discarded after training.
        label_smoothing: Share of the target that is spread evenly over all classes.
    """

    def __init__(
        self, contrastive: Contrastive, classifier: nn.Module, *, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.contrastive = contrastive
        self.classifier = classifier
        self.label_smoothing = label_smoothing

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:  # noqa: D102
        weight, self.observed, terms = self.contrastive.weight, {}, {}
        projections = self.contrastive.head(features)
        if weight > 0:
            terms["contrastive"] = weight * self.contrastive.contrast(projections, target)
            self.observed |= self.contrastive.observed
        logits = self.classifier(projections)
        self.observed |= observe_accuracy(logits, target)
        loss = _cross_entropy(logits, target, self.label_smoothing)
        return {**terms, "local_cross_entropy": (1 - weight) * loss}

    def predict(self, features: Tree) -> Tensor:  # noqa: D102
        logits: Tensor = self.classifier(self.contrastive.head(features))
        return logits

    def reader(self, earlier: Sequence[Objective]) -> nn.Module:  # noqa: D102
        return nn.Sequential(self.contrastive.head, self.classifier)


@final
class CrossEntropy(Objective):
    """Cross-entropy of a classifier on the features.

    Args:
        classifier: Maps features to logits ``[N, C]``.
        detach: Keep the gradient of the classifier's loss away from the stage's layers.
        weight: Factor on the loss.
        label_smoothing: Share of the target that is spread evenly over all classes.
    """

    def __init__(
        self,
        classifier: nn.Module,
        *,
        detach: bool = False,
        weight: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.detach = detach
        self.weight = weight
        self.label_smoothing = label_smoothing

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:  # noqa: D102
        logits = self.classifier(tree_map(Tensor.detach, features) if self.detach else features)
        self.observed = observe_accuracy(logits, target)
        loss = _cross_entropy(logits, target, self.label_smoothing)
        return {"cross_entropy": loss if self.weight == 1.0 else self.weight * loss}

    def predict(self, features: Tree) -> Tensor:  # noqa: D102
        logits: Tensor = self.classifier(features)
        return logits

    def reader(self, earlier: Sequence[Objective]) -> nn.Module:  # noqa: D102
        return self.classifier


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
            self.observed |= part.observed
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

    def share(self, received: Tree) -> Tree:  # noqa: D102
        for part in self.parts:
            assert isinstance(part, Objective)
            received = part.share(received)
        return received

    def reader(self, earlier: Sequence[Objective]) -> nn.Module | None:  # noqa: D102
        for part in reversed(self.parts):
            assert isinstance(part, Objective)
            reader = part.reader(earlier)
            if reader is not None:
                return reader
        return None


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return functional.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)
