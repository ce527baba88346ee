"""Start several processes on this machine, and again if one is lost: torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from types import FrameType, TracebackType

from scpl.app.config import TrainConfig
from scpl.engine.ranks import Control
from scpl.errors import InputError
from scpl.runs import RunFolder

__all__ = ["GracefulStop", "after_restart", "is_rank", "launch", "launcher"]

BAD_INPUT = 2
INTERRUPTED = (130, 143)


def is_rank() -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: list[str], processes: int, max_restarts: int) -> int:
    """Run ``scpl`` with the same arguments as several ranks, and wait for them.

    If a rank is lost, all are started again, and `after_restart` finds where they go on. Bad input
    and interruptions are no reason to: they would only come again.

    Args:
        arguments: What follows ``scpl``.
        processes: How many ranks.
        max_restarts: How often to restart them all if one fails.

    Returns:
        Exit status: 0, or that of the first rank that failed.
    """
    available = os.cpu_count() or 1
    if processes > 64 * available:
        raise InputError(
            "--processes must fit this machine", f"Got {processes} on {available} cores"
        )
    run_id = uuid.uuid4().hex
    for attempt in range(max_restarts + 1):
        status, again = _run_ranks(arguments, processes, run_id)
        if not again or attempt == max_restarts:
            break
        sys.stderr.write(f"scpl: restarting all processes ({attempt + 1} of {max_restarts})\n")
        sys.stderr.flush()
    return status


def _run_ranks(arguments: list[str], processes: int, run_id: str) -> tuple[int, bool]:
    """Run all ranks once; returns the exit status, and whether another attempt may help."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Our ranks tell the first cause themselves; the launcher would tell each consequence.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=run_id,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "scpl", *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if BAD_INPUT in codes:
            return BAD_INPUT, False
        if all(code in INTERRUPTED for code in codes):
            return codes[0], False
        return 1, True
    except SignalException as error:
        return 128 + int(error.sigval), False
    return 0, False


def launcher() -> str:
    """The launcher of this process and its restarts; empty without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{name}/{os.getppid()}" if name else ""


def after_restart(config: TrainConfig, control: Control) -> TrainConfig:
    """A run whose processes its launcher starts again goes on where it was; every rank calls it.

    Raises:
        InputError: if the run has no name to find it by.
    """
    if config.run.resume is not None or not launcher():
        return config
    if config.run.out is None:
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
            raise InputError("A run that may be restarted needs --out", "Got none")
        return config
    if control.mesh.is_first:
        # What another run left in a folder that is to be overwritten is nothing to go on from.
        folder = RunFolder(config.run.out)
        known = folder.environment.exists() and folder.config.exists()
        about = folder.read_json(folder.environment) if known else {}
        control.share("restarted", about.get("launcher") == launcher())
    return config.changed(resume=config.run.out) if control.fetch("restarted") else config


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
        self._callbacks: list[Callable[[str], None]] = []
        self._previous: dict[signal.Signals, object] = {}
        self._depth = 0
        self._time = 0.0
        self._listener = None if on_arrival is None else _Listener(on_arrival)

    def on_signal(self, callback: Callable[[str], None]) -> None:
        """Have ``callback`` called with the signal's name when the first one comes."""
        self._callbacks.append(callback)

    def __enter__(self) -> GracefulStop:
        self._depth += 1
        # Only the main thread may install handlers; elsewhere the caller keeps its own.
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
            if self._listener is not None:
                self._listener.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            if self._previous and self._listener is not None:
                self._listener.stop()
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


class _Listener:
    """Hears of signals when they arrive: the interpreter writes them into a pipe at once."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._thread: threading.Thread | None = None
        self._before = -1

    def start(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._write)
        assert self._thread is not None
        self._thread.join()
        os.close(self._read)

    def _run(self) -> None:
        while os.read(self._read, 64):
            self._act()
