"""What turns a text into numbers: words or parts of words; and vectors of words.

Number 0 is padding and 1 stands for everything unknown. A text without any token becomes the one
unknown token, so that no row of a mini-batch is empty.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from scpl.data.extras import import_extra
from scpl.errors import DataError, InputError
from scpl.outside import parse_json
from scpl.seeding import generator

__all__ = [
    "KINDS",
    "Tokenizer",
    "WordVectors",
    "from_json",
    "read_vectors",
    "share_of",
    "train_tokenizer",
    "version_of",
    "width_of",
]

KINDS = ("words", "paper-words", "subwords")
_SPECIAL = ("<pad>", "<unk>")


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

    @property
    def unknown(self) -> int | None:
        """The number of what is not known; None if nothing is unknown to it."""

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Turn texts into at least one and at most ``max_tokens`` numbers each."""

    def decode(self, numbers: Sequence[int]) -> str:
        """Turn numbers into a text that people can read: what the network sees of it."""

    def to_json(self) -> str:
        """Write it down, for `from_json`."""


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Make a vocabulary of at most ``vocab_size`` tokens, with padding and unknown.

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
        values = parse_json(text)
        if "model" in values:
            return Subwords(_library().Tokenizer.from_str(text))
        return Words(tuple(map(str, values["words"])), paper=values["kind"] == "paper-words")
    except InputError:
        raise
    except Exception as error:  # tokenizers raises plain exceptions
        raise DataError(
            "A tokenizer file must be intact",
            f"Got {origin}: {type(error).__name__}: {error}",
            "Copy it from the run again, or train it again",
        ) from error


def version_of(kind: str) -> str:
    """What else tokens depend on: another Python may know other letters, for example."""
    return str(_library().__version__) if kind == "subwords" else unicodedata.unidata_version


# What is taken off a text before it is cut into tokens

_TAG = re.compile(r"</?[A-Za-z!][^<>]*>")
_PAPER_TAG = re.compile(r"<[^>]*>")
_PAPER_PUNCTUATION = str.maketrans("", "", string.punctuation)
_APOSTROPHES = "'\u2019\u02bc"


def plain(text: str) -> str:
    """Lower-case a text, resolve HTML entities, put a space for each tag, compose accents (NFC)."""
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub(" ", text)
    text = text.lower()
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def words(text: str) -> list[str]:
    """Cut a text into words: "don't" becomes "dont", "well-made" becomes two."""
    return plain(text).translate(_SEPARATORS).split()


def paper_words(text: str) -> list[str]:
    """Cut a text into words as the paper's code does.

    Tags and ASCII punctuation are deleted, and what they separated is joined: ``good.<br>Bad`` is
    one word. A tag is ``<.*?>``, anything between two brackets of one line.
    """
    lines = (_without_tags(line) for line in text.lower().split("\n"))
    return "\n".join(lines).translate(_PAPER_PUNCTUATION).split()


def _without_tags(line: str) -> str:
    # Behind the last ">" there is no tag, though a search would try from every "<" there.
    head, bracket, tail = line.rpartition(">")
    return _PAPER_TAG.sub("", head + bracket) + tail


class _Separators(dict[int, str]):
    """For `str.translate`: apostrophes vanish, other punctuation and symbols become spaces.

    A mark that belongs to a letter stays, as in Hindi; so does a joiner inside a word.
    """

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        category = unicodedata.category(letter)
        if letter in _APOSTROPHES:
            self[code] = ""
        else:
            self[code] = " " if category[0] in "PSZ" or category == "Cc" else letter
        return self[code]


_SEPARATORS = _Separators()


class Words:
    """Words as tokens: the most common ones of the training texts.

    The first two words are padding and unknown, and none occurs twice, else InputError is raised.
    With ``paper``, texts are cleaned as the paper's code does.
    """

    unknown = 1

    def __init__(self, words: Sequence[str], *, paper: bool = False) -> None:
        self.words, self.paper = tuple(words), paper
        self._numbers = {word: number for number, word in enumerate(self.words)}
        if self.words[:2] != _SPECIAL or len(self._numbers) != len(self.words):
            raise InputError(
                f"A vocabulary must begin with {' and '.join(_SPECIAL)}, and name no word twice",
                f"Got {len(self.words)} words that begin with {self.words[:2]}",
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, paper: bool = False) -> Words:
        """Take the most common words; of equally common ones the alphabetically first."""
        if vocab_size < len(_SPECIAL) + 1:
            raise InputError("`vocab_size` must be at least 3", f"Got {vocab_size}")
        counts: Counter[str] = Counter()
        cut = paper_words if paper else words
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

    @property
    def vocab_size(self) -> int:
        """Number of words, with padding and unknown."""
        return len(self.words)

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Turn texts into numbers; of each the first ``max_tokens`` words."""
        number, cut = self._numbers.get, paper_words if self.paper else words
        return [[number(word, 1) for word in cut(text)[:max_tokens]] or [1] for text in texts]

    def decode(self, numbers: Sequence[int]) -> str:
        """Write words with spaces between."""
        return " ".join(self.words[number] for number in numbers)

    def to_json(self) -> str:
        """Write the vocabulary as JSON."""
        return json.dumps({"kind": self.kind, "words": self.words}, ensure_ascii=False)


_SMALLEST = 512  # 256 bytes, the special ones, and some merges
_CHUNK = 4096  # texts that are in work at a time
_LONGEST_PIECE = 512  # characters without a space; longer ones are cut, for they take too long
_MOST_REMEMBERED = 64 << 20  # characters
_PART = 1 << 20  # tokens


class Subwords:
    """Parts of words as tokens: byte-pair encoding of lower-cased texts without tags.

    No text is unknown to it, for rare words fall into their bytes. A text is cut at its spaces, and
    each piece encoded once: tokens never reach across a space, so this gives what encoding whole
    texts gives, at a tenth of the time. ``model`` is a ``tokenizers.Tokenizer``.
    """

    kind = "subwords"
    unknown = 1

    def __init__(self, model: Any) -> None:
        self._model = model
        # A text that says "<pad>" means these five characters.
        model.encode_special_tokens = True
        self._known: dict[str, list[int]] = {}
        self._remembered = 0

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Subwords:
        """Learn the merges of the most frequent pairs."""
        if vocab_size < _SMALLEST:
            raise InputError(
                f"`vocab_size` must be at least {_SMALLEST} for subwords", f"Got {vocab_size}"
            )
        lib = _library()
        model = lib.Tokenizer(lib.models.BPE())
        model.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = lib.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(_SPECIAL),
            initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        model.train_from_iterator((" ".join(_pieces_of(text)) for text in texts), trainer)
        normal = lib.normalizers
        # Our texts are normal already; these are for others who read the file.
        model.normalizer = normal.Sequence(
            [normal.NFC(), normal.Replace(lib.Regex(_TAG.pattern), " "), normal.Lowercase()]
        )
        return cls(model)

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, with padding and unknown."""
        return int(self._model.get_vocab_size())

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The token of each number, its bytes written as ``tokenizers`` does."""
        return tuple(str(self._model.id_to_token(number)) for number in range(self.vocab_size))

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Turn texts into numbers; of each the first ``max_tokens`` tokens."""
        encoded: list[list[int]] = []
        for start in range(0, len(texts), _CHUNK):
            # Every piece has a token, so there is no need for more pieces than tokens.
            cut = [_pieces_of(text)[:max_tokens] for text in texts[start : start + _CHUNK]]
            known = self._learn({piece for pieces in cut for piece in pieces})
            for pieces in cut:
                row: list[int] = []
                for piece in pieces:
                    row += known[piece]
                encoded.append(row[:max_tokens] or [1])
        return encoded

    def decode(self, numbers: Sequence[int]) -> str:
        """Put the parts together, as far as their bytes are letters."""
        data = "".join(self.words[number] for number in numbers)
        return str(_library().decoders.ByteLevel().decode([data])).strip()

    def to_json(self) -> str:
        """Write it in the format of ``tokenizers``."""
        return str(self._model.to_str())

    def _learn(self, pieces: set[str]) -> dict[str, list[int]]:
        """Encode the pieces that were not met before; forget the others when they get many."""
        if self._remembered > _MOST_REMEMBERED:
            self._known, self._remembered = {}, 0
        new = sorted(pieces - self._known.keys())
        found = self._model.encode_batch_fast(new, add_special_tokens=False)
        self._known |= {piece: each.ids for piece, each in zip(new, found, strict=True)}
        self._remembered += sum(map(len, new))
        return self._known


def _pieces_of(text: str) -> list[str]:
    """Cut a text at its spaces, and what is long besides."""
    pieces = plain(text).split()
    if len(text) <= _LONGEST_PIECE or max(map(len, pieces), default=0) <= _LONGEST_PIECE:
        return pieces
    return [
        piece[start : start + _LONGEST_PIECE]
        for piece in pieces
        for start in range(0, len(piece), _LONGEST_PIECE)
    ]


def _library() -> Any:
    return import_extra("tokenizers", "text", "Cutting texts into subwords")


# Word vectors in the text formats of GloVe and fastText. The vector of a word belongs into the row
# of its number: code that stacks vectors in another order gives every word the vector of another
# one, and training hides it.


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
        found, total = len(self.numbers), max(len(words) - len(_SPECIAL), 1)
        share = share_of(tokens, have)
        return (
            f"{found:,} of {len(words) - len(_SPECIAL):,} words have a vector "
            f"({100 * found / total:.1f} %), and {100 * share:.1f} % of the training tokens"
        )


def share_of(tokens: Tensor, marked: Tensor) -> float:
    """Return the share of some tokens, ``[T]``, that are among the marked ones, ``bool [vocab]``.

    Of many tokens only a part is in memory at a time.
    """
    there = sum(int(marked[part.long()].sum()) for part in torch.split(tokens, _PART))
    return there / max(len(tokens), 1)


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
    wanted = {word.encode(): number for number, word in enumerate(words) if number >= len(_SPECIAL)}
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
