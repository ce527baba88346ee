"""Early Exit: every stage learns from the cross-entropy of its own classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from scpl import heads
from scpl.methods.base import CrossEntropy, Method, Objective, Site

__all__ = ["EarlyExit"]


@dataclass(frozen=True)
class EarlyExit(Method):
    """Local classifiers with gradients cut between stages.

    The classifier of the last stage is the network's own, and its cross-entropy trains the
    stage's layers. (The authors' variant gives the last stage a second local classifier and
    trains the network's own on detached features; the layers see the same kind of gradient.)

    Attributes:
        num_classes: Number of classes.
        hidden_features: Width of the local classifiers' hidden layer.
        classifier: Builds a local classifier from feature shape and number of classes;
            a pooled two-layer network by default.
    """

    name: ClassVar[str] = "early-exit"

    hidden_features: int = 512
    classifier: Callable[[tuple[int, ...], int], nn.Module] | None = field(default=None)

    @property
    def has_exits(self) -> bool:  # noqa: D102
        return True

    def objective(self, site: Site) -> Objective:  # noqa: D102
        if site.readout is not None:
            return CrossEntropy(site.readout)
        return CrossEntropy(
            heads.local_classifier(
                site.feature_shape, self.num_classes, self.hidden_features, self.classifier
            )
        )
