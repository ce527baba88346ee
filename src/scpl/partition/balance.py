"""Choose cuts, and who hosts which stages, so that the most expensive part costs least.

By default cost is counted in floating-point operations on an example, not timed: every rank must
find the same cuts by itself, on any hardware, every time. `scpl.engine.planning` measures instead;
`share_out` is what it chooses by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scpl.errors import PartitionError
from scpl.partition.inputs import Form
from scpl.partition.layers import Chain, children, is_chain, last_with_parameters
from scpl.partition.values import Tree
from scpl.partition.verify import run_network, undisturbed

__all__ = [
    "Cuts",
    "TooFewLayers",
    "all_cuts",
    "balanced_cuts",
    "best_cuts",
    "chain_levels",
    "count_operations",
    "counting_operations",
    "minmax_partition",
    "share_out",
    "stages_per_rank",
]

_WORTH_OPENING = 1.1
"""A coarser cut is kept if its largest stage costs at most this many times the best one's."""

_SAME_SPEED = 1.02
"""Shares-out whose slowest ranks differ by less than this factor are as good: nobody could measure
the difference, and the one with the smallest largest stage needs least memory."""


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
    return best_cuts(chain_levels(model, readout, example), num_stages).names


def chain_levels(
    model: nn.Module, readout: str | None, example: Tree
) -> Iterator[list[tuple[str, float]]]:
    """Yield the layers of a chain before the classifier with their operations, as `best_cuts`."""
    operations = count_operations(model, example)
    for body in _levels(children(model), readout):
        yield [(name, operations.get(name, 0.0)) for name, _ in body]


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


def all_cuts(levels: Iterable[list[tuple[str, float]]], num_stages: int) -> list[list[str]]:
    """List all layers that a stage can begin with, opened as far as possible; then less far.

    Args:
        levels: As for `best_cuts`.
        num_stages: So many must be possible.
    """
    units = [[name for name, _ in _units(level)][1:] for level in levels]
    return [names for names in reversed(units) if len(names) + 1 >= num_stages]


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


def minmax_partition(
    costs: Sequence[float], num_parts: int, speeds: Sequence[float] = ()
) -> list[int]:
    """Cut a sequence of costs into contiguous parts, the longest as short as possible.

    Args:
        costs: Cost of each element, in order.
        num_parts: At most ``len(costs)``.
        speeds: How fast each part is done, in their order; default: all alike.

    Returns:
        The first index of each part; the exact optimum, by dynamic programming.
    """
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    size = len(costs)
    speeds = speeds or [1.0] * num_parts
    best = {(1, end): (prefix[end] / speeds[0], 0) for end in range(1, size + 1)}
    for parts in range(2, num_parts + 1):
        for end in range(parts, size + 1):
            best[parts, end] = min(
                (
                    max(
                        best[parts - 1, start][0],
                        (prefix[end] - prefix[start]) / speeds[parts - 1],
                    ),
                    start,
                )
                for start in range(parts - 1, end)
            )
    starts, end = [], size
    for parts in range(num_parts, 0, -1):
        end = best[parts, end][1]
        starts.append(end)
    return starts[::-1]


def stages_per_rank(
    costs: Sequence[float], num_ranks: int, speeds: Sequence[float] = ()
) -> tuple[int, ...]:
    """Choose how many consecutive stages each rank, or group of replicas, hosts.

    Args:
        costs: Of each stage, in order.
        num_ranks: At most ``len(costs)``.
        speeds: Of each rank or group; default: all alike.
    """
    starts = [*minmax_partition(costs, num_ranks, speeds), len(costs)]
    return tuple(end - start for start, end in pairwise(starts))


def share_out(
    costs: Tensor, num_stages: int, num_ranks: int, speeds: Sequence[float] = ()
) -> list[list[tuple[int, int]]]:
    """Cut a row of units into stages and share them out to ranks: the slowest rank is the fastest.

    Exact, by dynamic programming over products in which plus is the minimum: of two stages on one
    rank the costs add up, of two ranks the larger one counts. Among shares-out that are as fast,
    the largest stage is as small as it can be.

    Args:
        costs: ``[n + 1, n + 1]``; entry ``[a, b]`` is the cost of units ``a .. b - 1`` as one
            stage, infinite where that is none.
        num_stages: At most n.
        num_ranks: At most `num_stages`. With 1, stages are as equal as if each had its own rank.
        speeds: What each rank does of such costs per second, in their order; default: all 1.

    Returns:
        For each rank its stages, each as ``(a, b)``.
    """
    if num_ranks == 1 < num_stages:
        alone = share_out(costs, num_stages, num_stages)
        return [[stage for stages in alone for stage in stages]]
    speeds = speeds or [1.0] * num_ranks
    limits: list[float] = sorted(set(costs[costs.isfinite()].tolist()))
    best = _slowest(costs, num_stages, speeds)[-1][num_stages][-1].item()
    low, high = 0, len(limits) - 1  # by bisection: a higher limit never makes the ranks slower
    while low < high:
        middle = (low + high) // 2
        limited = costs.masked_fill(costs > limits[middle], torch.inf)
        slowest = _slowest(limited, num_stages, speeds)[-1][num_stages][-1].item()
        low, high = (low, middle) if slowest <= best * _SAME_SPEED else (middle + 1, high)
    return _trace_back(costs.masked_fill(costs > limits[low], torch.inf), num_stages, speeds)


def _sums(costs: Tensor, most: int) -> list[Tensor]:
    """For each number of stages the least sum of their costs, from a unit to another one."""
    start = torch.full_like(costs, torch.inf).fill_diagonal_(0.0)
    found = [start]
    for _ in range(most):
        found.append((found[-1].unsqueeze(2) + costs.unsqueeze(0)).amin(1))
    return found


def _slowest(costs: Tensor, num_stages: int, speeds: Sequence[float]) -> list[list[Tensor]]:
    """The time of the slowest of the first ranks, by their number, that of stages, and the end."""
    most = num_stages - len(speeds) + 1  # stages of one rank: each other one has at least one
    sums, size = _sums(costs, most), len(costs)
    nothing = torch.full((size,), torch.inf, dtype=costs.dtype)
    begin = nothing.clone()
    begin[0] = 0.0
    table = [[begin, *[nothing] * num_stages]]
    for rank, speed in enumerate(speeds, 1):
        row = [nothing] * (num_stages + 1)
        for stages in range(rank, rank + most):
            ways = [
                torch.maximum(table[-1][stages - own].unsqueeze(1), sums[own] / speed).amin(0)
                for own in range(1, stages - rank + 2)
            ]
            row[stages] = torch.stack(ways).amin(0)
        table.append(row)
    return table


def _trace_back(
    costs: Tensor, num_stages: int, speeds: Sequence[float]
) -> list[list[tuple[int, int]]]:
    sums = _sums(costs, num_stages - len(speeds) + 1)
    table = _slowest(costs, num_stages, speeds)
    end, left = len(costs) - 1, num_stages
    shares: list[list[tuple[int, int]]] = []
    for rank in range(len(speeds), 0, -1):
        ways = [
            torch.maximum(table[rank - 1][left - own], sums[own][:, end] / speeds[rank - 1])
            for own in range(1, left - rank + 2)
        ]
        own, start = divmod(int(torch.stack(ways).argmin()), len(costs))
        left -= own + 1
        stages: list[tuple[int, int]] = []
        for count in range(own + 1, 0, -1):
            begin = int((sums[count - 1][start] + costs[:, end]).argmin())
            stages.insert(0, (begin, end))
            end = begin
        shares.insert(0, stages)
    return shares


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
