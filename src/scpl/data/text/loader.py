"""Mini-batches of texts of similar length, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from scpl.data.epochs import Batch, EpochLoader
from scpl.data.text.encoded import Encoded
from scpl.seeding import generator

__all__ = ["TextLoader"]

_POOL = 50  # mini-batches whose texts are sorted by length together


class TextLoader(EpochLoader):
    """Iterates over texts in mini-batches, each padded to its longest text, on the CPU.

    Texts of similar length come together, so that little is padding. With ``shuffle``, each epoch
    shuffles all texts, sorts pools of 50 mini-batches by length, cuts them, and shuffles the
    mini-batches: who is together with whom differs from epoch to epoch. Every batch is tokens
    ``int64 [B, L]``, padded with 0 on the right, and targets ``int64 [B]``. It depends only on the
    arguments, the epoch and its own number.

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
        super().__init__(batch_size, prefetch)
        self.split, self.shuffle, self.seed = split, shuffle, seed

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self.split) // self.batch_size)

    @property
    def num_samples(self) -> int:
        """Texts per epoch."""
        return len(self.split)

    def order(self, epoch: int) -> list[Tensor]:
        """The texts of each batch of an epoch, as indices ``int64 [B]``."""
        lengths = self.split.lengths
        if not self.shuffle:
            return list(torch.split(torch.argsort(lengths, stable=True), self.batch_size))
        draws = generator(self.seed, "text-order", epoch)
        batches: list[Tensor] = []
        order = torch.randperm(len(lengths), generator=draws)
        for pool in torch.split(order, _POOL * self.batch_size):
            by_length = pool[torch.argsort(lengths[pool], stable=True)]
            batches += torch.split(by_length, self.batch_size)
        return [batches[place] for place in torch.randperm(len(batches), generator=draws).tolist()]

    def _produce(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        for chosen in self.order(epoch)[start:]:
            yield self.split.rows(chosen), self.split.labels[chosen]
