"""Ctrl-C and SIGTERM: finish the step, save, and say how to go on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

__all__ = ["GracefulStop"]

SAME_EVENT = 2.0
"""Seconds within which signals count as one: a terminal and a launcher both send Ctrl-C on."""


class GracefulStop:
    """While active, the first signal only sets `received`; a later one ends at once.

    It may be entered again while it is active; the outermost ``with`` counts.

    Attributes:
        received: The first signal, if one came.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._callbacks: list[Callable[[str], None]] = []
        self._previous: dict[signal.Signals, object] = {}
        self._depth = 0
        self._time = 0.0

    def on_signal(self, callback: Callable[[str], None]) -> None:
        """Have ``callback`` called with the signal's name when the first one comes."""
        self._callbacks.append(callback)

    def __enter__(self) -> GracefulStop:
        self._depth += 1
        # Only the main thread may install handlers; elsewhere the caller keeps its own.
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._time = signal.Signals(number), now
            for callback in self._callbacks:
                callback(self.received.name)
        elif now - self._time > SAME_EVENT:
            raise KeyboardInterrupt
