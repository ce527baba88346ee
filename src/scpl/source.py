"""The start of the line: batches become messages. Only the first rank reads data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from scpl.errors import DataError, NonFiniteError
from scpl.message import Kind, Message, tensors_of, tree_map

__all__ = ["Batches", "Source"]

Batches: TypeAlias = Iterable[tuple[Any, Tensor]]


class Source:
    """Makes checked messages of batches.

    Args:
        num_classes: Targets must lie in ``0 .. num_classes - 1``.
        device: Where the first stage computes.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._num_classes = num_classes
        self._device = device

    def message(self, kind: Kind, step: int, inputs: Any, target: Tensor | None) -> Message:
        """Check a batch and put it on the device.

        Raises:
            DataError: if the target does not hold one class per row.
        """
        if target is not None:
            self._check_target(target, len(tensors_of(inputs)[0]), step)
            target = target.to(self._device, torch.int64, non_blocking=True)
        features = tree_map(lambda t: t.to(self._device, non_blocking=True), inputs)
        return Message(kind, step, features, target)

    def _check_target(self, target: Tensor, rows: int, step: int) -> None:
        if target.ndim != 1 or len(target) != rows or target.is_floating_point():
            raise DataError(
                "A target must hold one class index per row",
                f"Got {tuple(target.shape)} {target.dtype} for {rows} rows in batch {step}",
            )
        if rows == 0:
            raise DataError("A batch must hold at least one row", f"Batch {step} holds none")
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= self._num_classes:
            raise DataError(
                f"Targets must lie in 0 .. {self._num_classes - 1}",
                f"Got {low if low < 0 else high} in batch {step}",
                "Check the labels, or the number of classes",
            )


def remaining(loader: Batches, epoch: int, seen: int) -> Iterator[tuple[Any, Tensor]]:
    """The batches of an epoch after the first ``seen`` ones."""
    set_epoch = getattr(loader, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    batches = getattr(loader, "batches", None)
    if batches is not None:
        yield from batches(seen)
    else:
        yield from islice(iter(loader), seen, None)


def blame_data(error: NonFiniteError, message: Message) -> NonFiniteError:
    """Say so if the batch itself was not finite."""
    for tensor in tensors_of(message.features):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            return NonFiniteError(
                "The data must be finite",
                f"The batch of step {message.step} holds {bad} NaN or infinite values "
                "(found in the loss of stage 0)",
                "Clean the data; earlier checkpoints are kept",
            )
    return error
