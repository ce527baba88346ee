"""What is to be predicted of: batches of the user's own inputs, in constant memory."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeAlias

from scpl.data.loader import Inputs
from scpl.data.notes import Faults
from scpl.data.tables import LEFT_OUT, is_missing
from scpl.errors import DataError, InputError
from scpl.outside import shown

__all__ = [
    "STDIN",
    "Kept",
    "Named",
    "Pending",
    "Say",
    "check_kept",
    "check_rows",
    "kept",
    "open_stdin",
]

Named: TypeAlias = tuple[list[dict[str, Any]], Inputs]
"""What names each input, as columns, and a batch of them as the network takes it."""
Kept: TypeAlias = Mapping[str, str]
"""Cells of a table that are written beside what is predicted of its row, by column."""
Say: TypeAlias = Callable[[str], None]

_SHOWN = 60  # characters of an input in a message
STDIN = "-"
"""The input that stands for standard input."""


class Pending(ABC):
    """Inputs that are read as they are asked for.

    Attributes:
        total: How many there are; None if only reading them all would tell.
        waits: Whether some come from standard input, and may be long in coming.
    """

    total: int | None
    waits: bool

    @abstractmethod
    def batches(self, say: Say) -> Iterator[Named]:
        """Read them, once; what cannot be read is left out, counted and perhaps told to ``say``.

        Raises:
            DataError: if the rest cannot be read.
        """

    @abstractmethod
    def check(self, say: Say) -> None:
        """Tell at the end what was odd.

        Raises:
            DataError: if some were left out.
        """


def check_kept(keep: Sequence[str], others: Sequence[str]) -> None:
    """Check that columns are kept of tables alone; ``others`` are the inputs that are none.

    Raises:
        InputError: One is none.
    """
    if keep and others:
        raise InputError(
            "--keep is for inputs that are tables",
            f"Got --keep {' '.join(keep)}, and {shown(others[0])[:_SHOWN]!r}, which is none",
            "Leave it out, or give only tables",
        )
    if len(set(keep)) != len(keep):
        raise InputError("--keep must name each column once", f"Got {' '.join(keep)}")


def kept(keep: Sequence[str], cells: Sequence[Any]) -> Kept:
    """Write cells that are kept as texts, empty ones as empty texts."""
    pairs = zip(keep, cells, strict=True)
    return {name: "" if is_missing(cell) else str(cell) for name, cell in pairs}


def check_rows(faults: Faults) -> None:
    """Check that every row of the tables was there to be predicted of.

    Raises:
        DataError: Some were damaged.
    """
    lost = sum(map(faults.count, LEFT_OUT))
    if lost:
        raise DataError(
            "Every row must be readable",
            f"{lost} were not, as told above",
            "Correct or remove them; all others were classified",
        )


def open_stdin(what: str) -> BinaryIO:
    """Open standard input; at a terminal, say ``what`` is wanted."""
    if sys.stdin.isatty():
        sys.stderr.write(f"Reading {what} from the terminal, one per line, until Ctrl-D\n")
    # Not sys.stdin.buffer: Python waits for its lock at exit, and a thread may be reading.
    return open(sys.stdin.fileno(), "rb", closefd=False)
