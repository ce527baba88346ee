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
    """

    name: ClassVar[str] = "early-exit"

    hidden_features: int = 512
    """Width of the hidden layer of local classifiers."""
    classifier: Callable[[tuple[int, ...], int], nn.Module] | None = field(default=None)
    """Builds a local classifier from feature shape and number of classes; default: a pooled
    two-layer network."""

    def objective(self, site: Site) -> Objective:  # noqa: D102
        if site.readout is not None:
            return CrossEntropy(site.readout)
        return CrossEntropy(
            heads.local_classifier(
                site.feature_shape, site.num_classes, self.hidden_features, self.classifier
            )
        )
