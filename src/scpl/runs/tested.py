"""What the final test of a run found: ``test.json``, read as numbers and texts to show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from scpl.runs.columns import PICTURE
from scpl.runs.numbers import as_number, as_numbers

__all__ = ["Bin", "Points", "Row", "Tested"]

Row = Mapping[str, str | float]
"""Cells by column; NaN for none."""

_MOST_ROWS = 1 << 20
_MOST_COLUMNS = 16


class Bin(NamedTuple):
    """Predictions of about one probability: how many, its mean, and how often it was so."""

    begin: float
    end: float
    size: float
    probability: float
    share: float


class Points(NamedTuple):
    """True and predicted values of a number, sample by sample."""

    name: str
    true: list[float]
    predicted: list[float]


@dataclass(frozen=True)
class Tested:
    """An account of all predictions.

    Attributes:
        table: A row for each class, label or number, the name first.
        mistakes: The worst predictions, the worst first.
        confusion: How many samples of each class (row) were taken for which (column).
        calibration_error: Expected calibration error; NaN where predictions are no probabilities.
        bins: What it is made of.
        points: Of numbers.
    """

    table: tuple[Row, ...] = ()
    mistakes: tuple[Row, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    calibration_error: float = math.nan
    bins: tuple[Bin, ...] = ()
    points: tuple[Points, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Tested:
        """Read JSON values, as `scpl.tasks.Task.details` returns them; any of them may be missing.

        Raises:
            ValueError, TypeError, AttributeError, LookupError: if they are something else.
        """
        calibration = values.get("calibration") or {}
        table, confusion = _rows(values.get("table")), _square(values.get("confusion") or [])
        if confusion and len(confusion) != len(table):
            raise ValueError(f"confusions of {len(confusion)} classes, but a table of {len(table)}")
        return cls(
            table,
            _rows(values.get("mistakes")),
            confusion,
            as_number(calibration.get("expected_calibration_error")),
            tuple(_bin(each) for each in calibration.get("bins") or ()),
            tuple(_points(each) for each in values.get("points") or ()),
        )

    @property
    def noun(self) -> str:
        """What the rows of the table are."""
        return next(iter(self.table[0])) if self.table else ""

    @property
    def names(self) -> list[str]:
        """Of the classes, labels or numbers."""
        return [str(row[self.noun]) for row in self.table]


def _rows(value: Any) -> tuple[Row, ...]:
    rows = list(value or ())
    if len(rows) > _MOST_ROWS or any(len(row) > _MOST_COLUMNS for row in rows):
        raise ValueError(f"a table of more than {_MOST_ROWS} rows or {_MOST_COLUMNS} columns")
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError("a table whose rows have different columns")
    return tuple({name: _cell(name, cell) for name, cell in row.items()} for row in rows)


def _cell(name: str, value: Any) -> str | float:
    if not isinstance(value, str):
        return as_number(value)
    if name == PICTURE and not _is_base64(value):
        raise ValueError(f"a {PICTURE} that is not in base64")
    return value


def _is_base64(value: str) -> bool:
    return value.isascii() and value.rstrip("=").replace("+", "").replace("/", "").isalnum()


def _square(value: Any) -> tuple[tuple[int, ...], ...]:
    rows = tuple(tuple(map(_count, row)) for row in value)
    if any(len(row) != len(rows) for row in rows):
        raise ValueError("a table of confusions that is not square")
    return rows


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{value!r:.60} is no count")
    return value


def _bin(value: Mapping[str, Any]) -> Bin:
    names = ("from", "to", "count", "probability", "share")
    return Bin(*(as_number(value.get(name)) for name in names))


def _points(value: Mapping[str, Any]) -> Points:
    name, *_ = value.values()
    true, predicted = as_numbers(value["true"]), as_numbers(value["predicted"])
    if len(true) != len(predicted):
        raise ValueError("points of which only one coordinate is known")
    return Points(str(name), true, predicted)
