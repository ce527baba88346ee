"""Files of columns: Parquet, as the Hugging Face hub has it, and Arrow, as ``datasets`` saves it.

Large sets come in shards, such as ``train-00000-of-00003.parquet``, and the hub's metadata in the
files may name the classes.

A few kilobytes of Parquet can stand for gigabytes: one long value, and a count of how often it is
repeated. So the longer values can be, the fewer rows are read at a time, and what they come to is
counted. Arrow streams are mapped into memory and read as they are: what could repeat a value or
unpack is refused, and every value is checked to lie in the file.
"""

from __future__ import annotations

import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, final

from scpl.data.extras import import_extra
from scpl.errors import DataError, InputError
from scpl.outside import most_unpacked, parse_json, read_text

__all__ = ["SUFFIXES", "Columnar", "check_shards", "open_columnar", "rows", "saved", "shards"]

_CHUNK = 1024  # rows in memory at a time, at most
_BATCH = 1 << 29  # bytes of these rows, at most
_LEAST_ROW = 16  # bytes of a row in Python, however often it is the same
_SHARD = re.compile(r"-(\d+)-of-(\d+)")
_STATE = "state.json"


def shards(folder: Path, split: str) -> list[Path]:
    """List the files of a split in a folder: ``split.parquet`` and ``split-*.parquet``, sorted.

    Or of Arrow: named so, or saved by ``datasets`` in a sub-folder.
    """
    for suffix in SUFFIXES:
        if found := sorted([*folder.glob(f"{split}{suffix}"), *folder.glob(f"{split}-*{suffix}")]):
            return found
    return saved(folder / split)


def saved(folder: Path) -> list[Path]:
    """List the Arrow files of a folder that ``datasets`` saved a split in; none if it is no such.

    Raises:
        DataError: Its list of files is damaged, or one of them is missing.
    """
    path = folder / _STATE
    if not path.is_file():
        return []
    try:
        state = parse_json(read_text(path))
        found = [folder / Path(each["filename"]).name for each in state["_data_files"]]
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{_STATE} must be a list of Arrow files, as datasets writes it",
            f"Got {path}: {type(error).__name__}: {error}",
            "Save it again with save_to_disk",
        ) from error
    missing = [file.name for file in found if not file.is_file()]
    if missing or not found or state.get("_indices_files"):
        raise DataError(
            f"The files that {_STATE} lists must be there, and hold the rows in their order",
            f"Got {len(found) - len(missing)} of {len(found)} in {folder}"
            + (f"; missing: {', '.join(missing[:20])}" if missing else ""),
            "Copy the whole folder, or save it again with save_to_disk",
        )
    return found


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


class Columnar(ABC):
    """An open file of columns.

    Args:
        path: Where it lies.

    Attributes:
        schema: Of ``pyarrow``.
        names: The columns.

    Raises:
        DataError: It is damaged, or its own figures say that it is no data set.
        InputError: pyarrow is not installed.
    """

    called: ClassVar[str]
    schema: Any

    def __init__(self, path: Path) -> None:
        self.path, self.most = path, most_unpacked(path.stat().st_size)
        self._arrow = import_extra("pyarrow", "parquet", "Reading parquet and Arrow files")
        with self._reading():
            self._open()
            self.names: list[str] = list(self.schema.names)

    @abstractmethod
    def _open(self) -> None: ...

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """How many rows it has."""

    @property
    @abstractmethod
    def unpacked_size(self) -> int:
        """How many bytes its content takes, by its own figures."""

    @abstractmethod
    def _batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Yield record batches of few rows."""

    def class_names(self, label: str) -> tuple[str, ...] | None:
        """Names of whole-numbered labels, if it tells them."""
        try:
            about = parse_json((self.schema.metadata or {})[b"huggingface"])
            return tuple(str(name) for name in about["info"]["features"][label]["names"])
        except (KeyError, TypeError, ValueError):
            return None

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Read some columns, row by row, as values of Python.

        Raises:
            DataError: The file is damaged, or the values come to more than one of its size may
                hold.
        """
        size, wanted = 0, list(dict.fromkeys(columns))
        with self._reading():
            for batch in self._batches(wanted):
                size += max(batch.nbytes, batch.num_rows * _LEAST_ROW)
                self._check_size(size)
                cells = {name: batch.column(name).to_pylist() for name in wanted}
                yield from zip(*(cells[name] for name in columns), strict=True)

    def _check_size(self, size: int) -> None:
        if size > self.most:
            raise DataError(
                f"{self.called} of {self.path.stat().st_size:,} bytes must unpack to at most "
                f"{self.most:,}",
                f"Got at least {size:,} in {self.path}",
                "If it is what you want to learn from, save it as CSV or JSON lines",
            )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn the errors of pyarrow into a DataError that names the file."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # on damaged files pyarrow raises errors of many kinds
            raise DataError(
                f"{self.called} must be complete and intact",
                f"Got {self.path}: {error}",
                "Get it again",
            ) from error


@final
class _Parquet(Columnar):
    called = "A parquet file"

    def _open(self) -> None:
        parquet = import_extra("pyarrow.parquet", "parquet", "Reading parquet and Arrow files")
        about = parquet.read_metadata(self.path)
        # Of columns pyarrow must not be asked here: damaged ones end the process.
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        self._sizes = [int(group.total_byte_size) for group in groups]
        self._check_size(sum(self._sizes))
        self._check_size(about.num_rows * _LEAST_ROW)
        self._file = parquet.ParquetFile(self.path, metadata=about)
        self.schema = self._file.schema_arrow

    @property
    def num_rows(self) -> int:
        return int(self._file.metadata.num_rows)

    @property
    def unpacked_size(self) -> int:
        return sum(self._sizes)

    def _batches(self, columns: Sequence[str]) -> Iterator[Any]:
        # No value is longer than all values of its group are before they are repeated.
        longest = max(self._sizes, default=0)
        chunk = max(1, min(_CHUNK, _BATCH // max(longest, 1)))
        yield from self._file.iter_batches(chunk, columns=columns)


@final
class _Arrow(Columnar):
    called = "An Arrow stream"

    def _open(self) -> None:
        with self._mapped() as source:
            self.schema = self._arrow.ipc.open_stream(source).schema

    @property
    def num_rows(self) -> int:
        with self._reading():
            return sum(int(batch.num_rows) for batch in self._whole())

    @property
    def unpacked_size(self) -> int:
        return self.path.stat().st_size

    def _batches(self, columns: Sequence[str]) -> Iterator[Any]:
        for name in columns:
            kind = self.schema.field(name).type
            if not (self._is_plain(kind) or self._arrow.types.is_null(kind)):
                raise ValueError(f"column {name!r} holds {kind}, which is not read")
        for whole in self._whole():
            batch = whole.select(columns)
            batch.validate(full=True)  # nothing lies outside of the file
            for start in range(0, batch.num_rows, _CHUNK):
                yield batch.slice(start, _CHUNK)

    def _whole(self) -> Iterator[Any]:
        ipc = self._arrow.ipc
        with self._mapped() as source:
            messages = iter(ipc.MessageReader.open_stream(source))
            schema = ipc.read_schema(next(messages))
            for message in messages:
                if message.type != "record batch" or _is_packed(message.metadata.to_pybytes()):
                    raise ValueError("it is compressed or has dictionaries, which is not read")
                yield ipc.read_record_batch(message, schema)

    def _mapped(self) -> Any:
        return self._arrow.memory_map(str(self.path))

    def _is_plain(self, kind: Any) -> bool:
        """Whether each value of a type takes room of its own."""
        types = self._arrow.types
        if types.is_struct(kind):
            return kind.num_fields > 0 and all(self._is_plain(each.type) for each in kind)
        if types.is_list(kind) or types.is_large_list(kind):
            return self._is_plain(kind.value_type)
        tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary,
                 types.is_integer, types.is_floating, types.is_boolean)  # fmt: skip
        return any(test(kind) for test in tests)


def _is_packed(message: bytes) -> bool:
    """Whether the metadata of a record batch (flatbuffers) say that its buffers are compressed."""
    header = _entry(message, struct.unpack_from("<I", message)[0], 2)
    batch = header + struct.unpack_from("<I", message, header)[0]
    return _entry(message, batch, 3) != 0


def _entry(data: bytes, table: int, number: int) -> int:
    """Where an entry of a table of flatbuffers lies; 0 if it is not there."""
    entries = table - struct.unpack_from("<i", data, table)[0]
    size, place = struct.unpack_from("<H", data, entries)[0], 4 + 2 * number
    offset = struct.unpack_from("<H", data, entries + place)[0] if place < size else 0
    return table + offset if offset else 0


_KINDS: Mapping[str, type[Columnar]] = {".parquet": _Parquet, ".arrow": _Arrow}
SUFFIXES = tuple(_KINDS)
"""How these files are called."""


def open_columnar(path: Path) -> Columnar:
    """Open a file with one of ``SUFFIXES``; raises as `Columnar`."""
    return _KINDS[path.suffix.lower()](path)


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Read some columns of a file, row by row; raises as `Columnar` and `Columnar.rows`."""
    yield from open_columnar(path).rows(columns)
