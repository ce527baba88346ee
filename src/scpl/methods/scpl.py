"""SCPL: every stage learns from a supervised contrastive loss (arXiv 2602.00062)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

from torch import Tensor, nn

from scpl import heads
from scpl.errors import InputError, unknown_name
from scpl.losses.contrastive import (
    Normalization,
    compare,
    contrastive_loss,
    observe_contrast,
)
from scpl.methods.base import CrossEntropy, Method, Objective, Site, Sum
from scpl.partition.values import Tree
from scpl.tasks import Classes, Task

__all__ = ["SCPL", "ContrastiveMethod"]


_CONTRAST = {"above_chance", "positives", "without_positives", "spread"}
"""What contrast alone observes."""


@final
class Contrastive(Objective):
    """Supervised contrastive loss of a projection of the features (SCPL, section 3).

    Args:
        head: Projection head, maps features to ``[N, D]``; discarded after training.
        temperature: Divides the similarities.
        normalization: See `scpl.losses.contrastive.supervised_contrastive_loss`.
        standardise: See the same.
        weight: Factor on the loss.
        task: Says which samples belong together.
    """

    def __init__(
        self,
        head: nn.Module,
        temperature: float = 0.1,
        normalization: Normalization = "paper",
        *,
        standardise: bool = False,
        weight: float = 1.0,
        task: Task | None = None,
    ) -> None:
        super().__init__()
        self.task = task or Classes()
        self.head = head
        self.temperature = temperature
        self.normalization: Normalization = normalization
        self.standardise = standardise
        self.weight = weight

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:
        return {"contrastive": self.weight * self.contrast(self.project(features), target)}

    def project(self, features: Tree) -> Tensor:
        """Compute projections ``[N, D]`` of the whole mini-batch."""
        return self.whole(self.head(features))

    def contrast(self, projections: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of projections ``[N, D]``, and observe it."""
        compared = compare(
            projections,
            self.task.pairs(target),
            temperature=self.temperature,
            standardise=self.standardise,
        )
        self.observed = observe_contrast(compared, projections, self.normalization)
        return contrastive_loss(compared, self.normalization)


@final
class ClassifiedContrast(Objective):
    r"""Contrast and classify one projection of the features.

    The loss is :math:`(1 - w) L_{contrastive} + w L_{cross-entropy}` (or the loss of another task),
    and both look at the features through the same head, so the second costs next to nothing.

    Args:
        contrastive: The contrast, with its head; its weight is 1 - w.
        classifier: Maps projections to logits ``[N, C]``; discarded after training.
    """

    def __init__(self, contrastive: Contrastive, classifier: nn.Module) -> None:
        super().__init__()
        self.contrastive = contrastive
        self.classifier = classifier

    def forward(self, features: Tree, target: Tensor, carry: Tree) -> dict[str, Tensor]:
        weight, self.observed, terms = self.contrastive.weight, {}, {}
        projections = self.contrastive.project(features)
        if weight > 0:
            terms["contrastive"] = weight * self.contrastive.contrast(projections, target)
            self.observed |= self.contrastive.observed
        logits = self.classifier(projections)
        task = self.contrastive.task
        self.observed |= task.observe(logits, target)
        loss = task.loss(logits, target)
        return {**terms, f"local_{task.loss_name}": (1 - weight) * loss}

    def exit_module(self, earlier: Sequence[Objective]) -> nn.Module:
        return nn.Sequential(self.contrastive.head, self.classifier)


@dataclass(frozen=True)
class ContrastiveMethod(Method):
    """What methods have in common whose stages contrast a projection of their features."""

    temperature: float = 0.1
    """Temperature of the contrastive loss; above 0."""
    normalization: Literal["paper", "supcon"] = "paper"
    """Divide an anchor's loss by its positives + 1 (paper: the authors' code) or by its positives
    (supcon: Khosla et al. 2020)."""
    head: Literal["conv", "next", "pooled-mlp", "mlp", "linear", "identity"] | heads.Head = "conv"
    """Projection head; conv: strided convolutions, then pooled-mlp; next: a copy of the layer, or
    part of a layer, that follows the stage, then pooled-mlp, the default of the command line for
    hf:..., whose layers are trained already; mlp: the paper's, on flattened feature maps."""
    head_depth: int = 1
    """Convolutions of the conv head."""
    head_width: float = 1.0
    """Channels of the conv head, as a factor on those of the features."""
    standardise: bool = True
    """Standardise projections over the mini-batch before they are contrasted; in the paper they
    are not."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise InputError("`temperature` must be more than 0", f"Got {self.temperature}")
        if self.normalization not in get_args(Normalization):
            raise unknown_name("normalization", self.normalization, get_args(Normalization))
        if not 0 < self.head_width < math.inf:
            raise InputError("`head_width` must be more than 0", f"Got {self.head_width}")
        if self.head_depth < 0:
            raise InputError("`head_depth` must not be negative", f"Got {self.head_depth}")
        self._head_factory()  # which says what is wrong with it

    def contrast(self, site: Site, weight: float = 1.0) -> Contrastive:
        """Build the contrastive loss of a stage, with its head."""
        build = site.head_behind_next if self.head == "next" else site.head
        return Contrastive(
            build(self._head_factory()),
            self.temperature,
            self.normalization,
            weight=weight,
            standardise=self.standardise,
            task=site.task,
        )

    @classmethod
    def advice(cls, observed: Mapping[str, float]) -> str:  # noqa: D102
        seen = "above_chance" in observed and not observed.keys() <= _CONTRAST
        return "let its objective see more with `head_depth` 2" if seen else ""

    def _head_factory(self) -> heads.Head:
        if not isinstance(self.head, str):
            return self.head
        if self.head == "conv":
            return heads.Convolutional(self.head_depth, self.head_width)
        return heads.by_name("pooled-mlp" if self.head == "next" else self.head)


@dataclass(frozen=True)
class SCPL(ContrastiveMethod):
    """Supervised contrastive parallel learning.

    Each stage minimises the supervised contrastive loss of a projection of its features, or a mix
    of it with the cross-entropy of a linear classifier on the same projection. The last stage
    also trains the network's own classifier with cross-entropy.
    """

    name: ClassVar[str] = "scpl"

    cross_entropy: float = 0.8
    """Share w of cross-entropy (labels, numbers: of their loss), beside contrast, in a stage's
    loss: 0 (the paper's) to 1 (no contrast, the default of the command line for hf:...). Where the
    network's own classifier teaches the last stage, it takes the place of the local one, with
    weight 1."""
    classifier_gradient: bool = True
    """Let the network's own classifier teach the last stage's layers. In the paper it does not: its
    input is detached, and every layer learns from contrast alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.cross_entropy <= 1:
            raise InputError(
                "`cross_entropy` must be a share of the local loss, from 0 to 1",
                f"Got {self.cross_entropy}",
            )

    @classmethod
    def advice(cls, observed: Mapping[str, float]) -> str:  # noqa: D102
        if observed.keys() <= _CONTRAST:  # contrast alone
            return "add a local classifier with `cross_entropy` 0.8"
        return super().advice(observed)

    def objective(self, site: Site) -> Objective:  # noqa: D102
        if site.readout is None:
            return self._local(site)
        readout = CrossEntropy(site.readout, detach=not self.classifier_gradient, task=site.task)
        if not self.classifier_gradient:
            return Sum(self._local(site), readout)
        if self.cross_entropy == 1:
            return readout
        return Sum(self.contrast(site, 1 - self.cross_entropy), readout)

    def _local(self, site: Site) -> Objective:
        """Build the objective that looks at the features through a head alone."""
        contrast = self.contrast(site, 1 - self.cross_entropy)
        if self.cross_entropy == 0:
            return contrast
        length = site.length(contrast.head)
        classifier = nn.Linear(length, site.num_classes)
        return ClassifiedContrast(contrast, classifier)
