"""The tokenizer that comes with a network of ``transformers``."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from scpl.data.extras import import_extra
from scpl.data.text.loader import Padding
from scpl.errors import DataError

__all__ = ["PretrainedTokenizer"]

_NO_LIMIT = 1_000_000  # what tokenizers without a limit of their own say is far above


class PretrainedTokenizer:
    """A tokenizer of ``transformers``, with its own special tokens, padding and limit.

    Args:
        model: Of ``transformers``.
        origin: Where it comes from, for messages.
    """

    def __init__(self, model: Any, origin: str) -> None:
        self._model = model
        self.notes: tuple[str, ...] = ()
        if model.pad_token_id is None:
            if model.eos_token is None:
                raise DataError(
                    "A tokenizer must have a token for padding",
                    f"That of {origin} has none, and none for the end of a text",
                    "Set pad_token in its tokenizer_config.json",
                )
            model.pad_token = model.eos_token
            self.notes = (f"{origin} has no token for padding: {model.eos_token} is taken",)
        # Its files, before it is used: truncation would be written into them.
        self.files = _files(model, origin)

    @classmethod
    def open(cls, name: str) -> PretrainedTokenizer:
        """Open the tokenizer of a folder, or of a name on the hub.

        Raises:
            DataError: if it cannot be loaded.
            InputError: if ``transformers`` is not installed.
        """
        library = import_extra("transformers", "transformers", "A tokenizer of a network")
        folder = Path(name).expanduser()
        logger = logging.getLogger("transformers")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            model = library.AutoTokenizer.from_pretrained(
                str(folder) if folder.is_dir() else name, trust_remote_code=False
            )
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise DataError(
                f"{name} must hold a tokenizer that transformers can load",
                f"It raised {type(error).__name__}: {lines[0][:300] if lines else 'no message'}",
                "Save it there with tokenizer.save_pretrained",
            ) from error
        finally:
            logger.setLevel(level)
        if len(model) <= len(set(model.all_special_ids)):  # what a folder without one gives
            raise DataError(
                f"{name} must hold a tokenizer with a vocabulary",
                f"Got one of {len(model)} special tokens and nothing else",
                "Save it there with tokenizer.save_pretrained",
            )
        return cls(model, name)

    @property
    def kind(self) -> str:
        """What its tokens are called."""
        return f"tokens of its {type(self._model).__name__}"

    @property
    def vocab_size(self) -> int:
        """How many numbers there are."""
        return len(self._model)

    @property
    def unknown(self) -> int | None:
        """The number of what is not known; None if nothing is unknown to it."""
        number: int | None = self._model.unk_token_id
        return number

    @property
    def most(self) -> int | None:
        """How many tokens of a text its network can read, as far as it knows."""
        limit = int(self._model.model_max_length)
        return limit if limit < _NO_LIMIT else None

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The token of each number."""
        return tuple(self._model.convert_ids_to_tokens(range(self.vocab_size)))

    def padding(self, taken: set[str]) -> Padding:
        """Say how texts become a batch for a network that takes these arguments.

        Raises:
            DataError: if a single text has tokens of several types.
        """
        parts = tuple(name for name in self._model.model_input_names if name in taken)
        if "token_type_ids" in parts and any(self._model("a text")["token_type_ids"]):
            raise DataError(
                "A tokenizer must give the tokens of a single text the type 0",
                f"{type(self._model).__name__} gives others",
                "Choose another network",
            )
        return Padding(self._model.pad_token_id, self._model.padding_side == "left", parts)

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Turn texts into numbers with special tokens, at most so many each."""
        if not texts:
            return []
        rows = self._model(
            list(texts),
            truncation=True,
            max_length=max_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        nothing = self._model.pad_token_id if self.unknown is None else self.unknown
        return [list(row) or [nothing] for row in rows]

    def decode(self, numbers: Sequence[int]) -> str:
        """Turn numbers into a text, without special tokens."""
        return str(self._model.decode(list(numbers), skip_special_tokens=True))

    def to_json(self) -> str:
        """Write all of its files as one text."""
        return json.dumps(self.files, sort_keys=True)


def _files(model: Any, origin: str) -> dict[str, str]:
    """The files of a tokenizer, for a run folder; texts by name."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        try:
            return {path.name: path.read_text(encoding="utf-8") for path in paths}
        except UnicodeDecodeError as error:
            raise DataError(
                "The files of a tokenizer must be texts",
                f"Some of {origin} are not: {error}",
                "Save it as a fast tokenizer, which has a tokenizer.json",
            ) from error
