"""Texts as numbers: one long row of tokens, and where each text begins in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from scpl.errors import DataError

__all__ = ["Encoded", "pad"]


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Texts as numbers, with their labels.

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
                "encoded texts must have one start each, at least one token, and one label",
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
