"""What turns a text into numbers, and how that is kept as JSON.

Number 0 is padding and 1 stands for everything unknown. A text without any token becomes the one
unknown token, so that no row of a mini-batch is empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Protocol

from scpl.data.text.subwords import Subwords
from scpl.data.text.words import Words
from scpl.errors import DataError, InputError

__all__ = ["KINDS", "Tokenizer", "from_json", "train_tokenizer"]

KINDS = ("words", "paper-words", "subwords")


class Tokenizer(Protocol):
    """Turns texts into numbers."""

    @property
    def kind(self) -> str:
        """One of ``KINDS``."""

    @property
    def vocab_size(self) -> int:
        """How many numbers there are, with padding and unknown."""

    @property
    def words(self) -> Sequence[str]:
        """The token of each number."""

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Turn texts into at least one and at most ``max_tokens`` numbers each."""

    def to_json(self) -> str:
        """Write it down, for `from_json`."""


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Make a vocabulary of the training texts.

    Args:
        kind: One of ``KINDS``.
        texts: The training texts.
        vocab_size: At most so many numbers, with padding and unknown.

    Raises:
        InputError: The size is too small, or tokenizers is not installed.
    """
    if kind == "subwords":
        return Subwords.train(texts, vocab_size)
    return Words.train(texts, vocab_size, paper=kind == "paper-words")


def from_json(text: str, origin: str) -> Tokenizer:
    """Rebuild a tokenizer.

    Args:
        text: What `Tokenizer.to_json` returned.
        origin: Where it comes from, for messages.

    Raises:
        DataError: It is damaged.
        InputError: tokenizers is needed and not installed.
    """
    try:
        values = json.loads(text)
        if "model" in values:
            return Subwords.from_json(text)
        return Words(tuple(map(str, values["words"])), paper=values["kind"] == "paper-words")
    except InputError:
        raise
    except Exception as error:  # tokenizers raises plain exceptions
        raise DataError(
            "a tokenizer file must be intact",
            f"Got {origin}: {type(error).__name__}: {error}",
            "Copy it from the run again, or train it again",
        ) from error
