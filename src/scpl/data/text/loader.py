"""Texts as numbers, and mini-batches of similar length, in an order of seed and epoch alone."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from scpl.data.loader import Batch, EpochLoader, Inputs, Shown
from scpl.data.sampling import evenly
from scpl.data.spool import numbers
from scpl.errors import DataError
from scpl.seeding import generator

__all__ = ["WITH_ZEROS", "Encoded", "Padding", "TextLoader"]

_POOL = 50  # mini-batches whose texts are sorted by length together


@dataclasses.dataclass(frozen=True)
class Padding:
    """How texts of different lengths become one batch.

    Args:
        number: What fills up shorter texts.
        left: Whether it stands before them.
        parts: What a batch is made of, if its parts have names: ``input_ids``, ``attention_mask``
            (1: a token), ``token_type_ids`` (all 0). Without any it is one tensor of tokens.
    """

    number: int = 0
    left: bool = False
    parts: tuple[str, ...] = ()

    def batch(self, tokens: Tensor, starts: Tensor, lengths: Tensor) -> Inputs:
        """Take texts out of a row of tokens.

        Args:
            tokens: Some texts one after the other, ``[T]``.
            starts: Where each text of the batch begins, ``[M]``.
            lengths: How long each is, ``[M]``, at least 1.

        Returns:
            ``int64 [M, longest]``, or a mapping of such.
        """
        places = torch.arange(int(lengths.max()))[None, :]
        if self.left:
            places = places - (places.shape[1] - lengths[:, None])
        inside = (places >= 0) & (places < lengths[:, None])
        # Places outside of a text are read at its start, and made padding.
        found = tokens[starts[:, None] + torch.where(inside, places, 0)].long()
        found = torch.where(inside, found, self.number)
        made = {
            "input_ids": found,
            "attention_mask": inside.long(),
            "token_type_ids": torch.zeros_like(found),
        }
        return {part: made[part] for part in self.parts} if self.parts else found

    def rows(self, rows: Sequence[Sequence[int]]) -> Inputs:
        """Make a batch of rows of tokens."""
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.tensor(list(chain.from_iterable(rows)))
        return self.batch(tokens, lengths.cumsum(0) - lengths, lengths)


WITH_ZEROS = Padding()
"""One tensor of tokens, shorter texts filled up with 0 on the right."""


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Texts as numbers, with their labels: one long row of tokens, and where each text begins.

    IMDB's 50,000 reviews of at most 350 words take 22 MB so.

    Args:
        tokens: All tokens, one text after the other: ``int16`` or ``int32 [T]``; perhaps mapped
            from a file.
        starts: Where each text begins, and the end: ``int64 [N + 1]``.
        labels: What is to be predicted: classes ``int64 [N]``, or ``[N, C]`` for another task.

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
    def of(
        cls,
        rows: Iterable[Sequence[int]],
        labels: Tensor,
        vocab_size: int,
        *,
        mapped: bool = False,
    ) -> Encoded:
        """Pack rows of tokens, which are taken one by one; as `numbers` does."""
        starts = array("q", [0])

        def counted() -> Iterator[Sequence[int]]:
            for row in rows:
                starts.append(starts[-1] + len(row))
                yield row

        dtype = torch.int16 if vocab_size <= 1 << 15 else torch.int32
        tokens = numbers(counted(), dtype, mapped=mapped)
        return cls(tokens, torch.frombuffer(starts, dtype=torch.int64), labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, ``int64 [N]``."""
        return self.starts.diff()

    def batch(self, indices: Tensor, padding: Padding) -> Inputs:
        """Return some texts, the shorter ones filled up: ``int64 [M, longest of them]``."""
        starts = self.starts[indices]
        return padding.batch(self.tokens, starts, self.starts[indices + 1] - starts)


class TextLoader(EpochLoader):
    """Iterates over texts in mini-batches, each padded to its longest text, on the CPU.

    Texts of similar length come together, so that little is padding. With ``shuffle``, each epoch
    shuffles all texts, sorts pools of 50 mini-batches by length, cuts them, and shuffles the
    mini-batches: who is together with whom differs from epoch to epoch. Every batch is tokens
    ``int64 [B, L]``, or a mapping with them, as `Padding` makes it, and targets, rows of the labels
    of ``split``. It depends only on the arguments, the epoch and its own number.

    Args:
        split: The texts.
        batch_size: Texts per batch; one batch of an epoch may have fewer.
        shuffle: Whether each epoch has an order of its own; else texts are sorted by length.
        seed: Of the order.
        padding: How texts become a batch.
        strata: With ``shuffle``: draw equally often from each of these classes, ``int64 [N]``,
            instead of every text once per epoch.
        prefetch: How many batches a background thread prepares ahead; 0 for no thread.
        decode: Turns tokens into a text again, to show one; default: their numbers are shown.

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
        padding: Padding = WITH_ZEROS,
        strata: Tensor | None = None,
        prefetch: int = 2,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        super().__init__(len(split), batch_size, prefetch)
        self._decode = decode or _numbers
        self.split, self.shuffle, self.seed, self.padding = split, shuffle, seed, padding
        self._strata = strata

    def show(self, place: int) -> Shown:  # noqa: D102
        index = int(torch.cat(self._order(self.epoch))[place])
        start, end = self.split.starts[index : index + 2].tolist()
        text = self._decode(self.split.tokens[start:end].tolist())
        return Shown(f"text {index + 1:,} of {len(self.split):,}", text=text)

    def _order(self, epoch: int) -> list[Tensor]:
        """The texts of each batch of an epoch, as indices ``int64 [B]``."""
        lengths = self.split.lengths
        if not self.shuffle:
            return list(torch.split(torch.argsort(lengths, stable=True), self.batch_size))
        draws = generator(self.seed, "text-order", epoch)
        batches: list[Tensor] = []
        if self._strata is None:
            order = torch.randperm(len(lengths), generator=draws)
        else:
            order = evenly(self._strata, draws)
        for pool in torch.split(order, _POOL * self.batch_size):
            by_length = pool[torch.argsort(lengths[pool], stable=True)]
            batches += torch.split(by_length, self.batch_size)
        return [batches[place] for place in torch.randperm(len(batches), generator=draws).tolist()]

    def _produce(self, epoch: int, start: int) -> Generator[Batch, None, None]:
        for chosen in self._order(epoch)[start:]:
            yield self.split.batch(chosen, self.padding), self.split.labels[chosen]


def _numbers(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))
