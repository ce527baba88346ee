"""Draw rows of a data set so that no class is forgotten.

A class stands for whatever rows are sorted by, see `Task.strata`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from scpl.errors import DataError, InputError

__all__ = ["evenly", "held_out", "one_per_class", "stratified"]


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


def held_out(labels: Tensor, share: float, draws: torch.Generator, name: str) -> Tensor:
    """Choose a share of the rows, equally of each class; one of each at least is left.

    Args:
        labels: ``int64 [N]``.
        share: Share of all rows.
        draws: The global random state is not used.
        name: What the share is called, for messages.

    Returns:
        bool ``[N]``.

    Raises:
        InputError: It is no share.
        DataError: Nothing would be chosen, or not one of each class be left.
    """
    if not 0 < share < 1:
        raise InputError(f"{name} must be a share, above 0 and below 1", f"Got {share}")
    others = torch.nonzero(~one_per_class(labels, draws))[:, 0]
    count = round(len(labels) * share)
    if not 0 < count <= len(others):
        raise DataError(
            "Both parts of a split must hold a sample, and the first one of every class",
            f"Got {name} {share} of {len(labels)} samples",
            "Use more samples or another share",
        )
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[others] = stratified(labels[others], count, draws)
    return chosen


def one_per_class(labels: Tensor, draws: torch.Generator) -> Tensor:
    """Choose one row of every class at random; bool ``[N]``."""
    by_class = _shuffled_by_class(labels, draws)
    sizes = torch.bincount(labels)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[by_class[(sizes.cumsum(0) - sizes)[sizes > 0]]] = True
    return chosen


def evenly(labels: Tensor, draws: torch.Generator) -> Tensor:
    """Draw an epoch with as many rows of each class as of any other, in random order.

    An epoch is as long as the data. Every row of a class comes once before one of them comes again.

    Returns:
        Rows, ``int64 [N]``.
    """
    rows = [each for each in _by_class(labels) if len(each)]
    quota, left = divmod(len(labels), len(rows))
    more = set(torch.randperm(len(rows), generator=draws)[:left].tolist())
    chosen = []
    for place, each in enumerate(rows):
        wanted = quota + (place in more)
        rounds = -(-wanted // len(each))
        orders = [torch.randperm(len(each), generator=draws) for _ in range(rounds)]
        chosen += [each[order] for order in orders[:-1]]
        chosen += [each[order[: wanted - (rounds - 1) * len(each)]] for order in orders[-1:]]
    drawn = torch.cat(chosen)
    return drawn[torch.randperm(len(drawn), generator=draws)]


def _by_class(labels: Tensor) -> tuple[Tensor, ...]:
    sizes = torch.bincount(labels).tolist()
    return torch.split(torch.argsort(labels, stable=True), sizes)


def _shuffled_by_class(labels: Tensor, draws: torch.Generator) -> Tensor:
    """All rows, sorted by class and in random order within each; ``int64 [N]``."""
    order = torch.randperm(len(labels), generator=draws)
    return order[torch.argsort(labels[order], stable=True)]
