"""Parts of words as tokens: byte-pair encoding, learnt from the training texts.

No text is unknown to it, for rare words fall into their bytes; so it is for any language.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from scpl.data.extras import require
from scpl.data.text.cleaning import TAG, plain
from scpl.errors import InputError

__all__ = ["Subwords", "library", "pieces_of"]

_SPECIAL = ("<pad>", "<unk>")
_SMALLEST = 512  # 256 bytes, the special ones, and some merges
_CHUNK = 4096  # texts that are in work at a time
_LONGEST_PIECE = 512  # characters without a space; longer ones are cut, for they take too long
_MOST_REMEMBERED = 64 << 20  # characters


class Subwords:
    """Byte-pair encoding of lower-cased texts without tags.

    A text is cut at its spaces, and each piece encoded once: tokens never reach across a space, so
    this gives what encoding whole texts gives, at a tenth of the time.

    Args:
        model: A ``tokenizers.Tokenizer``.
    """

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
                f"--vocab-size must be at least {_SMALLEST} with --tokens subwords",
                f"Got {vocab_size}",
            )
        lib = library()
        model = lib.Tokenizer(lib.models.BPE())
        model.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = lib.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(_SPECIAL),
            initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        model.train_from_iterator((" ".join(pieces_of(text)) for text in texts), trainer)
        normal = lib.normalizers
        # Our texts are normal already; these are for others who read the file.
        model.normalizer = normal.Sequence(
            [normal.NFC(), normal.Replace(lib.Regex(TAG), " "), normal.Lowercase()]
        )
        return cls(model)

    @classmethod
    def from_json(cls, text: str) -> Subwords:
        """Rebuild from `to_json`."""
        return cls(library().Tokenizer.from_str(text))

    @property
    def kind(self) -> str:
        """The name of this kind."""
        return "subwords"

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
            cut = [pieces_of(text)[:max_tokens] for text in texts[start : start + _CHUNK]]
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


def pieces_of(text: str) -> list[str]:
    """Cut a text at its spaces, and what is long besides."""
    pieces = plain(text).split()
    if len(text) <= _LONGEST_PIECE or max(map(len, pieces), default=0) <= _LONGEST_PIECE:
        return pieces
    return [
        piece[start : start + _LONGEST_PIECE]
        for piece in pieces
        for start in range(0, len(piece), _LONGEST_PIECE)
    ]


def library() -> Any:
    """Import tokenizers.

    Raises:
        InputError: It is not installed; the answer says how.
    """
    return require("tokenizers", "text", "--tokens subwords")
