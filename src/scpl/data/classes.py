"""Classes by their names: which are known, how many samples each has, which have none.

In a table the name of a row's class stands in a cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scpl.data.tables import is_missing
from scpl.errors import DataError

__all__ = [
    "absent",
    "check_known",
    "classes_in",
    "is_number",
    "label_of",
    "matched",
    "none_labelled",
    "sorted_labels",
    "spread",
]

_FEW = 10  # names in a message


def check_known(values: Iterable[str], names: Sequence[str], place: str, fix: str) -> None:
    """Check that all labels are classes that are learnt.

    Raises:
        DataError: One is not; names that differ in upper and lower case are set side by side.
    """
    unknown = sorted(set(values).difference(names))
    if unknown:
        alike = {name.lower(): name for name in names}
        meant = [f"{name} as {alike[name.lower()]}" for name in unknown if name.lower() in alike]
        if all(map(is_number, (*unknown, *names))):
            fix = f"If one table counts the classes from 0 and the other from 1: {fix}"
        raise DataError(
            f"Every label must be a class that is learnt: {', '.join(names[:20])}",
            f"Got also {', '.join(map(repr, unknown[:_FEW]))} in {place}",
            f"Write {', '.join(meant[:_FEW])}" if meant else fix,
        )


def is_number(text: str) -> bool:
    """Whether a name is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def matched(
    labels: Tensor, found: Sequence[str] | None, known: Sequence[str], place: str
) -> tuple[Tensor, tuple[str, ...]]:
    """Turn labels of a data set into those of a network, by the names of the classes.

    Args:
        labels: ``int64 [N]``, numbers of the data set.
        found: The names of these numbers; None where it has only numbers.
        known: The classes of the network.
        place: The data set, for messages.

    Returns:
        Labels, ``int64 [N]``, as the network has them, and what the user should know.

    Raises:
        DataError: A class is none of the network's, or it is not clear which one it is.
    """
    if found is not None and tuple(found) == tuple(known):
        return labels, ()
    present = torch.unique(labels).tolist()
    if found is None:
        if all(name.isdecimal() for name in known):
            found = [str(number) for number in range(present[-1] + 1)]
        elif present == list(range(len(known))):
            pairs = ", ".join(f"{i} is {name}" for i, name in enumerate(known[:_FEW]))
            return labels, (f"{place} has numbers for classes, taken in order: {pairs}",)
        else:
            raise DataError(
                f"The data must name its classes, as the network does: {', '.join(known[:20])}",
                f"Got only numbers from {present[0]} to {present[-1]} in {place}",
                "Name them, for parquet in a file classes.json beside it",
            )
    fix = "Rename these, leave them out, or train with them"
    check_known((found[number] for number in present), known, place, fix)
    index = {name: number for number, name in enumerate(known)}
    table = torch.tensor([index.get(name, -1) for name in found], dtype=torch.int64)
    return table[labels], ()


def absent(labels: Tensor, names: Sequence[str], samples: str) -> tuple[str, ...]:
    """Name the classes that none of some samples has; they are said in the plural."""
    sizes = torch.bincount(labels.cpu(), minlength=len(names)).tolist()
    missing = [name for name, size in zip(names, sizes, strict=True) if not size]
    more = f" and {len(missing) - _FEW:,} more" if len(missing) > _FEW else ""
    return (f"no {samples} of {', '.join(missing[:_FEW])}{more}",) if missing else ()


def spread(sizes: Tensor, names: Sequence[str], samples: str = "texts") -> str:
    """Say how many samples each class has; ``sizes`` are ``int64 [C]``."""
    pairs = sorted(zip(sizes.tolist(), names, strict=True), key=lambda pair: -pair[0])
    if len(pairs) <= _FEW:
        return ", ".join(f"{name} {size:,}" for size, name in pairs)
    (most, first), (least, last) = pairs[0], pairs[-1]
    return f"{len(pairs)}, from {least:,} ({last}) to {most:,} ({first}) {samples} each"


# In tables


def label_of(value: Any, names: Sequence[str] | None, place: str) -> str | None:
    """Name the class of a row, or None if its label is missing.

    A whole number is an index into ``names``, if these are words: names that are numbers are never
    counted through, or 1 would be the second of 1, 2, 3 in one row and the first in another.
    ``place`` is for messages. Raises DataError if a number has no name, or the value is no label.
    """
    if is_missing(value):
        return None
    if isinstance(value, (list, dict, bytes)):
        raise DataError("A label must be a name or a number", f"Got {value!r:.60} in {place}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if names is None or text in names or any(map(is_number, names)):
        return text
    try:
        index = int(text)
    except ValueError:
        index = -1
    if not 0 <= index < len(names):
        raise DataError(
            f"Labels must be one of {', '.join(names)}, or 0 .. {len(names) - 1}",
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


def classes_in(
    labels: Sequence[str],
    column: str,
    path: Path,
    known: Sequence[str] | None = None,
    if_numbers: str = "choose another column",
) -> tuple[str, ...]:
    """Name the classes that training rows of a table have.

    Args:
        labels: Of the rows.
        column: Where they stand.
        path: The table.
        known: All classes, where the data set tells them.
        if_numbers: What to do with numbers that are no classes.

    Raises:
        DataError: There are fewer than two classes, or hardly a row shares its label with others.
    """
    if not labels:
        raise none_labelled([column], path)
    names = tuple(known or sorted_labels(labels))
    if len(names) < 2:
        raise DataError(
            "There must be at least two classes",
            f"Got only {names[0]!r} in column {column!r} of {path}",
            "Choose another column with `label`",
        )
    if len(names) > max(100, len(labels) // 2):
        numeric = known is None and all(map(is_number, names))
        raise DataError(
            "`label` must name a column of classes, which many rows share",
            f"Got {len(names):,} different values in {len(labels):,} rows of column {column!r}",
            f"They are numbers: {if_numbers}" if numeric else "Choose another column",
        )
    return names


def none_labelled(columns: Sequence[str], path: Path) -> DataError:
    """Say that no row of a table has a label."""
    return DataError(
        "A table must hold labelled rows",
        f"Got no row with a label in column {', '.join(map(repr, columns))} of {path}",
    )
