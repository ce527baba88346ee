"""Shares of a mini-batch: which rows each replica of a stage works on, and how they come together.

A stage may be hosted by a group of ranks. Each of its replicas runs the stage's layers and its head
on a share of the rows; then what the heads made, which is small, is gathered, so that every replica
computes the objective of the *whole* mini-batch. Replicas average their gradients as in data
parallelism, but only of their own stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from scpl.errors import InputError, LinkError, ScplError
from scpl.partition.pieces import MIXED, Dimensions
from scpl.partition.values import Tree, dense, tensors_of, tree_map

__all__ = [
    "Share",
    "check_dimensions",
    "connected",
    "dims_of",
    "held",
    "join_rows",
    "own",
    "shares",
    "take_rows",
]


def shares(rows: int, num_ranks: int) -> list[int]:
    """How many of ``rows`` rows each rank gets; the earlier ranks take the extra ones."""
    base, extra = divmod(rows, num_ranks)
    return [base + (rank < extra) for rank in range(num_ranks)]


def own(rows: int, num_ranks: int, rank: int) -> range:
    """The rows of which one rank's results count."""
    counts = shares(rows, num_ranks)
    start = sum(counts[:rank])
    return range(start, start + counts[rank])


def held(rows: int, num_ranks: int, rank: int) -> range:
    """The rows that one rank works on: its own; if it has none, the first one, for nothing.

    Layers need a row, and what the ranks do together needs all of them.
    """
    return own(rows, num_ranks, rank) or range(1)


def take_rows(tree: Tree, dims: Sequence[int | None], rows: range) -> Tree:
    """Take some rows of every value that has rows.

    Args:
        tree: Values that cross a cut.
        dims: For each the dimension that is the batch; None where it has none.
        rows: Which ones.
    """
    places = iter(dims)

    def taken(tensor: Tensor) -> Tensor:
        dim = next(places)
        return tensor if dim is None else dense(tensor.narrow(dim, rows.start, len(rows)))

    return tree_map(taken, tree)


def join_rows(trees: Sequence[Tree], dims: Sequence[int | None]) -> Tree:
    """Put values together that have different rows; else as `take_rows`."""
    first, *_ = trees
    waiting = iter(zip(dims, *map(tensors_of, trees), strict=True))

    def joined(tensor: Tensor) -> Tensor:
        dim, *parts = next(waiting)
        return tensor if dim is None else dense(torch.cat(parts, dim))

    return tree_map(joined, first)


def check_dimensions(dims: Dimensions, stage: int) -> None:
    """Check that rows can be told apart in what a stage hands on.

    Raises:
        InputError: if they cannot.
    """
    if dims is not None and MIXED in dims:
        raise InputError(
            "Groups of different sizes need a cut where every value has its rows in one dimension",
            f"Got a value behind stage {stage} whose rows cannot be told apart",
            "Cut elsewhere, or give both groups as many `replicas`",
        )


def dims_of(tree: Tree, dims: Dimensions, *, narrowed: bool = False) -> Sequence[int | None]:
    """Say for each tensor of what crosses a cut which dimension is the batch.

    Args:
        tree: What crosses.
        dims: That of each value (see `Pieces.batch_dims`).
        narrowed: Whether values were rounded by `scpl.engine.precision.narrowed`.

    Raises:
        InputError: if there are more or fewer values than in evaluation.
    """
    if narrowed:
        of_values = dims_of(tree["values"], dims)
        scales = zip(of_values, tensors_of(tree["read"]), strict=True)
        return [*of_values, *(dim if scale.ndim > 1 else None for dim, scale in scales)]
    values = len(tensors_of(tree))
    if dims is not None and len(dims) != values:
        raise InputError(
            "Groups of different sizes need stages that hand on as much in training as in "
            "evaluation",
            f"Got {values} values and {len(dims)}",
            "Cut elsewhere, or give both groups as many `replicas`",
        )
    return (0,) * values if dims is None else dims


@contextmanager
def connected(what: str) -> Iterator[None]:
    """Tell a lost connection from an error of the user's code.

    Args:
        what: What is shared, in the plural.

    Raises:
        LinkError: if a replica is gone.
    """
    try:
        yield
    except ScplError:
        raise  # it says enough by itself
    except Exception as error:
        known = (dist.DistError, ConnectionError)
        if isinstance(error, known) or re.search("gloo|NCCL", str(error), re.IGNORECASE):
            raise LinkError(
                "All replicas must stay connected",
                f"{what} could not be shared: {str(error).splitlines()[0]}",
            ) from error
        raise


@final
class Share:
    """One replica's share of the mini-batch at hand.

    Args:
        index: Which replica this is, from 0.
        count: How many there are.
        group: The process group of them all.
        staged: Whether it moves only memory of the host, though replicas compute elsewhere.

    Attributes:
        rows: Of the whole mini-batch.
        bytes_sent: To the others, since it was last set to 0.
        times_gathered: How often something was made whole.
    """

    def __init__(
        self, index: int, count: int, group: dist.ProcessGroup, *, staged: bool = False
    ) -> None:
        self.index, self.count, self.group, self.staged = index, count, group, staged
        self.rows = self.bytes_sent = self.times_gathered = 0

    @property
    def held(self) -> range:
        """The rows that this replica works on."""
        return held(self.rows, self.count, self.index)

    def whole(self, part: Tensor) -> Tensor:
        """Put together what the replicas made of their rows; all of them must call it.

        Its gradient is the one of the rows that are this replica's, times the number of replicas:
        then the mean of their gradients, which `DistributedDataParallel` makes, is the gradient of
        the whole mini-batch for parameters before this point, and for those behind it as well.

        Args:
            part: ``[n, ...]``, of the rows `held`.

        Returns:
            ``[N, ...]``, the same on all replicas.
        """
        self.times_gathered += 1
        with connected("Projections"):
            gathered: Tensor = _Gather.apply(part, self)  # type: ignore[no-untyped-call]
        return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, share: Share) -> Tensor:
        ctx.share, ctx.shape = share, part.shape
        counts = shares(share.rows, share.count)
        if len(part) != len(share.held):
            raise InputError(
                "What an objective makes whole must have a row for each sample of this replica",
                f"Got {list(part.shape)}, for {len(share.held)} of {share.rows} samples",
            )
        # As bytes: gloo does not know every type. All shares are sent at the largest one's size.
        device = "cpu" if share.staged else part.device
        padded = torch.zeros((counts[0], *part.shape[1:]), dtype=part.dtype, device=device)
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(
            [each.reshape(-1).view(torch.uint8) for each in parts],
            padded.reshape(-1).view(torch.uint8),
            group=share.group,
        )
        share.bytes_sent += (share.count - 1) * padded.nbytes
        own_rows = (each[:count] for each, count in zip(parts, counts, strict=True))
        return torch.cat(list(own_rows)).to(part.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), share = grads, ctx.share
        rows = own(share.rows, share.count, share.index)
        if not rows:
            return grad.new_zeros(ctx.shape), None
        return share.count * grad[rows.start : rows.stop], None
