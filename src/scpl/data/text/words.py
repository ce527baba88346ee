"""Words as tokens: the most common ones of the training texts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

from scpl.data.text import cleaning
from scpl.errors import InputError

__all__ = ["Words"]

_SPECIAL = ("<pad>", "<unk>")


class Words:
    """A vocabulary of words.

    Args:
        words: The word of each number; the first two are padding and unknown.
        paper: Clean texts as the paper's code does.

    Raises:
        InputError: The first two are others, or a word occurs twice.
    """

    def __init__(self, words: Sequence[str], *, paper: bool = False) -> None:
        self.words, self.paper = tuple(words), paper
        self._numbers = {word: number for number, word in enumerate(self.words)}
        if self.words[:2] != _SPECIAL or len(self._numbers) != len(self.words):
            raise InputError(
                f"a vocabulary must begin with {' and '.join(_SPECIAL)}, and name no word twice",
                f"Got {len(self.words)} words that begin with {self.words[:2]}",
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, paper: bool = False) -> Words:
        """Take the most common words; of equally common ones the alphabetically first.

        Raises:
            InputError: ``vocab_size`` leaves no room for a word.
        """
        if vocab_size < len(_SPECIAL) + 1:
            raise InputError("--vocab-size must be at least 3", f"Got {vocab_size}")
        counts: Counter[str] = Counter()
        cut = cleaning.paper_words if paper else cleaning.words
        for text in texts:
            counts.update(cut(text))
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        # Neither can come of a text, for they have brackets; but be sure.
        kept = [word for word, _ in ranked if word not in _SPECIAL]
        return cls((*_SPECIAL, *kept[: vocab_size - len(_SPECIAL)]), paper=paper)

    @property
    def kind(self) -> str:
        """words, or paper-words."""
        return "paper-words" if self.paper else "words"

    @cached_property
    def vocab_size(self) -> int:
        """Number of words, with padding and unknown."""
        return len(self.words)

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Turn texts into numbers; of each the first ``max_tokens`` words."""
        number, cut = self._numbers.get, cleaning.paper_words if self.paper else cleaning.words
        return [[number(word, 1) for word in cut(text)[:max_tokens]] or [1] for text in texts]

    def to_json(self) -> str:
        """Write the vocabulary as JSON."""
        return json.dumps({"kind": self.kind, "words": self.words}, ensure_ascii=False)
