"""Layers of a network: chains, and what the objective of a stage sees of its last layer.

A stage may hand on more than one tensor: texts travel as hidden vectors and a mask. Objectives,
projection heads and local classifiers want one tensor. So a layer may say how its output is
summarised, by a method ``summarize``; the last layer of a stage is asked. Without such a method
the objective sees the output itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from scpl.partition.values import Tree

__all__ = [
    "Chain",
    "Summarizing",
    "Summary",
    "children",
    "is_chain",
    "last_with_parameters",
    "summary_of",
    "undisturbed",
]

Chain: TypeAlias = Sequence[tuple[str, nn.Module]]
"""Layers by dotted name, each called on the output of the one before."""
Summary: TypeAlias = Callable[[Tree], Tensor]


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the named children; unlike ``named_children`` a layer that is used twice comes twice."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def is_chain(module: nn.Module) -> bool:
    """Whether the forward pass is, for certain, the children one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def last_with_parameters(chain: Chain) -> int | None:
    """Find the last layer that has parameters: the classifier, unless the user names one."""
    having = (i for i, (_, layer) in enumerate(chain) if next(layer.parameters(), None) is not None)
    return max(having, default=None)


@contextmanager
def undisturbed(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Run a network in evaluation mode, without gradients or a trace on modes and generators."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng([example.device] if example.is_cuda else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@runtime_checkable
class Summarizing(Protocol):
    """A layer that says what a local objective sees of its output."""

    def summarize(self, features: Tree) -> Tensor:
        """Summarise one output of this layer.

        Args:
            features: What the layer's ``forward`` returned, still attached to it.

        Returns:
            One entry per sample, ``[N, ...]``. Its shape must not depend on the batch.
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
