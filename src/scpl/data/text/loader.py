"""Texts as numbers, and mini-batches of similar length, in an order of seed and epoch alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from scpl.data.loader import Batch, EpochLoader
from scpl.errors import DataError
from scpl.seeding import generator

__all__ = ["Encoded", "TextLoader", "pad"]

_POOL = 50  # mini-batches whose texts are sorted by length together


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Texts as numbers, with their labels: one long row of tokens, and where each text begins.

    IMDB's 50,000 reviews of at most 350 words take 22 MB so.

    Args:
        tokens: All tokens, one text after the other: ``int16`` or ``int32 [T]``.
        starts: Where each text begins, and the end: ``int64 [N + 1]``.
        labels: ``int64 [N]``.

    Raises:
        DataError: The parts do not fit each other.
    """

    tokens: Tensor
    starts: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        fits = len(self.starts) == len(self.labels) + 1 and len(self.labels) > 0
        if not fits or int(self.starts[-1]) != len(self.tokens) or int(self.lengths.min()) < 1:
            raise DataError(
                "Encoded texts must have one start each, at least one token, and one label",
                f"Got {len(self.labels)} labels, {len(self.starts)} starts and "
                f"{len(self.tokens)} tokens",
            )

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]], labels: Tensor, vocab_size: int) -> Encoded:
        """Pack rows of tokens."""
        rows = list(rows)
        dtype = torch.int16 if vocab_size <= 1 << 15 else torch.int32
        starts = torch.tensor(list(accumulate(map(len, rows), initial=0)), dtype=torch.int64)
        return cls(torch.tensor(list(chain.from_iterable(rows)), dtype=dtype), starts, labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, ``int64 [N]``."""
        return self.starts.diff()

    def rows(self, indices: Tensor) -> Tensor:
        """Return some texts, padded with 0 on the right: ``int64 [M, longest of them]``."""
        begin = self.starts[indices, None]
        lengths = self.starts[indices + 1, None] - begin
        places = torch.arange(int(lengths.max()))[None, :]
        inside = places < lengths
        # Places behind a text's end are read at its start, and made padding.
        found = self.tokens[begin + torch.where(inside, places, 0)].long()
        return torch.where(inside, found, 0)


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Pad rows of tokens with 0 on the right: ``int64 [N, longest]``."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *([0] * (length - len(row)))] for row in rows], dtype=torch.int64)


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
        super().__init__(len(split), batch_size, prefetch)
        self.split, self.shuffle, self.seed = split, shuffle, seed

    def _order(self, epoch: int) -> list[Tensor]:
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
        for chosen in self._order(epoch)[start:]:
            yield self.split.rows(chosen), self.split.labels[chosen]
