"""From the cells of a row to what is to be predicted: a class, several labels, or numbers."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from sys import intern
from typing import Any, ClassVar, Generic, TypeVar, final

import torch
from torch import Tensor

from scpl.data.classes import (
    check_known,
    classes_in,
    is_number,
    label_of,
    none_labelled,
    sorted_labels,
    spread,
)
from scpl.data.identity import sizes_of
from scpl.data.spool import PackedNumbers
from scpl.data.tables import is_missing
from scpl.errors import DataError, InputError
from scpl.outside import parse_json
from scpl.tasks import Classes, MultiLabel, Regression, Task

__all__ = ["Targets", "targets_of"]

Value = TypeVar("Value")

_FEW = 10  # names in a message
_FIX = "Correct the labels, or add training texts of these"


class Targets(ABC, Generic[Value]):
    """How the target columns of a table are read.

    Args:
        columns: Their names.
        known: Names of the classes, where the data set tells them.
    """

    task: ClassVar[type[Task]]

    def __init__(self, columns: Sequence[str], known: Sequence[str] | None) -> None:
        self.columns, self.known = tuple(columns), None if known is None else tuple(known)
        self.hints: list[str] = []
        self.by_place = ""  # says how numbers were taken for names

    def column(self) -> list[Value] | PackedNumbers:
        """Return something to append targets to, that of many makes little of memory.

        A list, as `read` gives the same object for equal targets.
        """
        return []

    @abstractmethod
    def read(self, cells: Sequence[Any], place: str) -> Value | None:
        """Read the target of a row; None if it is missing.

        Raises:
            DataError: if a cell holds something else; ``place`` says which row.
        """

    @abstractmethod
    def names(self, values: Sequence[Value], path: Path) -> tuple[str, ...]:
        """Name the outputs of a network that learns these targets of training rows.

        Raises:
            DataError: if nothing can be learnt from them.
        """

    @abstractmethod
    def tensor(self, values: Sequence[Value], names: Sequence[str], path: Path) -> Tensor:
        """Turn targets into numbers, as a loader gives them.

        Raises:
            DataError: if one is not among the names.
        """

    @abstractmethod
    def check_learnt(self, targets: Tensor, names: Sequence[str]) -> None:
        """Check that the training rows teach every output.

        Raises:
            DataError: if they do not.
        """

    @abstractmethod
    def balance(self, targets: Tensor, names: Sequence[str], split: str = "train") -> str:
        """Say how the rows of a split are spread."""

    def absent(self, targets: Tensor, names: Sequence[str], split: str) -> Iterator[str]:
        """Name the classes or labels that no row of a split has: is it labelled as the others?"""
        missing = [name for name, size in sizes_of(targets, names).items() if not size]
        if missing:
            more = f" and {len(missing) - _FEW} more" * (len(missing) > _FEW)
            yield f"no {split} text is of {', '.join(missing[:_FEW])}{more}"

    def _none(self, path: Path) -> DataError:
        return none_labelled(self.columns, path)


def targets_of(kind: str, columns: Sequence[str], known: Sequence[str] | None) -> Targets[Any]:
    """Choose how target columns are read.

    Args:
        kind: What is learnt, see `scpl.tasks.TASKS`.
        columns: The target columns.
        known: Names of the classes, where the data set tells them.

    Raises:
        InputError: if these columns cannot be of that kind.
    """
    if kind == Classes.kind and len(columns) > 1:
        raise InputError(
            "A class must stand in one column",
            f"Got `label` {', '.join(columns)}",
            "Name one of them, or choose `task` multi-label or regression",
        )
    return _READERS[kind](columns, known)


@final
class _Class(Targets[str]):
    task = Classes

    def read(self, cells: Sequence[Any], place: str) -> str | None:
        """A whole number is an index into the known names, if they are words."""
        label = label_of(cells[0], self.known, place)
        known = self.known is not None and label is not None and label != cells[0]
        if known and not self.by_place and is_number(str(cells[0])) and not is_number(str(label)):
            self.by_place = f"numbers as labels are places in the list: {cells[0]} is {label}"
        return None if label is None else intern(label)

    def names(self, values: Sequence[str], path: Path) -> tuple[str, ...]:
        names = classes_in(
            values, self.columns[0], path, self.known, "learn them with `task` regression"
        )
        numeric = self.known is None and all(map(is_number, names))
        fractions = any("." in name or "e" in name.lower() for name in names)
        if numeric and (fractions or len(names) > 2 * _FEW):
            self.hints.append(
                f"the labels in {self.columns[0]!r} look like numbers, and each is learnt as a "
                "class of its own: `task` regression learns their values"
            )
        return names

    def tensor(self, values: Sequence[str], names: Sequence[str], path: Path) -> Tensor:
        check_known(values, names, path.name, _FIX)
        index = {name: number for number, name in enumerate(names)}
        return torch.tensor([index[value] for value in values], dtype=torch.int64)

    def check_learnt(self, targets: Tensor, names: Sequence[str]) -> None:
        _check_none_missing("class", torch.bincount(targets, minlength=len(names)), names)

    def balance(self, targets: Tensor, names: Sequence[str], split: str = "train") -> str:
        return f"classes in {split}: {spread(torch.bincount(targets, minlength=len(names)), names)}"


@final
class _Labels(Targets["frozenset[str]"]):
    task = MultiLabel

    def __init__(self, columns: Sequence[str], known: Sequence[str] | None) -> None:
        super().__init__(columns, known)
        self._met: dict[frozenset[str], frozenset[str]] = {}

    def read(self, cells: Sequence[Any], place: str) -> frozenset[str] | None:
        """Several columns say of one label each whether it is there; one column lists labels."""
        if any(map(is_missing, cells)):
            return None
        if len(self.columns) == 1:
            found = frozenset(_listed(cells[0], place))
        else:
            there = (_truth(c, name, place) for c, name in zip(cells, self.columns, strict=True))
            found = frozenset(n for n, yes in zip(self.columns, there, strict=True) if yes)
        return self._met.setdefault(found, found)

    def names(self, values: Sequence[frozenset[str]], path: Path) -> tuple[str, ...]:
        if not values:
            raise self._none(path)
        if len(self.columns) > 1:
            return self.columns
        names = sorted_labels(name for value in values for name in value)
        if set(names) <= {"0", "1"}:
            raise DataError(
                "One `label` column must list labels; several must hold 0 or 1, one for each label",
                f"Got {', '.join(names) or 'no label at all'} in column {self.columns[0]!r} of "
                f"{path}",
                "Name the columns of all labels",
            )
        if len(names) > max(100, len(values) // 2):
            raise DataError(
                "`label` must name a column of labels, which many rows share",
                f"Got {len(names):,} different ones in {len(values):,} rows of column "
                f"{self.columns[0]!r}",
                "Choose another column; labels are separated by ; or |, or a JSON list",
            )
        return names

    def tensor(self, values: Sequence[frozenset[str]], names: Sequence[str], path: Path) -> Tensor:
        check_known((name for value in values for name in value), names, path.name, _FIX)
        found = bytearray(name in value for value in values for name in names)
        return torch.frombuffer(found, dtype=torch.uint8).view(-1, len(names))

    def check_learnt(self, targets: Tensor, names: Sequence[str]) -> None:
        _check_none_missing("label", targets.sum(0), names)

    def balance(self, targets: Tensor, names: Sequence[str], split: str = "train") -> str:
        each, without = targets.sum(1).double(), float((targets.sum(1) == 0).double().mean())
        return (
            f"labels in {split}: {spread(targets.sum(0), names)}; {each.mean():.2f} per text, "
            f"{100 * without:.1f} % of the texts have none"
        )


@final
class _Numbers(Targets["list[float]"]):
    task = Regression

    def read(self, cells: Sequence[Any], place: str) -> list[float] | None:
        """A row that lacks one of its numbers is left out."""
        found = [_number(c, name, place) for c, name in zip(cells, self.columns, strict=True)]
        known = [value for value in found if value is not None]
        return known if len(known) == len(found) else None

    def column(self) -> PackedNumbers:
        return PackedNumbers(len(self.columns))

    def names(self, values: Sequence[list[float]], path: Path) -> tuple[str, ...]:
        if not values:
            raise self._none(path)
        return self.columns

    def tensor(self, values: Sequence[list[float]], names: Sequence[str], path: Path) -> Tensor:
        found = array("d", chain.from_iterable(values))
        return torch.frombuffer(found, dtype=torch.float64).view(-1, len(names))

    def check_learnt(self, targets: Tensor, names: Sequence[str]) -> None:
        for column, name in enumerate(names):
            if targets[:, column].min() == targets[:, column].max():
                raise DataError(
                    "Numbers to learn must vary over the training texts",
                    f"Got {float(targets[0, column]):g} in every row of column {name!r}",
                    "Choose another column with `label`",
                )

    def balance(self, targets: Tensor, names: Sequence[str], split: str = "train") -> str:
        std, mean = torch.std_mean(targets, dim=0, correction=0)
        low, high = targets.aminmax(dim=0)
        told = [
            f"{name} {mean[i]:.4g} ± {std[i]:.4g}, from {low[i]:.4g} to {high[i]:.4g}"
            for i, name in enumerate(names)
        ]
        return f"numbers in {split}: {'; '.join(told)}"


_READERS: dict[str, type[Targets[Any]]] = {
    reader.task.kind: reader for reader in (_Class, _Labels, _Numbers)
}


# Cells


def _listed(value: Any, place: str) -> list[str]:
    """Take a list of labels apart: a list, the JSON of one, or names with ; or | between."""
    listed: Any = value
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                listed = parse_json(value)
            except ValueError as error:
                raise DataError(
                    "A list of labels must be JSON, or names separated by ; or |",
                    f"Got {value!r:.60} in {place}: {error}",
                    'Write for instance ["a", "b"], or a;b',
                ) from error
        else:
            listed = [part for part in re.split(r"[;|]", value) if part.strip()]
    if not isinstance(listed, (list, tuple)):
        listed = [listed]
    found = []
    for each in listed:
        if not isinstance(each, (str, int)) or isinstance(each, bool) or not str(each).strip():
            raise DataError(
                "A list of labels must hold names or whole numbers", f"Got {each!r:.60} in {place}"
            )
        found.append(str(each).strip())
    return found


_YES, _NO = {"1", "true", "yes"}, {"0", "false", "no"}


def _truth(value: Any, column: str, place: str) -> bool:
    """Read whether a label is there."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().lower()
    text = text.removesuffix(".0")
    if text not in _YES | _NO:
        raise DataError(
            "A column of one label must hold 0 or 1 (or no and yes, or false and true)",
            f"Got {value!r:.60} in column {column!r}, {place}",
            "Correct it, or name one column that lists the labels of each row",
        )
    return text in _YES


def _number(value: Any, column: str, place: str) -> float | None:
    """Read a number; None if it is missing."""
    if is_missing(value):
        return None
    try:
        found = math.inf if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.inf
    if math.isnan(found):
        return None
    if math.isinf(found):
        raise DataError(
            "A number to learn must be a finite number with a decimal point",
            f"Got {value!r:.60} in column {column!r}, {place}",
            "Correct it, or leave the cell empty: the row is left out then",
        )
    return found


# Messages


def _check_none_missing(noun: str, sizes: Tensor, names: Sequence[str]) -> None:
    missing = [name for name, size in zip(names, sizes.tolist(), strict=True) if not size]
    if missing:
        raise DataError(
            f"Every {noun} needs at least one training text",
            f"Got none of {', '.join(map(repr, missing[:_FEW]))}",
            f"Add texts of it, or remove the {noun} from the table",
        )
