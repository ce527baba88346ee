"""Early Exit: every stage learns from the cross-entropy of its own classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scpl.methods.base import CrossEntropy, LocalClassifiers, Objective, Site

__all__ = ["EarlyExit"]


@dataclass(frozen=True)
class EarlyExit(LocalClassifiers):
    """Local classifiers with gradients cut between stages.

    The classifier of the last stage is the network's own, and its cross-entropy trains the
    stage's layers. (The authors' variant gives the last stage a second local classifier and
    trains the network's own on detached features; the layers see the same kind of gradient.)
    """

    name: ClassVar[str] = "early-exit"

    def objective(self, site: Site) -> Objective:  # noqa: D102
        return CrossEntropy(self.classifier_of(site), task=site.task)
