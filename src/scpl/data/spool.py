"""Long sequences without an object for each element: packed in memory, or in a file."""

from __future__ import annotations

import copy
import os
import tempfile
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar, overload

from scpl.data.cache import folder
from scpl.errors import DataError

__all__ = ["PackedPaths", "PackedTexts", "Spool"]

T = TypeVar("T")


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


class _Descriptor:
    """Keeps a file open as long as it is in use."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class Spool(_Made[bytes]):
    """Byte strings in a file without a name, which is gone when the process ends.

    Any number of threads may read them. The file lies in the folder of the cache, because where
    other temporary files lie may be memory.

    Args:
        values: What is written.

    Raises:
        DataError: There is no room for it.
    """

    def __init__(self, values: Iterable[bytes]) -> None:
        self._starts, self._sizes = array("q"), array("q")
        place, end = folder(), 0
        try:
            if place is not None:
                place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place) as file:
                for value in values:
                    file.write(value)
                    self._starts.append(end)
                    self._sizes.append(len(value))
                    end += len(value)
                file.flush()
                self._file = _Descriptor(os.dup(file.fileno()))
        except OSError as error:
            raise DataError(
                "Rows that are read one by one need room for a copy of them on the disk",
                f"Got after {end / 1e6:,.0f} MB in {place or tempfile.gettempdir()}: {error}",
                "Name a folder with room in the environment variable SCPL_CACHE",
            ) from error

    def __len__(self) -> int:
        return len(self._starts)

    def _at(self, place: int) -> bytes:
        return os.pread(self._file.number, self._sizes[place], self._starts[place])

    def in_order(self, places: Iterable[int]) -> Spool:
        """Return those at some places, in that order, from the same file."""
        chosen, found = array("q", places), copy.copy(self)
        found._starts = array("q", (self._starts[place] for place in chosen))
        found._sizes = array("q", (self._sizes[place] for place in chosen))
        return found
