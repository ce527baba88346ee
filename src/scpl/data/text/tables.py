"""Rows of the user's own tables: CSV, TSV, JSON lines and parquet; in constant memory."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from scpl.data.extras import require
from scpl.data.text.faults import Faults
from scpl.data.text.lines import LONGEST_LINE, text_lines
from scpl.errors import DataError, InputError

__all__ = [
    "LEFT_OUT",
    "SUFFIXES",
    "check_columns",
    "class_names",
    "columns_of",
    "is_table",
    "rows_of",
]

BAD_JSON = "lines that are no JSON object left out"
RAGGED = "rows with another number of cells than the header left out"
LEFT_OUT = (BAD_JSON, RAGGED)
"""Faults for which a row is missing, not repaired."""

Row = tuple[int, list[Any]]
"""Number of a row, from 1 without the header, and the values of the wanted columns."""

_CHUNK = 1024  # rows of a parquet file in memory at a time
_QUOTED = re.compile(r'"[^"]*"')
_DELIMITERS = ",;\t|"


def is_table(path: Path) -> bool:
    """Whether a file's name is that of a table."""
    return path.suffix.lower() in _READERS


def columns_of(path: Path) -> list[str]:
    """Names of a table's columns.

    Raises:
        DataError: The file is missing, empty, damaged or of an unknown kind.
        InputError: pyarrow is not installed and the file is parquet.
    """
    kind = _READERS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"a table must be one of: {', '.join(SUFFIXES)}", f"Got {path}", "Rename or convert it"
        )
    if not path.is_file():
        raise DataError("a table must be an existing file", f"Got {path}")
    columns = kind[0](path)
    if not columns:
        raise DataError("a table must not be empty", f"Got no row in {path}")
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
    known = columns_of(path)
    check_columns(path, known, columns)
    yield from _READERS[path.suffix.lower()][1](path, columns, faults)


def check_columns(path: Path, known: Sequence[str], wanted: Sequence[str]) -> None:
    """Check that all wanted columns are there, each once.

    Raises:
        DataError: Answering with the columns.
    """
    missing = [name for name in wanted if known.count(name) != 1]
    if missing:
        import difflib

        close = difflib.get_close_matches(missing[0], known, n=1, cutoff=0.5)
        twice = missing[0] in known
        raise DataError(
            f"{path.name} must have {'one' if twice else 'a'} column {missing[0]!r}",
            f"Its columns are: {', '.join(known)}",
            f"Did you mean {close[0]!r}? Choose columns with --text and --label"
            if close and not twice
            else "Choose columns with --text and --label",
        )


def class_names(path: Path, label: str) -> tuple[str, ...] | None:
    """Names of whole-numbered labels, where a parquet file of the hub tells them."""
    if path.suffix.lower() != ".parquet":
        return None
    metadata = _parquet(path).schema_arrow.metadata
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None  # the names are optional


# CSV and TSV


def _csv_columns(path: Path) -> list[str]:
    return _header(_csv_rows(path, Faults()))


def _csv(path: Path, columns: Sequence[str], faults: Faults) -> Iterator[Row]:
    return _chosen(_csv_rows(path, faults), columns, path, faults)


def _csv_rows(path: Path, faults: Faults) -> Iterator[tuple[int, list[str]]]:
    """All rows with the numbers of their lines; the header is the first."""
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
            "quotes in a CSV file must enclose whole cells, and be doubled inside them",
            f"Got {path}, the row that begins in line {begin}: {error}",
            "Correct this row, or save the table as JSON lines or parquet",
        ) from error


def _tsv_columns(path: Path) -> list[str]:
    return _header(_tsv_rows(path, Faults()))


def _tsv(path: Path, columns: Sequence[str], faults: Faults) -> Iterator[Row]:
    return _chosen(_tsv_rows(path, faults), columns, path, faults)


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


def _header(rows: Iterator[tuple[int, list[str]]]) -> list[str]:
    return [name.strip() for name in next(rows, (0, []))[1]]


def _chosen(
    rows: Iterator[tuple[int, list[str]]], columns: Sequence[str], path: Path, faults: Faults
) -> Iterator[Row]:
    header = _header(rows)
    places = [header.index(name) for name in columns]
    number = 0
    for line, cells in rows:
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
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield number, row
        elif number == 1 and line.lstrip().startswith("["):
            raise DataError(
                "a JSON file must hold one object per line (JSON lines)",
                f"Got an array in {path}",
                "Save it with orient='records', lines=True, or as CSV",
            )
        else:
            faults.add(BAD_JSON, f"{path.name} line {number}")


# Parquet


def _parquet_columns(path: Path) -> list[str]:
    return list(_parquet(path).schema_arrow.names)


def _parquet_rows(path: Path, columns: Sequence[str], faults: Faults) -> Iterator[Row]:
    number = 0
    try:
        for batch in _parquet(path).iter_batches(_CHUNK, columns=list(dict.fromkeys(columns))):
            cells = [batch.column(name).to_pylist() for name in columns]
            for values in zip(*cells, strict=True):
                number += 1
                yield number, list(values)
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
        if isinstance(error, InputError):
            raise
        raise _damaged(path, error) from error


def _parquet(path: Path) -> Any:
    parquet = require("pyarrow.parquet", "parquet", "Reading parquet files")
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        "a parquet file must be complete and intact", f"Got {path}: {error}", "Write it again"
    )


_Reader = tuple[Callable[[Path], list[str]], Callable[[Path, Sequence[str], Faults], Iterator[Row]]]
_READERS: dict[str, _Reader] = {
    ".csv": (_csv_columns, _csv),
    ".tsv": (_tsv_columns, _tsv),
    ".tab": (_tsv_columns, _tsv),
    ".jsonl": (_json_columns, _json),
    ".ndjson": (_json_columns, _json),
    ".json": (_json_columns, _json),
    ".parquet": (_parquet_columns, _parquet_rows),
}
SUFFIXES = tuple(_READERS)
