"""Draw rows so that every class keeps its share."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["stratified"]


def stratified(labels: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """Choose ``count`` places, each class within one of its exact share; bool ``[N]``.

    Args:
        labels: Class of each row, ``int64 [N]``.
        count: How many rows to choose.
        draws: Decides which; the global random state is not used.
    """
    sizes = torch.bincount(labels)
    quota = sizes * count // len(labels)
    remainder = sizes * count % len(labels)
    # Places that rounding left over go to the largest remainders; ties are broken at random.
    shuffled = torch.randperm(len(sizes), generator=draws)
    largest = shuffled[torch.argsort(remainder[shuffled], descending=True, stable=True)]
    quota[largest[: count - int(quota.sum())]] += 1
    order = torch.randperm(len(labels), generator=draws)
    by_class = order[torch.argsort(labels[order], stable=True)]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    ends = list(itertools.accumulate(sizes.tolist()))
    for end, size, keep in zip(ends, sizes.tolist(), quota.tolist(), strict=True):
        chosen[by_class[end - size : end - size + keep]] = True
    return chosen
