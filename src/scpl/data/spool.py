"""Long sequences without an object for each element: packed in memory, or in a file.

The files have no names, and are gone when the process ends, however it does. They lie in the folder
of the cache, because where other temporary files lie may be memory.
"""

from __future__ import annotations

import copy
import errno
import mmap
import os
import shutil
import tempfile
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor

from scpl.data.cache import folder
from scpl.errors import DataError
from scpl.outside import available_memory

__all__ = [
    "InMemory",
    "PackedNumbers",
    "PackedPaths",
    "PackedTexts",
    "Spool",
    "SpooledTexts",
    "check_disk",
    "fits",
    "numbers",
]

InMemory: TypeAlias = Literal["auto", "yes", "no"]
"""Whether samples are held in memory; auto: if they take at most a quarter of what is free."""

_SHARE_OF_MEMORY = 1 / 4  # samples are copied while they are prepared and divided

T = TypeVar("T")


def fits(in_memory: InMemory, size: int) -> bool:
    """Whether samples that take so many bytes are held in memory."""
    if in_memory == "auto":
        return size <= _SHARE_OF_MEMORY * available_memory()
    return in_memory == "yes"


class _Made(Sequence[T]):
    """Elements that are made when they are asked for."""

    @abstractmethod
    def _at(self, place: int) -> T: ...

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self))[index]
        return self._at(places) if isinstance(places, int) else [self._at(each) for each in places]


class PackedTexts(_Made[str]):
    """Texts; a long list of small objects takes several times the memory."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._content, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self._content += os.fsencode(text)  # a file's name need not be UTF-8
            self._ends.append(len(self._content))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _at(self, place: int) -> str:
        return os.fsdecode(bytes(self._content[self._ends[place] : self._ends[place + 1]]))


class PackedPaths(_Made[Path]):
    """Paths, packed as texts."""

    def __init__(self, texts: PackedTexts) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def _at(self, place: int) -> Path:
        return Path(self._texts[place])


class PackedNumbers(_Made[list[float]]):
    """Rows of so many numbers each."""

    def __init__(self, width: int) -> None:
        self._content, self._width = array("d"), width

    def append(self, row: Sequence[float]) -> None:
        """Add a row."""
        self._content.extend(row)

    def __len__(self) -> int:
        return len(self._content) // self._width

    def _at(self, place: int) -> list[float]:
        return self._content[place * self._width : (place + 1) * self._width].tolist()


class _Descriptor:
    """Keeps a file open as long as it is in use."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class Spool(_Made[bytes]):
    """Byte strings in a file; any number of threads may read them.

    Args:
        values: What is written.

    Raises:
        DataError: There is no room for it.
    """

    def __init__(self, values: Iterable[bytes]) -> None:
        sizes = array("q")
        with _scratch() as file:
            for value in values:
                file.write(value)
                sizes.append(len(value))
            file.flush()
            self._file = _Descriptor(os.dup(file.fileno()))
        self._sizes = np.array(sizes, np.int64)
        self._starts = self._sizes.cumsum() - self._sizes

    def __len__(self) -> int:
        return len(self._starts)

    def _at(self, place: int) -> bytes:
        return os.pread(self._file.number, int(self._sizes[place]), int(self._starts[place]))

    def in_order(self, places: Iterable[int]) -> Spool:
        """Return those at some places, in that order, from the same file."""
        chosen, found = np.fromiter(places, np.int64), copy.copy(self)
        found._starts, found._sizes = self._starts[chosen], self._sizes[chosen]
        return found


class SpooledTexts(_Made[str]):
    """Texts in a file, as a `Spool`; any of them may be read back by its place."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._spool = Spool(text.encode("utf-8", "surrogatepass") for text in texts)

    def __len__(self) -> int:
        return len(self._spool)

    def _at(self, place: int) -> str:
        return self._spool[place].decode("utf-8", "surrogatepass")

    def in_order(self, places: Iterable[int]) -> SpooledTexts:
        """Return those at some places, in that order, from the same file."""
        found = copy.copy(self)
        found._spool = self._spool.in_order(places)
        return found


def numbers(rows: Iterable[Sequence[int]], dtype: torch.dtype, *, mapped: bool) -> Tensor:
    """Put rows of whole numbers one after the other.

    Args:
        rows: They are taken one by one.
        dtype: ``int16`` or ``int32``.
        mapped: Whether they lie in a file that is mapped into memory: the system reads of it what
            is used, and takes the memory back when it needs it.

    Raises:
        DataError: There is no room for the file.
    """
    code = {torch.int16: "h", torch.int32: "i"}[dtype]
    blocks = (array(code, row).tobytes() for row in rows)
    content = _mapped(blocks) if mapped else _joined(blocks)
    return torch.frombuffer(content, dtype=dtype) if len(content) else torch.empty(0, dtype=dtype)


def _joined(blocks: Iterable[bytes]) -> bytearray:
    content = bytearray()
    for block in blocks:
        content += block
    return content


def _mapped(blocks: Iterable[bytes]) -> bytearray | mmap.mmap:
    with _scratch() as file:
        file.writelines(blocks)
        file.flush()
        # Shared with a file that nobody else can open: for private pages the system wants room in
        # memory, should all of them be written to.
        return mmap.mmap(file.fileno(), 0) if file.tell() else bytearray()


def check_disk(needed: int) -> None:
    """Check that there is room for so many bytes where these files lie.

    Raises:
        DataError: There is less.
    """
    with _scratch() as file:
        free = shutil.disk_usage(file.fileno()).free
        if free < needed:
            reason = f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free"
            raise OSError(errno.ENOSPC, reason)


@contextmanager
def _scratch() -> Iterator[BinaryIO]:
    """Open a file without a name; what goes wrong with it is a DataError."""
    place = folder()
    try:
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place) as file:
            yield cast(BinaryIO, file)
    except OSError as error:
        raise DataError(
            "What is not held in memory needs room for a copy on the disk",
            f"Got in {place or tempfile.gettempdir()}: {error}",
            "Name a folder with room in the environment variable SCPL_CACHE",
        ) from error
