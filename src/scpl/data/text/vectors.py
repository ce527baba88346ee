"""Word vectors in the text formats of GloVe and fastText, for the words of a vocabulary.

The vector of a word belongs into the row of its number. Code that stacks vectors in another order
than that of the numbers gives every word the vector of another one, and training hides it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scpl.errors import DataError
from scpl.seeding import generator

__all__ = ["WordVectors", "read_vectors", "width_of"]

_SPECIAL = 2  # padding and unknown have no vector


@dataclasses.dataclass(frozen=True, eq=False)
class WordVectors:
    """Vectors of some words of a vocabulary.

    Args:
        numbers: Which words, ``int64 [K]``.
        values: Their vectors, ``float32 [K, width]``.
    """

    numbers: Tensor
    values: Tensor

    def matrix(self, vocab_size: int, seed: int) -> Tensor:
        """Return the vectors of all words, ``float32 [vocab_size, width]``.

        Words without one get a random one of the same mean size, padding gets zeros.
        """
        draws = generator(seed, "vectors")
        filled = torch.randn(vocab_size, self.values.shape[1], generator=draws)
        filled *= self.values.square().mean().sqrt()
        filled[self.numbers] = self.values
        filled[0] = 0.0
        return filled

    def coverage(self, words: Sequence[str], tokens: Tensor) -> str:
        """Say how many words, and how many of the training tokens, have a vector."""
        have = torch.zeros(len(words), dtype=torch.bool)
        have[self.numbers] = True
        found, total = len(self.numbers), max(len(words) - _SPECIAL, 1)
        share = float(have[tokens.long()].double().mean())
        return (
            f"{found:,} of {len(words) - _SPECIAL:,} words have a vector "
            f"({100 * found / total:.1f} %), and {100 * share:.1f} % of the training tokens"
        )


def width_of(vectors: Path) -> int:
    """Read how many numbers a vector of a file has.

    Raises:
        DataError: The file is missing or empty.
    """
    try:
        with vectors.open("rb") as file:
            width = len(file.readline().split()) - 1
            if width == 1:  # number of words and width
                width = len(file.readline().split()) - 1
    except OSError as error:
        raise DataError("`vectors` must be a readable file", f"Got {vectors}: {error}") from error
    if width < 1:
        raise DataError(
            "A file of word vectors must hold words and their numbers", f"Got {vectors}"
        )
    return width


def read_vectors(vectors: Path, words: Sequence[str]) -> WordVectors:
    """Read the vectors of the words of a vocabulary.

    Args:
        vectors: A file; each line holds a word and its numbers, separated by spaces. A first line
            of two whole numbers, as fastText writes it, is skipped.
        words: The word of each number; the first two are padding and unknown.

    Raises:
        DataError: The file is missing, a line is malformed or not finite, or no word is in it.
    """
    wanted = {word.encode(): number for number, word in enumerate(words) if number >= _SPECIAL}
    found: dict[int, Tensor] = {}
    width = width_of(vectors)
    with vectors.open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            word, _, rest = line.partition(b" ")
            if line_number == 1 and len(rest.split()) == 1 < width:
                continue  # number of words and width
            number = wanted.get(word)
            # The first one counts. A word with a space in it, as in some files, is none of ours,
            # though its first part may be.
            if number is None or number in found or len(rest.split()) > width:
                continue
            found[number] = _vector(rest, width, f"{vectors}, line {line_number}")
    if not found:
        raise DataError(
            "A file of word vectors must hold words of the vocabulary",
            f"Got none of {len(wanted):,} in {vectors}",
            "It must be the text format of GloVe or fastText: a word and its numbers on each line",
        )
    numbers = sorted(found)
    return WordVectors(torch.tensor(numbers), torch.stack([found[each] for each in numbers]))


def _vector(text: bytes, width: int, place: str) -> Tensor:
    try:
        vector = torch.tensor([float(value) for value in text.split()])
    except ValueError:
        vector = torch.empty(0)
    if len(vector) != width or not width or not bool(vector.isfinite().all()):
        raise DataError(
            f"A line of word vectors must hold a word and {width} finite numbers",
            f"Got {text[:40]!r} in {place}",
            "Get the file again",
        )
    return vector
