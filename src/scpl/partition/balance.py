"""Choose cuts, and who hosts which stages, so that the most expensive part costs least.

Cost is counted in floating-point operations on an example, not timed: every rank must find the
same cuts by itself, on any hardware, every time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scpl.errors import PartitionError
from scpl.partition.inputs import Form
from scpl.partition.layers import Chain, children, is_chain, last_with_parameters
from scpl.partition.values import Tree
from scpl.partition.verify import run_network, undisturbed

__all__ = [
    "Cuts",
    "TooFewLayers",
    "balanced_cuts",
    "best_cuts",
    "count_operations",
    "counting_operations",
    "minmax_partition",
    "stages_per_rank",
]

_WORTH_OPENING = 1.1
"""A coarser cut is kept if its largest stage costs at most this many times the best one's."""


def balanced_cuts(
    model: nn.Module, num_stages: int, readout: str | None, example: Tree
) -> list[str]:
    """Choose the layers of a chain that the second and later stages begin with.

    Args:
        model: The network, a chain of layers.
        num_stages: Number of stages wanted.
        readout: Where the classifier begins; default: the last layer with parameters.
        example: A small batch.

    Raises:
        PartitionError: if the network has fewer layers that compute than stages wanted.
    """
    operations = count_operations(model, example)
    levels = (
        [(name, operations.get(name, 0.0)) for name, _ in body]
        for body in _levels(children(model), readout)
    )
    return best_cuts(levels, num_stages).names


class TooFewLayers(PartitionError):
    """There are fewer layers that compute than stages wanted."""


class Cuts(NamedTuple):
    """Layers to cut before, and what the most expensive stage costs then."""

    names: list[str]
    largest: float


def best_cuts(levels: Iterable[list[tuple[str, float]]], num_stages: int) -> Cuts:
    """Choose the layers that the second and later stages begin with.

    A stage begins with a layer that computes (a convolution, a linear layer, a block), so
    normalisation, activation and pooling stay with the layer they follow. Layers are opened, one
    level at a time, only where that makes the most expensive stage cheaper by more than a tenth: it
    decides the speed of all, and otherwise cuts between a network's own blocks are easier to read.

    Args:
        levels: The layers before the classifier with their costs, each time opened further.
        num_stages: Number of stages wanted.

    Raises:
        PartitionError: if there are fewer layers that compute than stages wanted.
    """
    if num_stages < 1:
        raise PartitionError("num_stages must be at least 1", f"Got {num_stages}")
    found: list[Cuts] = []
    units: list[tuple[str, float]] = []
    for units in map(_units, levels):
        if len(units) >= num_stages:
            costs = [cost for _, cost in units]
            starts = minmax_partition(costs, num_stages)
            largest = max(sum(costs[a:b]) for a, b in pairwise([*starts, len(costs)]))
            found.append(Cuts([units[start][0] for start in starts[1:]], largest))
    if not found:
        raise TooFewLayers(
            f"{num_stages} stages need as many layers that compute, before the classifier",
            f"Got {len(units)}: {', '.join(name for name, _ in units)}",
            f"Ask for at most {len(units)} stages",
        )
    least = min(cuts.largest for cuts in found)
    return next(cuts for cuts in found if cuts.largest <= _WORTH_OPENING * least)


def _levels(chain: Chain, readout: str | None) -> Iterator[Chain]:
    """Yield the layers before the classifier, each time with one more level of nesting opened."""
    while True:
        names = [name for name, _ in chain]
        end = names.index(readout) if readout in names else last_with_parameters(chain) or 0
        body = chain[:end]
        yield body
        tail = chain[end:]
        opened = _open_one_level(body)
        if len(opened) == len(body) and not readout:
            tail = _open_one_level(tail)  # the classifier may be the end of a longer Sequential
        if len(opened) + len(tail) == len(chain):
            return
        chain = [*opened, *tail]


def minmax_partition(costs: Sequence[float], num_parts: int) -> list[int]:
    """Cut a sequence of costs into contiguous parts, the largest as small as possible.

    Args:
        costs: Cost of each element, in order.
        num_parts: At most ``len(costs)``.

    Returns:
        The first index of each part; the exact optimum, by dynamic programming.
    """
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    size = len(costs)
    best = {(1, end): (prefix[end], 0) for end in range(1, size + 1)}
    for parts in range(2, num_parts + 1):
        for end in range(parts, size + 1):
            best[parts, end] = min(
                (max(best[parts - 1, start][0], prefix[end] - prefix[start]), start)
                for start in range(parts - 1, end)
            )
    starts, end = [], size
    for parts in range(num_parts, 0, -1):
        end = best[parts, end][1]
        starts.append(end)
    return starts[::-1]


def stages_per_rank(costs: Sequence[float], num_ranks: int) -> tuple[int, ...]:
    """Choose how many consecutive stages each rank hosts.

    Args:
        costs: Of each stage, in order.
        num_ranks: At most ``len(costs)``.
    """
    starts = [*minmax_partition(costs, num_ranks), len(costs)]
    return tuple(end - start for start, end in pairwise(starts))


def count_operations(model: nn.Module, example: Tree) -> dict[str, float]:
    """Count the floating-point operations of every module of a chain by dotted name.

    Raises:
        PartitionError: if the network does not accept the example.
    """
    with undisturbed(model), counting_operations() as counter, torch.no_grad():
        model.eval()
        run_network(model, Form.whole(), example)
    # The counter prefixes every name with the class of the root module.
    root = type(model).__name__
    return {
        name.removeprefix(f"{root}."): float(sum(operations.values()))
        for name, operations in counter.get_flop_counts().items()
    }


@contextmanager
def counting_operations() -> Iterator[FlopCounterMode]:
    """Count the floating-point operations of what is run inside."""
    # A Transformer layer would take a fused path in which the counter sees no operation.
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


Shape: TypeAlias = Sequence[int]


def _lookup(*_: Any, out_shape: Shape, **__: Any) -> int:
    """Count an embedding as one operation per entry, so that it is a layer that computes."""
    return prod(out_shape)


def _recurrent(inputs: Shape, first: Any, second: Any, *_: Any, **__: Any) -> int:
    """Count every matrix of a recurrent layer once per time step and sample.

    Matrices and biases come as a list (CUDA), or the two matrices of one direction (CPU).
    """
    shapes: list[Shape] = [first, second] if isinstance(first[0], int) else first
    matrices: int = sum(prod(shape) for shape in shapes if len(shape) == 2)
    return 2 * prod(inputs[:-1]) * matrices


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Count the two products of attention: ``[N, heads, L, C]`` each."""
    return 2 * prod(query[:3]) * key[2] * (query[3] + value[3])


_FORMULAS = {
    torch.ops.aten.embedding: _lookup,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent,
    torch.ops.aten._cudnn_rnn: _recurrent,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}
"""Operations that torch counts as none."""


def _units(layers: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Join each layer that does not compute to the one before it."""
    units: list[tuple[str, float]] = []
    for name, cost in layers:
        if cost > 0.0 and units and units[-1][1] == 0.0:
            units[-1] = (units[-1][0], cost)
        elif cost > 0.0 or not units:
            units.append((name, cost))
    return units


def _open_one_level(chain: Chain) -> Chain:
    opened: list[tuple[str, nn.Module]] = []
    for name, module in chain:
        if is_chain(module):
            opened += [(f"{name}.{inner}", child) for inner, child in children(module)]
        else:
            opened.append((name, module))
    return opened
