"""Layers of a network: chains, and what the objective of a stage sees of its last layer.

A stage may hand on more than one tensor: texts travel as hidden vectors and a mask. Objectives,
projection heads and local classifiers want one tensor. So a layer may say how its output is
summarised, by a method ``summarize``; the last layer of a stage is asked. Without such a method
the objective sees the output itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, final, runtime_checkable

from torch import Tensor, nn

from scpl.partition.values import Tree

__all__ = [
    "Chain",
    "ChainBody",
    "Summarizing",
    "Summary",
    "children",
    "holder",
    "is_chain",
    "last_with_parameters",
    "place",
    "place_tensor",
    "summary_of",
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


def holder(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Find the dictionary in which a module keeps a parameter or buffer, and its key there."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    kept: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    return kept, leaf


def place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make a module part of ``root`` under a dotted name."""
    path, _, leaf = name.rpartition(".")
    _container(root, path)._modules[leaf] = module


def place_tensor(root: nn.Module, model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Make a parameter or buffer of ``model`` part of ``root``, under the same dotted name.

    Returns:
        The dictionary that now holds it, and its key there.
    """
    path, _, leaf = name.rpartition(".")
    module, container = model.get_submodule(path), _container(root, path)
    if leaf in module._parameters:
        container._parameters[leaf] = module._parameters[leaf]
        return container._parameters, leaf
    container._buffers[leaf] = module._buffers[leaf]
    if leaf in module._non_persistent_buffers_set:
        container._non_persistent_buffers_set.add(leaf)
    return container._buffers, leaf


def _container(root: nn.Module, path: str) -> nn.Module:
    """Find or make the empty modules along a path. The user's names may be those of methods."""
    for part in path.split(".") if path else ():
        found = root._modules.setdefault(part, nn.Module())
        assert found is not None
        root = found
    return root


@final
class ChainBody(nn.Module):
    """Layers called one after the other, under their own keys.

    Args:
        chain: The layers by dotted name.
    """

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.layers = tuple(module for _, module in chain)  # in a tuple: no second key
        for name, module in chain:
            place(self, name, module)

    def forward(self, features: Tree) -> Tree:
        """Compute what the last layer returns."""
        for layer in self.layers:
            features = layer(features)
        return features


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


def summary_of(chain: Chain) -> Summary | None:
    """Find how the output of layers is summarised: as the last one says, or not at all."""
    if not chain:
        return None
    _, last = chain[-1]
    if isinstance(last, Summarizing):
        return last.summarize
    return summary_of(children(last)) if is_chain(last) else None
