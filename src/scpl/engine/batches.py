"""The start of the line: batches become messages. Only the first rank reads data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from scpl.engine.messages import Kind, Message
from scpl.errors import DataError, NonFiniteError
from scpl.partition.values import tensors_of, tree_map

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
        tensors = tensors_of(inputs)
        if not tensors or tensors[0].ndim == 0:
            raise DataError(
                "Inputs must be tensors whose first dimension is the batch",
                f"Batch {step} holds {'a tensor without dimensions' if tensors else 'none'}",
            )
        if target is not None:
            self._check_target(target, len(tensors[0]), step)
            target = target.to(self._device, torch.int64, non_blocking=True)
        features = tree_map(lambda t: t.to(self._device, non_blocking=True), inputs)
        return Message(kind, step, features, target)

    def _check_target(self, target: Tensor, rows: int, step: int) -> None:
        if not isinstance(target, Tensor):
            raise DataError(
                "A target must be a tensor of class indices",
                f"Got {type(target).__name__} in batch {step}",
            )
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
    left = batches(seen) if batches is not None else islice(iter(loader), seen, None)
    for batch in left:
        yield pair(batch)


def pair(batch: Any) -> tuple[Any, Tensor]:
    """Take a batch apart.

    Raises:
        DataError: if it is not ``(inputs, target)``.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise DataError(
            "A batch must be a pair (inputs, target)", f"Got {type(batch).__name__}{size}"
        )
    return batch[0], batch[1]


def blame_data(error: NonFiniteError, message: Message) -> None:
    """Raise another error if the batch itself was not finite.

    Raises:
        NonFiniteError: naming the batch.
    """
    for tensor in tensors_of(message.features):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise NonFiniteError(
                "The data must be finite",
                f"The batch of step {message.step} holds {bad} NaN or infinite values",
                "Clean the data; earlier checkpoints are kept",
            ) from error
