"""Rows of values as CSV, JSON lines or Parquet, written as they come.

A spreadsheet takes a cell of a CSV file for a formula, which can read other files and start
programs, if it begins with ``=``, ``+``, ``-``, ``@``, a tab or the end of a line. Whoever names a
file or writes a ticket decides how cells begin, so such a text gets an apostrophe in front:
spreadsheets show the text. Numbers stay as they are, and so does a text that is one.
"""

from __future__ import annotations

import csv
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeAlias, final

from scpl.data.extras import import_extra
from scpl.errors import InputError
from scpl.files import reason, replacing

__all__ = ["FORMATS", "CsvRows", "JsonRows", "Row", "Rows", "harmless", "new_file"]

Row: TypeAlias = Mapping[str, Any]
"""Texts, numbers, and lists of them, by column; every row has the same columns."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_PLAIN = re.compile(r"[+-]([0-9]+(\.[0-9]+)?)?")  # a number, or a sign alone
_ROWS_OF_GROUP = 1 << 14  # of a Parquet file: so many are held


class Rows(ABC):
    """Takes rows, and writes them."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Write some more rows."""


@final
class CsvRows(Rows):
    """A header, then a line per row; lists have ; between. Texts are made `harmless`.

    Args:
        out: Where to write.
        columns: All columns.
    """

    def __init__(self, out: TextIO, columns: Sequence[str]) -> None:
        self._out, self._table = out, csv.writer(out, lineterminator="\n")
        self._table.writerow(map(_cell, columns))

    def write(self, rows: Sequence[Row]) -> None:  # noqa: D102
        self._table.writerows(map(_cell, row.values()) for row in rows)
        self._out.flush()


@final
class JsonRows(Rows):
    """An object per line.

    Args:
        out: Where to write.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, rows: Sequence[Row]) -> None:  # noqa: D102
        self._out.write("".join(f"{json.dumps(row)}\n" for row in rows))
        self._out.flush()


@final
class _ParquetRows(Rows):
    """Columns of the types of an example, in groups of rows."""

    def __init__(self, path: Path, example: Row) -> None:
        self._arrow = import_extra("pyarrow", "parquet", "Writing Parquet files")
        parquet = import_extra("pyarrow.parquet", "parquet", "Writing Parquet files")
        self._schema = self._arrow.Table.from_pylist([example]).schema
        self._file = parquet.ParquetWriter(path, self._schema)
        self._held: list[dict[str, Any]] = []

    def write(self, rows: Sequence[Row]) -> None:
        self._held += [{name: _plain(value) for name, value in row.items()} for row in rows]
        if len(self._held) >= _ROWS_OF_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        self._file.write_table(self._arrow.Table.from_pylist(self._held, self._schema))
        self._held = []

    def close(self) -> None:
        if self._held:
            self._write_group()
        self._file.close()


Opened: TypeAlias = Iterator[Rows]


@contextmanager
def _csv(path: Path, example: Row) -> Opened:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        yield CsvRows(file, list(example))


@contextmanager
def _json(path: Path, example: Row) -> Opened:
    with path.open("w", encoding="utf-8", newline="") as file:
        yield JsonRows(file)


@contextmanager
def _parquet(path: Path, example: Row) -> Opened:
    rows = _ParquetRows(path, example)
    try:
        yield rows
    finally:
        rows.close()


FORMATS: Mapping[str, Callable[[Path, Row], Any]] = {
    ".csv": _csv,
    ".jsonl": _json,
    ".ndjson": _json,
    ".parquet": _parquet,
}
"""What writes a file, by how its name ends."""


@contextmanager
def new_file(path: Path, example: Row, *, force: bool = False) -> Opened:
    """Write rows into a file, which is there when all are written, or not at all.

    Args:
        path: The file; how its name ends says the format.
        example: A row, for the names of the columns and the types of their values.
        force: Overwrite what is there.

    Raises:
        InputError: if the name is not that of such a file, it is there already, it cannot be
            written, or pyarrow is not installed and needed.
    """
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        raise InputError(f"--out must end in one of: {', '.join(FORMATS)}", f"Got {path}")
    if path.exists() and (not force or path.is_dir()):
        advice = "Choose another with --out, or overwrite it with --force"
        raise InputError("A file of predictions must not exist yet", f"Got {path}", advice)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft, form(draft, example) as rows:
            yield rows
    except OSError as error:
        raise InputError(
            "A file of predictions must be writable",
            f"{path}: {reason(error, path)}",
            "Choose another with --out",
        ) from error


def harmless(text: str) -> str:
    """Put an apostrophe before a text that a spreadsheet would take for a formula."""
    risky = text.startswith(_FORMULA) and not _PLAIN.fullmatch(text)
    return f"'{text}" if risky else text


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return ";".join(str(_cell(each)) for each in value)
    return harmless(value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    """A value without lone surrogates, which Parquet does not hold."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
