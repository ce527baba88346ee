"""Ctrl-C and SIGTERM: finish the step, save, and say how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

__all__ = ["GracefulStop"]


class GracefulStop:
    """While active, the first signal only sets `received`; a second one ends at once.

    Args:
        notify: Called with the signal's name when the first one arrives.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.received: signal.Signals | None = None
        self._notify = notify
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> GracefulStop:
        # Only the main thread may install handlers; elsewhere the caller keeps its own.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        self._notify(self.received.name)
