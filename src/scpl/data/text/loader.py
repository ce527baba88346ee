"""Mini-batches of texts of similar length, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from scpl.data.prefetch import prefetched
from scpl.data.seeding import generator
from scpl.data.text.encoded import Encoded
from scpl.errors import InputError

__all__ = ["TextLoader"]

Batch = tuple[Tensor, Tensor]

_POOL = 50  # mini-batches whose texts are sorted by length together


class TextLoader:
    """Iterates over texts in mini-batches, each padded to its longest text, on the CPU.

    Texts of similar length come together, so that little is padding. With ``shuffle``, each epoch
    shuffles all texts, sorts pools of 50 mini-batches by length, cuts them, and shuffles the
    mini-batches: who is together with whom differs from epoch to epoch. Every batch depends only
    on the arguments, the epoch and its own number, so training can resume in the middle of one.

    Args:
        split: The texts.
        batch_size: Texts per batch; one batch of an epoch may have fewer.
        shuffle: Whether each epoch has an order of its own; else texts are sorted by length.
        seed: Of the order.
        prefetch: How many batches a background thread prepares ahead; 0 for no thread.

    Raises:
        InputError: A number is out of its range.
    """

    def __init__(
        self,
        split: Encoded,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        prefetch: int = 2,
    ) -> None:
        _require(batch_size >= 1, "the batch size must be at least 1", batch_size)
        _require(prefetch >= 0, "the number of batches to prefetch must be 0 or more", prefetch)
        self.split, self.batch_size, self.shuffle = split, batch_size, shuffle
        self.seed, self.prefetch = seed, prefetch
        self.epoch = 0

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self.split) // self.batch_size)

    @property
    def num_samples(self) -> int:
        """Texts per epoch."""
        return len(self.split)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the iterators made from now on; those under way keep theirs."""
        _require(epoch >= 0, "the epoch must be 0 or more", epoch)
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, start: int = 0) -> Generator[Batch, None, None]:
        """Iterate over the batches of the epoch, beginning with number ``start``.

        Those before are not produced. Closing the iterator, or dropping the last reference to it,
        ends its thread.

        Yields:
            Tokens ``int64 [B, L]``, padded with 0 on the right, and targets ``int64 [B]``.

        Raises:
            InputError: ``start`` is not one of 0..len(self).
        """
        _require(0 <= start <= len(self), f"the first batch must be 0..{len(self)}", start)
        produced = self._produce(self.epoch, start)
        return prefetched(produced, self.prefetch) if self.prefetch else produced

    def order(self, epoch: int) -> list[Tensor]:
        """The texts of each batch of an epoch, as indices ``int64 [B]``."""
        lengths = self.split.lengths
        if not self.shuffle:
            return list(torch.split(torch.argsort(lengths, stable=True), self.batch_size))
        draws = generator("text-order", self.seed, epoch)
        batches: list[Tensor] = []
        order = torch.randperm(len(lengths), generator=draws)
        for pool in torch.split(order, _POOL * self.batch_size):
            by_length = pool[torch.argsort(lengths[pool], stable=True)]
            batches += torch.split(by_length, self.batch_size)
        return [batches[place] for place in torch.randperm(len(batches), generator=draws).tolist()]

    def _produce(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        for chosen in self.order(epoch)[start:]:
            yield self.split.rows(chosen), self.split.labels[chosen]


def _require(holds: bool, rule: str, got: int) -> None:
    if not holds:
        raise InputError(rule, f"Got {got}")
