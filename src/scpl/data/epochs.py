"""What the loaders of images and of texts have in common: epochs of numbered mini-batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import TypeAlias

from torch import Tensor

from scpl.data.prefetch import prefetched
from scpl.errors import InputError

__all__ = ["Batch", "EpochLoader", "require"]

Batch: TypeAlias = tuple[Tensor, Tensor]


class EpochLoader(ABC):
    """Iterates over mini-batches, each of which depends on the epoch and its own number alone.

    So training can resume in the middle of an epoch, and preparing batches in a thread changes no
    number.

    Args:
        batch_size: Samples per batch.
        prefetch: How many batches a background thread prepares ahead; 0 for no thread.

    Raises:
        InputError: A number is out of its range.
    """

    def __init__(self, batch_size: int, prefetch: int) -> None:
        require(batch_size >= 1, "the batch size must be at least 1", batch_size)
        require(prefetch >= 0, "the number of batches to prefetch must be 0 or more", prefetch)
        self.batch_size, self.prefetch = batch_size, prefetch
        self.epoch = 0

    @abstractmethod
    def __len__(self) -> int:
        """Batches per epoch."""

    @abstractmethod
    def _produce(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        """Make the batches of an epoch from number ``start`` on."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the iterators made from now on; those under way keep theirs."""
        require(epoch >= 0, "the epoch must be 0 or more", epoch)
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, start: int = 0) -> Generator[Batch, None, None]:
        """Iterate over the batches of the epoch, beginning with number ``start``.

        Those before are not produced. Closing the iterator, or dropping the last reference to it,
        ends its thread.

        Yields:
            Inputs and targets; see the class.

        Raises:
            InputError: ``start`` is not one of 0..len(self).
        """
        require(0 <= start <= len(self), f"the first batch must be 0..{len(self)}", start)
        produced = self._produce(self.epoch, start)
        return prefetched(produced, self.prefetch) if self.prefetch else produced


def require(holds: bool, rule: str, got: int) -> None:
    """Raise InputError unless a number is in its range."""
    if not holds:
        raise InputError(rule, f"Got {got}")
