"""What the objective of a stage sees of the stage's output.

A stage may hand on more than one tensor: texts travel as hidden vectors and a mask. Objectives,
projection heads and local classifiers want one tensor. So a layer may say how its output is
summarised, by a method ``summarize``; the last layer of a stage is asked. Without such a method
the objective sees the output itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from scpl.partition.chain import children, is_chain
from scpl.partition.values import Tree

__all__ = ["Summarizing", "Summary", "summary_of"]

Summary: TypeAlias = Callable[[Tree], Tensor]


@runtime_checkable
class Summarizing(Protocol):
    """A layer that says what a local objective sees of its output."""

    def summarize(self, features: Tree) -> Tensor:
        """Summarise one output of this layer.

        Args:
            features: What the layer's ``forward`` returned, still attached to it.

        Returns:
            One row per sample, ``[N, ...]``. The shape of a row must not depend on the batch.
        """


def summary_of(body: nn.Sequential) -> Summary | None:
    """Find how the output of a stage is summarised: as its last layer says, or not at all."""
    layers = children(body)
    if not layers:
        return None
    _, last = layers[-1]
    if isinstance(last, Summarizing):
        return last.summarize
    return summary_of(last) if isinstance(last, nn.Sequential) and is_chain(last) else None
