"""Ctrl-C, SIGTERM and a closed terminal: what a command does when it is told to end."""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

from scpl.errors import Interrupted

__all__ = [
    "LAUNCHER",
    "GracefulStop",
    "Unbroken",
    "die_with_launcher",
    "end_signals",
    "outlive_launcher",
]

LAUNCHER = "SCPL_LAUNCHER"
"""The environment variable with the process number of the launcher of this process."""
_SET_SIGNAL_OF_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG of Linux's prctl


@contextmanager
def end_signals(receive: Callable[[signal.Signals], None]) -> Iterator[bool]:
    """Have signals to end handled by one function; the handlers before come back.

    They are Ctrl-C (SIGINT), SIGTERM and a closed terminal (SIGHUP, unless it is ignored, as under
    ``nohup``).

    Args:
        receive: Called in the main thread with the signal. What it raises is raised wherever the
            main thread is.

    Yields:
        Whether signals are handled: only the main thread may install handlers, elsewhere the
        caller keeps its own.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        receive(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():
        yield False
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Write to nowhere what would go to the terminal: it is closed, and a write would fail."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


SAME_EVENT = 2.0
"""Seconds within which signals count as one: a terminal and a launcher both send Ctrl-C on."""


class GracefulStop:
    """While active, the first signal only sets `received`; a later one ends at once.

    It may be entered again while it is active; the outermost ``with`` counts.

    Args:
        on_arrival: Called from a thread of its own as soon as a signal arrives. Python itself
            handles signals between two steps of the main thread, which may be blocked in a send
            or a receive that only ends when something is done about a dead rank.

    Attributes:
        received: The first signal, if one came.
    """

    def __init__(self, on_arrival: Callable[[], None] | None = None) -> None:
        self.received: signal.Signals | None = None
        self._callbacks: list[Callable[[signal.Signals], None]] = []
        self._active = ExitStack()
        self._depth = 0
        self._time = 0.0
        self._on_arrival = on_arrival

    def on_signal(self, callback: Callable[[signal.Signals], None]) -> None:
        """Have ``callback`` called with the first signal when it comes."""
        self._callbacks.append(callback)

    def __enter__(self) -> GracefulStop:
        self._depth += 1
        if self._depth == 1:
            handled = self._active.enter_context(end_signals(self._receive))
            if handled and self._on_arrival is not None:
                self._active.enter_context(_on_arrival(self._on_arrival))
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._active.close()

    def _receive(self, received: signal.Signals) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._time = received, now
            for callback in self._callbacks:
                callback(received)
        elif now - self._time > SAME_EVENT:
            raise KeyboardInterrupt


class Unbroken:
    """While active, a signal to end raises `Interrupted` wherever the main thread is.

    Only what is done within `unbroken` is finished first, unless a second signal comes: it may
    be blocked.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._time = 0.0
        self._inside = False
        self._active = ExitStack()

    def __enter__(self) -> Unbroken:
        self._active.enter_context(end_signals(self._receive))
        return self

    def __exit__(self, *_: object) -> None:
        self._active.close()

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """Finish what is within before a signal counts."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
        if self._received is not None:
            raise _interrupted(self._received)

    def _receive(self, received: signal.Signals) -> None:
        first, now = self._received is None, time.monotonic()
        if first:
            self._received, self._time = received, now
        # The second of a pair would break off what the first has begun to end.
        if (first and not self._inside) or now - self._time > SAME_EVENT:
            raise _interrupted(received)


def _interrupted(received: signal.Signals) -> Interrupted:
    error = Interrupted("Interrupted")
    error.signal = int(received)
    return error


@contextmanager
def _on_arrival(act: Callable[[], None]) -> Iterator[None]:
    """Hear of signals when they arrive: the interpreter writes them into a pipe at once."""
    read, write = os.pipe()
    os.set_blocking(write, False)

    def listen() -> None:
        while os.read(read, 64):
            act()

    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)
        thread.join()
        os.close(read)


def die_with_launcher() -> None:
    """Have this process killed if its launcher dies while it starts.

    Until it has met the other ranks it would not notice, and wait for them for minutes. Does
    nothing without a launcher of ours, and on systems other than Linux.
    """
    launcher = os.environ.get(LAUNCHER, "")
    if launcher and sys.platform == "linux":
        _on_parents_death(signal.SIGKILL)
        if os.getppid() != int(launcher):  # it died before that
            sys.stderr.write("scpl: The launcher of this process is gone.\n")
            os._exit(1)


def outlive_launcher() -> None:
    """End what `die_with_launcher` began: from now on the ranks watch over each other."""
    # Programs that this one starts have it as their parent.
    if os.environ.pop(LAUNCHER, "") and sys.platform == "linux":
        _on_parents_death(0)


def _on_parents_death(number: int) -> None:
    ctypes.CDLL(None).prctl(_SET_SIGNAL_OF_PARENTS_DEATH, number)
