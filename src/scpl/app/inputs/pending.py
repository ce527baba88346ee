"""What is to be predicted of: batches of the user's own inputs, in constant memory."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeAlias

from scpl.data.loader import Inputs

__all__ = ["STDIN", "Named", "Pending", "Say", "open_stdin"]

Named: TypeAlias = tuple[list[dict[str, Any]], Inputs]
"""What names each input, as columns, and a batch of them as the network takes it."""
Say: TypeAlias = Callable[[str], None]

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


def open_stdin(what: str) -> BinaryIO:
    """Open standard input; at a terminal, say ``what`` is wanted."""
    if sys.stdin.isatty():
        sys.stderr.write(f"Reading {what} from the terminal, one per line, until Ctrl-D\n")
    # Not sys.stdin.buffer: Python waits for its lock at exit, and a thread may be reading.
    return open(sys.stdin.fileno(), "rb", closefd=False)
