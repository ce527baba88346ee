"""Choose cuts, and who hosts which stages, so that the most expensive part costs least.

Cost is counted in floating-point operations on an example, not timed: every rank must find the
same cuts by itself, on any hardware, every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scpl.errors import PartitionError
from scpl.partition.layers import Chain, children, is_chain, last_with_parameters, undisturbed

__all__ = ["balanced_cuts", "count_operations", "minmax_partition", "stages_per_rank"]

_WORTH_OPENING = 1.1
"""A coarser cut is kept if its largest stage costs at most this many times the best one's."""


def balanced_cuts(
    model: nn.Module, num_stages: int, readout: str | None, example: Tensor
) -> list[str]:
    """Choose the layers that the second and later stages begin with.

    A stage begins with a layer that computes (a convolution, a linear layer, a block), so
    normalisation, activation and pooling stay with the layer they follow. Nested
    ``nn.Sequential`` layers are opened, one level at a time, only where that makes the most
    expensive stage cheaper by more than a tenth: it decides the speed of all, and otherwise cuts
    between a network's own blocks are easier to read.

    Args:
        model: The network, a chain of layers.
        num_stages: Number of stages wanted.
        readout: Where the classifier begins; default: the last layer with parameters.
        example: A small batch.

    Raises:
        PartitionError: if the network has fewer layers that compute than stages wanted.
    """
    if num_stages < 1:
        raise PartitionError("num_stages must be at least 1", f"Got {num_stages}")
    operations = count_operations(model, example)
    levels = [_units(body, operations) for body in _levels(children(model), readout)]
    found: list[tuple[float, list[str]]] = []  # cost of the largest stage, and the cuts
    for units in levels:
        if len(units) >= num_stages:
            costs = [cost for _, cost in units]
            starts = minmax_partition(costs, num_stages)
            largest = max(sum(costs[a:b]) for a, b in pairwise([*starts, len(costs)]))
            found.append((largest, [units[start][0] for start in starts[1:]]))
    if not found:
        finest = levels[-1]
        raise PartitionError(
            f"{num_stages} stages need as many layers that compute, before the classifier",
            f"Got {len(finest)}: {', '.join(name for name, _ in finest)}",
            f"Ask for at most {len(finest)} stages",
        )
    least = min(largest for largest, _ in found)
    return next(cuts for largest, cuts in found if largest <= _WORTH_OPENING * least)


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


def count_operations(model: nn.Module, example: Tensor) -> dict[str, float]:
    """Count the floating-point operations of every module of ``model`` by dotted name.

    Raises:
        PartitionError: if the network does not accept the example.
    """
    # A Transformer layer would take a fused path in which the counter sees no operation.
    fast = torch.backends.mha.get_fastpath_enabled()
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with undisturbed(model, example), counter:
            model(example.clone())
    except Exception as error:
        raise PartitionError(
            "The network must accept the example batch",
            f"On {tuple(example.shape)} it raised {type(error).__name__}: {error}",
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    # The counter prefixes every name with the class of the root module.
    root = type(model).__name__
    return {
        name.removeprefix(f"{root}."): float(sum(operations.values()))
        for name, operations in counter.get_flop_counts().items()
    }


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


def _units(chain: Chain, costs: dict[str, float]) -> list[tuple[str, float]]:
    """Join each layer that does not compute to the one before it."""
    units: list[tuple[str, float]] = []
    for name, _ in chain:
        cost = costs.get(name, 0.0)
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
