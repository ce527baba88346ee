"""What turns a text into numbers: words or parts of words, and how that is kept as JSON.

Number 0 is padding and 1 stands for everything unknown. A text without any token becomes the one
unknown token, so that no row of a mini-batch is empty.
"""

from __future__ import annotations

import html
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol

from scpl.data.extras import import_extra
from scpl.errors import DataError, InputError

__all__ = ["KINDS", "Tokenizer", "from_json", "train_tokenizer", "version_of"]

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
    """Lower-case a text, resolve HTML entities, put a space in place of each tag, compose letters.

    Accents are composed with their letters (Unicode NFC), however they were typed.
    """
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
                f"A vocabulary must begin with {' and '.join(_SPECIAL)}, and name no word twice",
                f"Got {len(self.words)} words that begin with {self.words[:2]}",
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, paper: bool = False) -> Words:
        """Take the most common words; of equally common ones the alphabetically first.

        Raises:
            InputError: ``vocab_size`` leaves no room for a word.
        """
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

    def to_json(self) -> str:
        """Write the vocabulary as JSON."""
        return json.dumps({"kind": self.kind, "words": self.words}, ensure_ascii=False)


_SMALLEST = 512  # 256 bytes, the special ones, and some merges
_CHUNK = 4096  # texts that are in work at a time
_LONGEST_PIECE = 512  # characters without a space; longer ones are cut, for they take too long
_MOST_REMEMBERED = 64 << 20  # characters


class Subwords:
    """Parts of words as tokens: byte-pair encoding of lower-cased texts without tags.

    No text is unknown to it, for rare words fall into their bytes; so it is for any language. A
    text is cut at its spaces, and each piece encoded once: tokens never reach across a space, so
    this gives what encoding whole texts gives, at a tenth of the time.

    Args:
        model: A ``tokenizers.Tokenizer``.
    """

    kind = "subwords"

    def __init__(self, model: Any) -> None:
        self._model = model
        # A text that says "<pad>" means these five characters.
        model.encode_special_tokens = True
        self._known: dict[str, list[int]] = {}
        self._remembered = 0

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Subwords:
        """Learn the merges of the most frequent pairs.

        Raises:
            InputError: ``vocab_size`` is too small, or tokenizers is not installed.
        """
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
