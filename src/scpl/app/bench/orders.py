"""The side of `scpl.app.bench.teams` that works: one process takes orders, and answers each."""

from __future__ import annotations

import json
import os
import select
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scpl.engine.ranks import Ranks
from scpl.errors import ScplError, StageError

__all__ = ["Orders"]


class Orders:
    """Reads orders from stdin and answers on stdout.

    Whatever else this process prints goes to stderr from here on.
    """

    def __init__(self) -> None:
        sys.stdout.flush()
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def __iter__(self) -> Iterator[str]:
        """Wait for the next order; ends when the benchmark does."""
        while order := sys.stdin.readline():
            yield order.strip()

    def waiting(self) -> bool:
        """Whether there is an order, or no more will come."""
        return bool(select.select([sys.stdin], [], [], 0)[0])

    def answer(self, **values: Any) -> None:
        """Say one thing, in JSON values."""
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()

    @contextmanager
    def reporting(self, ranks: Ranks | None = None) -> Iterator[None]:
        """Have an error inside answered, and end this process with it.

        Args:
            ranks: The tie to the other ranks: only the one that fails first tells why.
        """
        try:
            yield
        except BrokenPipeError:
            os._exit(1)  # the benchmark is gone
        except Exception as error:
            if isinstance(error, StageError) or not isinstance(error, ScplError):
                traceback.print_exc()
            kind = "" if isinstance(error, ScplError) else f"{type(error).__name__}: "
            try:
                # A broken link learns what broke it while the ranks looks for the first cause.
                if ranks is None or ranks.fail(error, f"{kind}{error}"):
                    self.answer(failed=f"{kind}{error}")
            finally:
                # Threads of this process may be blocked in receives that nobody will answer.
                sys.stderr.flush()
                os._exit(1)
