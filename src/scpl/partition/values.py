"""What crosses a cut: tensors in plain lists, tuples and dicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from scpl.errors import InputError

__all__ = ["TensorSpec", "Tree", "dense", "is_channels_last", "tensors_of", "tree_map"]

Tree: TypeAlias = Any
"""A tensor, None, or a list, tuple or dict (string keys) of trees."""


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is like: sizes a receive buffer and names a difference.

    Attributes:
        shape: Its sizes.
        dtype: Its type.
        channels_last: Whether maps ``[N, C, H, W]`` lie in memory with their channels last.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Describe ``tensor``."""
        return cls(tuple(tensor.shape), tensor.dtype, is_channels_last(tensor))

    def empty(self, device: torch.device | str = "cpu") -> Tensor:
        """Allocate such a tensor."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=layout)

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


def is_channels_last(tensor: Tensor) -> bool:
    """Whether maps lie in memory with their channels last, and are not contiguous as well."""
    return (
        tensor.ndim == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def dense(tensor: Tensor) -> Tensor:
    """Lay a tensor out without gaps: maps whose channels lie last stay so, others are contiguous.

    Strides are those of a new tensor. Where a size is 1 any stride would do, and kernels are chosen
    by it.
    """
    channels_last = is_channels_last(tensor)
    plain = tensor if channels_last else tensor.contiguous()
    strides, step = [0] * plain.ndim, 1
    for place in (1, 3, 2, 0) if channels_last else reversed(range(plain.ndim)):
        strides[place] = step
        step *= max(plain.shape[place], 1)
    return plain if plain.stride() == tuple(strides) else plain.as_strided(plain.shape, strides)


def tree_map(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """Apply ``function`` to every tensor of ``tree``, keeping its structure.

    Raises:
        InputError: if the tree holds something that is not a tensor, None, list, tuple or dict.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if tree is None:
        return None
    if type(tree) is list:
        return [tree_map(function, item) for item in tree]
    if type(tree) is tuple:
        return tuple(tree_map(function, item) for item in tree)
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {key: tree_map(function, item) for key, item in tree.items()}
    raise InputError(
        "What crosses a cut must be a tensor, None, or plain lists, tuples and dicts of them",
        f"Got {type(tree).__module__}.{type(tree).__qualname__}",
        "Cut elsewhere, or let the module before the cut return plain tensors",
    )


def tensors_of(tree: Tree) -> list[Tensor]:
    """List the tensors of ``tree`` in a fixed order."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found
