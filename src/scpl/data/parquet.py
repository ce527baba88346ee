"""Parquet files, as the Hugging Face hub keeps its data sets.

Large sets come in shards, such as ``train-00000-of-00003.parquet``, and the hub's metadata in the
files may name the classes.

A few kilobytes of this format can stand for gigabytes: one long value, and a count of how often it
is repeated. So the longer values can be, the fewer rows are read at a time, and what they come to
is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scpl.data.extras import import_extra
from scpl.errors import DataError, InputError
from scpl.outside import most_unpacked, parse_json

__all__ = ["check_shards", "class_names", "open_parquet", "rows", "shards", "unpacked_size"]

_CHUNK = 1024  # rows in memory at a time, at most
_BATCH = 1 << 29  # bytes of these rows, at most
_LEAST_ROW = 16  # bytes of a row in Python, however often it is the same
_SHARD = re.compile(r"-(\d+)-of-(\d+)")


def shards(folder: Path, split: str) -> list[Path]:
    """List ``split.parquet`` and ``split-*.parquet`` in a folder, sorted."""
    return sorted([*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")])


def check_shards(files: Sequence[Path]) -> None:
    """Raise DataError unless all files are there that the numbers in their names promise."""
    numbers = [(int(m[1]), int(m[2])) for file in files if (m := _SHARD.search(file.name))]
    promised = range(max((of for _, of in numbers), default=0))
    missing = sorted(set(promised) - {number for number, _ in numbers})
    if missing:
        raise DataError(
            f"All shards of {files[0].parent / files[0].name.partition('-')[0]}-* must be there",
            f"Got {len(files)} of {len(promised)}; missing: {', '.join(map(str, missing))}",
            "Download the missing files",
        )


def open_parquet(path: Path) -> Any:
    """Open a file as ``pyarrow.parquet.ParquetFile``.

    Raises:
        DataError: It is damaged, or its own figures say that it is no data set.
        InputError: pyarrow is not installed.
    """
    parquet = import_extra("pyarrow.parquet", "parquet", "Reading parquet files")
    with _reading(path):
        about, most = parquet.read_metadata(path), _most(path)
        # Of columns pyarrow must not be asked here: damaged ones end the process.
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        _check_size(path, sum(group.total_byte_size for group in groups), most)
        _check_size(path, about.num_rows * _LEAST_ROW, most)
        return parquet.ParquetFile(path, metadata=about)


def unpacked_size(file: Any) -> int:
    """How many bytes the content of an open file takes, by its own figures."""
    about = file.metadata
    return sum(int(about.row_group(i).total_byte_size) for i in range(about.num_row_groups))


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Read some columns of a file, row by row, as values of Python.

    Raises:
        DataError: as `open_parquet`, or the values come to more than a file of this size may hold.
    """
    file, most, size = open_parquet(path), _most(path), 0
    wanted = list(dict.fromkeys(columns))
    with _reading(path):
        groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
        # No value is longer than all values of its group are before they are repeated.
        longest = max((group.total_byte_size for group in groups), default=0)
        chunk = max(1, min(_CHUNK, _BATCH // max(longest, 1)))
        for batch in file.iter_batches(chunk, columns=wanted):
            size += batch.nbytes
            _check_size(path, size, most)
            cells = {name: batch.column(name).to_pylist() for name in wanted}
            yield from zip(*(cells[name] for name in columns), strict=True)


def _most(path: Path) -> int:
    return most_unpacked(path.stat().st_size)


def _check_size(path: Path, size: int, most: int) -> None:
    if size > most:
        raise DataError(
            f"A parquet file of {path.stat().st_size:,} bytes must unpack to at most {most:,}",
            f"Got at least {size:,} in {path}",
            "If it is what you want to learn from, save it as CSV or JSON lines",
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of pyarrow into a DataError that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # on damaged files pyarrow raises errors of many kinds
        raise DataError(
            "A parquet file must be complete and intact", f"Got {path}: {error}", "Get it again"
        ) from error


def class_names(file: Any, label: str) -> tuple[str, ...] | None:
    """Names of whole-numbered labels, if an open file tells them."""
    try:
        about = parse_json((file.schema_arrow.metadata or {})[b"huggingface"])
        return tuple(str(name) for name in about["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return None
