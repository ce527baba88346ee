"""What a method is: which objective each stage gets, and how predictions are read out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from scpl.errors import InputError
from scpl.losses.contrastive import observe_accuracy
from scpl.partition.values import Tree, tree_map

__all__ = ["CrossEntropy", "Layout", "Method", "Nothing", "Objective", "Site", "Sum"]

Layout: TypeAlias = Literal["stages", "one", "replicas"]
"""Who holds the network: each rank some of its stages, one rank all of it, or every rank all."""


@dataclass(frozen=True)
class Site:
    """Where an objective is wanted.

    Attributes:
        index: The stage, from 0.
        num_stages: How many stages there are.
        num_classes: Number of classes; targets lie in ``0 .. num_classes - 1``.
        feature_shape: Shape of one sample of the stage's features, without the batch.
        readout: The network's own classifier; only the last stage has it.
    """

    index: int
    num_stages: int
    num_classes: int
    feature_shape: tuple[int, ...]
    readout: nn.Module | None

    @property
    def is_last(self) -> bool:
        """Whether this is the stage that predicts."""
        return self.readout is not None


@dataclass(frozen=True)
class Method(ABC):
    """A way to train the stages.

    The fields of a method are its options. Those of plain types (numbers, strings, ``Literal``)
    are flags of the command line as well, and the text below a field is its help. The command line
    reads both from the source, without importing torch, so types and defaults must be written out.
    """

    name: ClassVar[str]
    cuts_gradients: ClassVar[bool] = True
    """False: the network is trained end to end (backpropagation)."""
    layout: ClassVar[Layout] = "stages"
    """Who holds the network when there are several ranks."""
    replaces_readout: ClassVar[bool] = False
    """Whether the last stage's `reader` predicts instead of the network's own read-out."""

    @abstractmethod
    def objective(self, site: Site) -> Objective:
        """Build the objective of one stage; called once per stage."""

    @classmethod
    def advice(cls, observed: Mapping[str, float]) -> str:
        """Say which option may help a stage that has learned nothing; by default none.

        Args:
            observed: Means of `Objective.observed` over an epoch.

        Returns:
            What to do, with the names of options in backticks, or an empty string.
        """
        return ""


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
        loss = cross_entropy_loss(logits, target, self.label_smoothing)
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


def cross_entropy_loss(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return functional.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)
