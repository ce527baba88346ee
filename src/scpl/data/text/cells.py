"""From the values of a table's cells to a text and to the name of a class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from scpl.errors import DataError

__all__ = ["LONGEST_TEXT", "is_missing", "label_of", "sorted_labels", "text_of"]

LONGEST_TEXT = 1 << 20
"""Characters of a text that are read; what follows is far behind any number of tokens."""


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: nothing, not a number, or only spaces."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def text_of(values: Sequence[Any], columns: Sequence[str], place: str) -> str:
    """Join the text columns of a row with a space; missing cells are left out.

    Raises:
        DataError: A cell holds a list, an object or bytes.
    """
    parts = []
    for value, column in zip(values, columns, strict=True):
        if is_missing(value):
            continue
        if not isinstance(value, (str, int, float)):
            raise DataError(
                f"column {column!r} must hold text", f"Got {type(value).__name__} in {place}"
            )
        parts.append(str(value)[:LONGEST_TEXT])
    return " ".join(parts)[:LONGEST_TEXT]


def label_of(value: Any, names: Sequence[str] | None, place: str) -> str | None:
    """Name the class of a row, or None if its label is missing.

    Args:
        value: The cell; a whole number is an index into ``names``, if there are some.
        names: Names of the classes, where the data set gives them.
        place: File and row, for messages.

    Raises:
        DataError: A number has no name, or the value is no label.
    """
    if is_missing(value):
        return None
    if isinstance(value, (list, dict, bytes)):
        raise DataError("a label must be a name or a number", f"Got {value!r:.60} in {place}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if names is None or text in names:
        return text
    try:
        index = int(text)
    except ValueError:
        index = -1
    if not 0 <= index < len(names):
        raise DataError(
            f"labels must be one of {', '.join(names)}, or 0 .. {len(names) - 1}",
            f"Got {text!r:.60} in {place}",
            "A label of -1 often marks an unlabelled test set; use the labelled one",
        )
    return names[index]


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort distinct labels: numbers by value, names by their characters."""
    distinct = set(labels)
    try:
        return tuple(sorted(distinct, key=lambda label: (float(label), label)))
    except ValueError:
        return tuple(sorted(distinct))
