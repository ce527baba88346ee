"""Processes that a benchmark starts once and wakes in turns.

They stay alive for the whole benchmark and train one block of steps each time they are woken, so
that methods can alternate every few seconds and a drift of the machine hits all of them. Each is a
function ``serve(connection, plan)`` in a process that `multiprocessing` spawns: it sends the cuts
of its network when it is ready, and a `Timing` for everything that it receives.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, TypeAlias

from scpl.engine.local import variables
from scpl.errors import LinkError, ScplError, StageError

if TYPE_CHECKING:
    from scpl.engine.ranks import Ranks

__all__ = ["CannotRun", "Serve", "Timing", "Workers", "sending_failures"]

SECONDS_TO_END = 10.0
Serve: TypeAlias = Callable[[Connection, Any], None]


class CannotRun(ScplError):
    """A method cannot run here; its message says why."""


@dataclass(frozen=True)
class Timing:
    """What a block took in one process.

    Attributes:
        seconds: Of the timed steps.
        steps: All steps of the block, those before and after the timed ones included.
        peak_memory_bytes: Of this process so far.
        bytes_per_step: Sent to the next rank.
        shares: Share of the time of each activity, where that is known.
        losses: Of every step, summed over stages, where they are known.
    """

    seconds: float
    steps: int
    peak_memory_bytes: int
    bytes_per_step: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)
    losses: Mapping[int, float] = field(default_factory=dict)


class Workers:
    """The processes of one method: ranks, as torchrun would start them on this machine.

    Args:
        name: For messages.
        serve: What each of them runs: a function that can be imported.
        plan: Its second argument.
        processes: How many.
        threads: Threads of each.

    Attributes:
        cuts: Names of the layers that later stages begin with, when the processes are ready.
    """

    def __init__(
        self, name: str, serve: Serve, plan: object, *, processes: int = 1, threads: int = 1
    ) -> None:
        self.name = name
        self.cuts: tuple[str, ...] = ()
        self._serve, self._plan, self._num_processes = serve, plan, processes
        self._environment = {"OMP_NUM_THREADS": str(threads)}
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []

    def start(self) -> None:
        """Start the processes, and wait until all of them are ready.

        Raises:
            CannotRun: if one of them says that it cannot.
            LinkError: if one of them was killed.
        """
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        for place in variables(self._num_processes, port):
            ours, theirs = context.Pipe()
            arguments = (self._serve, theirs, self._plan)
            process = context.Process(target=_run, args=arguments, daemon=True)
            self._connections.append(ours)
            self._processes.append(process)
            # Here, not over there: torch reads it while it is imported.
            with theirs, _environment({**self._environment, **place}):
                process.start()
        self.cuts = self._receive()[-1]

    def train(self, order: object = None) -> list[Timing]:
        """Have a block trained; return what it took on every rank. It raises as `start` does.

        Args:
            order: What every process receives.
        """
        self.wake(order)
        return self._receive()

    def wake(self, order: object = None) -> None:
        """Send every process something."""
        for connection in self._connections:
            with suppress(ConnectionError):  # it has ended: what it sent before tells why
                connection.send(order)

    def _receive(self) -> list[Any]:
        """Receive one thing from every process."""
        found: dict[int, Any] = {}
        ranks: dict[Any, int] = {c: rank for rank, c in enumerate(self._connections)}
        lost = False
        while ranks:
            # Who is left when one is lost ends soon, or hangs, and would be waited for for ever.
            ready = wait(list(ranks), SECONDS_TO_END if lost else None)
            if not ready:
                break
            for connection in ready:
                rank = ranks.pop(connection)
                try:
                    found[rank] = self._connections[rank].recv()
                except (EOFError, ConnectionError):
                    self._check_killed(self._processes[rank])
                    lost = True
                else:
                    if isinstance(found[rank], CannotRun):
                        raise found[rank]
        if len(found) < len(self._processes):
            raise self._lost("ended without a word")
        return [found[rank] for rank in sorted(found)]

    def _check_killed(self, process: BaseProcess) -> None:
        """A process that ends by itself leaves the word to the rank that failed first."""
        process.join(SECONDS_TO_END)
        if process.exitcode is not None and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            raise self._lost(f"(process {process.pid}) was killed by {name}")

    def _lost(self, how: str) -> LinkError:
        return LinkError(
            "The processes of a benchmark must stay until its end",
            f"One of {self.name} {how}",
            "If memory ran out, compare fewer methods at once or use a smaller batch",
        )

    def processor_ticks(self) -> int:
        """Processor time that these processes have used so far (Linux).

        Raises:
            OSError: where there is no ``/proc``.
        """
        ticks = 0
        for process in self._processes:
            with open(f"/proc/{process.pid}/stat", encoding="utf-8") as file:
                user, system = file.read().rpartition(")")[2].split()[11:13]
            ticks += int(user) + int(system)
        return ticks

    def kill(self) -> None:
        """End the processes at once: nothing that they have done is needed any more."""
        started = [process for process in self._processes if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()
        for connection in self._connections:
            connection.close()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Give processes that are started meanwhile other variables."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(serve: Serve, connection: Connection, plan: object) -> None:
    """Be one of the processes, until the benchmark ends it or is gone itself."""
    os.setsid()  # Ctrl-C is for the benchmark, which ends this process
    os.dup2(2, 1)  # stdout is for what the benchmark has found
    threading.Thread(target=_end_with_benchmark, daemon=True).start()
    with sending_failures(connection):
        serve(connection, plan)


def _end_with_benchmark() -> None:
    _benchmark().join()
    os._exit(1)


def _benchmark() -> Any:
    return multiprocessing.parent_process()


@contextmanager
def sending_failures(connection: Connection, ranks: Ranks | None = None) -> Iterator[None]:
    """Have an error inside sent to the benchmark, and end this process with it.

    Args:
        connection: To the benchmark.
        ranks: All ranks: only the one that fails first tells why.
    """
    try:
        yield
    except Exception as error:
        if not _benchmark().is_alive():
            os._exit(1)
        expected = isinstance(error, ScplError)
        if not expected or isinstance(error, StageError):
            traceback.print_exc()
        prefix = "" if expected else f"{type(error).__name__}: "
        try:
            # A broken link learns what broke it while its rank looks for the first cause.
            if ranks is None or ranks.fail(error, f"{prefix}{error}"):
                connection.send(CannotRun(f"{prefix}{error}"))
        finally:
            # Threads of this process may be blocked in receives that nobody will answer.
            sys.stderr.flush()
            os._exit(1)
