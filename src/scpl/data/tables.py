"""Tables: CSV, TSV, JSON lines, parquet and Arrow, row by row in constant memory.

A text file that begins with a byte order mark is read as that says. Any other is UTF-8; a line in
it that is not valid UTF-8 is read as Windows-1252, what old spreadsheets write, and counted.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from scpl.data import columnar
from scpl.data.notes import Faults
from scpl.errors import DataError
from scpl.outside import parse_json

__all__ = [
    "LEFT_OUT",
    "LONGEST_TEXT",
    "SUFFIXES",
    "check_columns",
    "class_names",
    "columns_of",
    "count_rows",
    "is_missing",
    "is_table",
    "lines_of",
    "rows_of",
    "size_of",
    "tables_in",
    "text_of",
]

NOT_UTF8 = "lines that are not valid UTF-8 read as Windows-1252"
HALVES = "lines with half of a character, which is read as \N{REPLACEMENT CHARACTER}"
BAD_JSON = "lines that are no JSON object left out"
RAGGED = "rows with another number of cells than the header left out"
LEFT_OUT = (BAD_JSON, RAGGED)
"""Faults for which a row is missing, not repaired."""

Row = tuple[int, list[Any]]
"""Number of a row, from 1 without the header, and the values of the wanted columns."""

LONGEST_TEXT = 1 << 20
"""Characters of a text that are read; what follows is far behind any number of tokens."""
LONGEST_LINE = 64 << 20
"""Bytes of a line; a file with longer ones is no table."""

_CHUNK = 1024  # rows of JSON lines that name the columns


def is_table(path: Path) -> bool:
    """Whether a file's name is that of a table."""
    return path.suffix.lower() in _READERS


def columns_of(path: Path) -> list[str]:
    """Names of a table's columns.

    Raises:
        DataError: The file is missing, empty, damaged or of an unknown kind.
        InputError: pyarrow is not installed and the file is parquet or Arrow.
    """
    kind = _READERS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"A table must be one of: {', '.join(SUFFIXES)}", f"Got {path}", "Rename or convert it"
        )
    if not path.is_file():
        raise DataError("A table must be an existing file", f"Got {path}")
    columns = kind[0](path)
    if not columns:
        raise DataError("A table must not be empty", f"Got no row in {path}")
    return columns


def rows_of(path: Path, columns: Sequence[str], faults: Faults) -> Iterator[Row]:
    """Yield the values of some columns, row by row; bad rows are counted and left out.

    Args:
        path: The table.
        columns: Which columns.
        faults: Takes what was left out or repaired.

    Raises:
        DataError: As `columns_of`, or a column is missing, or the quotes of a CSV file do not
            match.
    """
    check_columns(path, columns_of(path), columns)
    yield from _READERS[path.suffix.lower()][1](path, columns, faults)


def check_columns(
    path: Path,
    known: Sequence[str],
    wanted: Sequence[str],
    fix: str = "Choose columns with `text` and `label`",
) -> None:
    """Check that all wanted columns are there, each once.

    Raises:
        DataError: Answering with the columns.
    """
    missing = [name for name in wanted if known.count(name) != 1]
    if missing:
        close = difflib.get_close_matches(missing[0], known, n=1, cutoff=0.5)
        twice = missing[0] in known
        hint = f"Did you mean {close[0]!r}? " if close and not twice else ""
        raise DataError(
            f"{path.name} must have {'one' if twice else 'a'} column {missing[0]!r}",
            f"Its columns are: {', '.join(known)}",
            hint + fix,
        )


def tables_in(folder: Path, split: str) -> tuple[Path, ...]:
    """The tables of one split in a folder: ``split.csv`` and so on, or shards of columns."""
    for place in (folder, folder / "data"):
        for suffix in SUFFIXES:
            if suffix not in columnar.SUFFIXES and (place / f"{split}{suffix}").is_file():
                return (place / f"{split}{suffix}",)
        if found := columnar.shards(place, split):
            columnar.check_shards(found)
            return tuple(found)
    return ()


def count_rows(path: Path) -> int | None:
    """How many rows a table has, if the file tells: only parquet and Arrow do."""
    return columnar.open_columnar(path).num_rows if _is_columnar(path) else None


def size_of(path: Path) -> int:
    """How many bytes a table's content takes, unpacked."""
    return columnar.open_columnar(path).unpacked_size if _is_columnar(path) else path.stat().st_size


def class_names(path: Path, label: str) -> tuple[str, ...] | None:
    """Names of whole-numbered labels, where a file of the hub tells them."""
    return columnar.open_columnar(path).class_names(label) if _is_columnar(path) else None


def _is_columnar(path: Path) -> bool:
    return path.suffix.lower() in columnar.SUFFIXES


# From the values of cells to a text


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
                f"Column {column!r} must hold text", f"Got {type(value).__name__} in {place}"
            )
        parts.append(str(value)[:LONGEST_TEXT])
    return " ".join(parts)[:LONGEST_TEXT]


# CSV and TSV

_QUOTED = re.compile(r'"[^"]*"')
_DELIMITERS = ",;\t|"


def _csv_rows(path: Path, faults: Faults) -> Iterator[tuple[int, list[str]]]:
    lines = text_lines(path, faults)
    first = next((line for line in lines if line.strip()), "")
    header = _QUOTED.sub("", first)
    delimiter = max(_DELIMITERS, key=header.count)  # the comma, if there is none
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    begin = 1
    try:
        for cells in reader:
            yield begin, cells
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            "Quotes in a CSV file must enclose whole cells, and be doubled inside them",
            f"Got {path}, the row that begins in line {begin}: {error}",
            "Correct this row, or save the table as JSON lines or parquet",
        ) from error


def _tsv_rows(path: Path, faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """One line is one row. Cells that are quoted as in CSV are read so, other quotes are text."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    for number, ended in enumerate(text_lines(path, faults), start=1):
        line = ended.rstrip("\r\n")
        cells = line.split("\t")
        if '"' in line and line.count('"') % 2 == 0:
            with contextlib.suppress(csv.Error):  # if these quotes are text
                cells = next(csv.reader([line], delimiter="\t", strict=True))
        yield number, cells if line else []


Cells = Callable[[Path, Faults], Iterator[tuple[int, list[str]]]]
"""Yields all rows with the numbers of their lines; the header is the first."""


def _header(read: Cells, path: Path) -> list[str]:
    return [name.strip() for name in next(read(path, Faults()), (0, []))[1]]


def _cells(read: Cells, path: Path, columns: Sequence[str], faults: Faults) -> Iterator[Row]:
    header = _header(read, path)
    places = [header.index(name) for name in columns]
    number = 0
    for line, cells in islice(read(path, faults), 1, None):
        if not cells:
            continue  # an empty line
        number += 1
        if len(cells) != len(header):
            faults.add(RAGGED, f"{path.name} line {line}")
            continue
        yield number, [cells[place] for place in places]


# JSON lines


def _json_columns(path: Path) -> list[str]:
    found: dict[str, None] = {}
    rows = (row for _, row in _json_rows(path, Faults()))
    for row in islice(rows, _CHUNK):  # a row may leave out a key
        found.update(dict.fromkeys(row))
    return list(found)


def _json(path: Path, columns: Sequence[str], faults: Faults) -> Iterator[Row]:
    for number, row in _json_rows(path, faults):
        yield number, [row.get(name) for name in columns]


def _json_rows(path: Path, faults: Faults) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text_lines(path, faults), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, partial(faults.add, HALVES, f"{path.name} line {number}"))
        except ValueError:
            row = None
        if isinstance(row, dict):
            yield number, row
        elif number == 1 and line.lstrip().startswith("["):
            raise DataError(
                "A JSON file must hold one object per line (JSON lines)",
                f"Got an array in {path}",
                "Save it with orient='records', lines=True, or as CSV",
            )
        else:
            faults.add(BAD_JSON, f"{path.name} line {number}")


# Parquet and Arrow


def _columnar_names(path: Path) -> list[str]:
    return columnar.open_columnar(path).names


def _columnar(path: Path, columns: Sequence[str], faults: Faults) -> Iterator[Row]:
    for number, values in enumerate(columnar.rows(path, columns), start=1):
        yield number, list(values)


_Reader = tuple[Callable[[Path], list[str]], Callable[[Path, Sequence[str], Faults], Iterator[Row]]]
_READERS: dict[str, _Reader] = {
    ".csv": (partial(_header, _csv_rows), partial(_cells, _csv_rows)),
    ".tsv": (partial(_header, _tsv_rows), partial(_cells, _tsv_rows)),
    ".tab": (partial(_header, _tsv_rows), partial(_cells, _tsv_rows)),
    ".jsonl": (_json_columns, _json),
    ".ndjson": (_json_columns, _json),
    ".json": (_json_columns, _json),
    **dict.fromkeys(columnar.SUFFIXES, (_columnar_names, _columnar)),
}
SUFFIXES = tuple(_READERS)


# Lines of a text file, whatever its encoding

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like UTF-16's mark, so it is tried first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def text_lines(path: Path, faults: Faults) -> Iterator[str]:
    """Yield the lines of a file, with their ends.

    Raises DataError if it is unreadable, damaged UTF-16 or -32, holds a NUL byte, or a line longer
    than ``LONGEST_LINE``.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
        encoding = next((name for mark, name in _MARKS if start.startswith(mark)), None)
        if encoding is not None:
            yield from _marked(path, encoding)
            return
        with path.open("rb") as file:
            yield from lines_of(file, str(path), faults)
    except OSError as error:
        raise DataError("A file of texts must be readable", f"Got {path}: {error}") from error


def lines_of(file: BinaryIO, name: str, faults: Faults) -> Iterator[str]:
    """Yield the lines of an open file in UTF-8, with their ends.

    Raises:
        DataError: It holds a NUL byte, or a line longer than ``LONGEST_LINE``.
    """
    number = 0
    while raw := file.readline(LONGEST_LINE + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        _check(raw, name, number)
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError:
            faults.add(NOT_UTF8, f"{Path(name).name} line {number}")
            yield raw.decode("cp1252", "replace")


def _check(raw: bytes, name: str, number: int) -> None:
    if b"\0" in raw:
        raise DataError(
            "A file of texts must not hold NUL bytes",
            f"Got one in {name}, line {number}",
            "It may be UTF-16 without a byte order mark, or no text: save it as UTF-8",
        )
    if len(raw) > LONGEST_LINE:
        raise DataError(
            f"A line of a file of texts must be at most {LONGEST_LINE >> 20} MB long",
            f"Got a longer one in {name}, line {number}",
        )


def _marked(path: Path, encoding: str) -> Iterator[str]:
    try:
        # Only \n ends a line here, as in UTF-8; the reader of rows knows what \r means.
        with path.open(encoding=encoding, newline="\n") as file:
            while line := file.readline(LONGEST_LINE + 1):
                _check(line.encode("utf-8", "replace"), str(path), 0)
                yield line
    except UnicodeError as error:
        raise DataError(
            f"A file that begins with the mark of {encoding.upper()} must be that",
            f"Got {path}: {error}",
            "Save it as UTF-8",
        ) from error
