"""Draw some rows of a data set so that no class is forgotten."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["one_per_class", "stratified"]


def stratified(labels: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """Choose ``count`` rows, each class within one of its exact share; bool ``[N]``.

    ``labels`` are ``int64 [N]``; the global random state is not used.
    """
    sizes = torch.bincount(labels)
    quota = sizes * count // len(labels)
    remainder = sizes * count % len(labels)
    # Rows that rounding left over go to the largest remainders; ties are broken at random.
    shuffled = torch.randperm(len(sizes), generator=draws)
    largest = shuffled[torch.argsort(remainder[shuffled], descending=True, stable=True)]
    quota[largest[: count - int(quota.sum())]] += 1
    by_class = _shuffled_by_class(labels, draws)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    ends = itertools.accumulate(sizes.tolist())
    for end, size, keep in zip(ends, sizes.tolist(), quota.tolist(), strict=True):
        chosen[by_class[end - size : end - size + keep]] = True
    return chosen


def one_per_class(labels: Tensor, draws: torch.Generator) -> Tensor:
    """Choose one row of every class at random; bool ``[N]``."""
    by_class = _shuffled_by_class(labels, draws)
    sizes = torch.bincount(labels)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[by_class[(sizes.cumsum(0) - sizes)[sizes > 0]]] = True
    return chosen


def _shuffled_by_class(labels: Tensor, draws: torch.Generator) -> Tensor:
    """All rows, sorted by class and in random order within each; ``int64 [N]``."""
    order = torch.randperm(len(labels), generator=draws)
    return order[torch.argsort(labels[order], stable=True)]
