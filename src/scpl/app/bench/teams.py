"""Processes that a benchmark starts once and wakes in turns.

They stay alive for the whole benchmark and work on one block of steps each time they are told to,
so that rivals can take turns every few seconds and a drift of the machine hits all of them. Orders
are lines on their stdin, answers are lines of JSON on their stdout; see `scpl.app.bench.orders`
for the other side. Should the benchmark vanish, their stdin ends, and so do they.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from scpl.errors import LinkError, ScplError

__all__ = ["Team", "Teams", "Unable"]

SECONDS_TO_END = 10.0
FROM_A_LAUNCHER = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


class Unable(ScplError):
    """A team cannot do its job; it has said why."""


class Team:
    """The processes of one rival.

    Args:
        name: For messages.
        command: What each of them runs.
        processes: How many; several become ranks, as if torchrun had started them.
        threads: Threads of each.
        address: Where ranks meet.
        prefixes: For each rank what its command line begins with (``ip netns exec ...``).
        environment: Variables for all of them.
        everyone: Give orders to all of them, not only to the first rank, which wakes the others.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        processes: int = 1,
        threads: int = 1,
        address: str = "127.0.0.1",
        prefixes: Sequence[Sequence[str]] = (),
        environment: Mapping[str, str] | None = None,
        everyone: bool = False,
    ) -> None:
        self.name, self._everyone = name, everyone
        self._processes: list[subprocess.Popen[str]] = []
        common = {key: value for key, value in os.environ.items() if key not in FROM_A_LAUNCHER}
        common |= {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        common |= environment or {}
        if processes > 1:
            common |= {
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(_free_port()),
            }
        try:
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
                prefix = prefixes[rank] if prefixes else ()
                self._processes.append(_start([*prefix, *command], common | own))
        except BaseException:
            self.kill()  # nobody else knows of them yet
            raise

    def work(self, order: str = "go") -> list[dict[str, Any]]:
        """Give an order; return what every rank says when it is done.

        Raises:
            Unable: if the team cannot do it.
            LinkError: if one of them was killed.
        """
        self.tell(order)
        return self.answers()

    def tell(self, order: str) -> None:
        """Give an order that nobody answers."""
        for process in self._processes if self._everyone else self._processes[:1]:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended: reading its answer tells why
                process.stdin.write(f"{order}\n")
                process.stdin.flush()

    def answers(self) -> list[dict[str, Any]]:
        """Wait until every process has said one thing.

        Raises:
            Unable: if the team cannot do its job.
            LinkError: if one of them was killed.
        """
        found: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as waiting:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                waiting.register(process.stdout, selectors.EVENT_READ, rank)
            while waiting.get_map():
                for key, _ in waiting.select():
                    rank = key.data
                    waiting.unregister(key.fileobj)
                    # Every process says one line per order, so none is left in a buffer.
                    line = self._processes[rank].stdout.readline()
                    if line:
                        found[rank] = self._read(line)
                    else:
                        self._check_killed(rank)
        if len(found) < len(self._processes):
            raise self._lost("ended without a word")
        return [found[rank] for rank in sorted(found)]

    def processor_seconds(self) -> float:
        """Processor time that these processes have used so far (Linux).

        Raises:
            OSError: where there is no ``/proc``.
        """
        ticks = 0
        for process in self._processes:
            with open(f"/proc/{process.pid}/stat", encoding="utf-8") as file:
                fields = file.read().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """End the processes at once: nothing that they have done is needed any more."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):
                    pipe.close()

    def _read(self, line: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Unable(answer["failed"])
        return answer

    def _check_killed(self, rank: int) -> None:
        """A process that ends by itself leaves the word to the rank that failed first."""
        process = self._processes[rank]
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(SECONDS_TO_END)
            if status < 0:
                name = signal.Signals(-status).name
                raise self._lost(f"(process {process.pid}) was killed by {name}")

    def _lost(self, how: str) -> LinkError:
        return LinkError(
            "The processes of a benchmark must stay until its end",
            f"One of {self.name} {how}",
            "If memory ran out, compare fewer methods at once or use a smaller batch",
        )


class Teams:
    """Teams by name; leaving the block ends all their processes."""

    def __init__(self) -> None:
        self._teams: dict[str, Team] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._teams

    def __getitem__(self, name: str) -> Team:
        return self._teams[name]

    def start(self, name: str, team: Team) -> list[dict[str, Any]]:
        """Take over a team that was started, and wait until it is ready.

        Returns:
            What every rank says first.

        Raises:
            Unable: if it cannot do its job; its processes are ended.
            LinkError: if one of them was killed.
        """
        self._teams[name] = team  # from here on they end with this block
        try:
            return team.answers()
        except Unable:
            self.drop(name)
            raise

    def drop(self, name: str) -> None:
        """End a team before the others."""
        self._teams.pop(name).kill()

    def __enter__(self) -> Teams:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        for team in self._teams.values():
            team.kill()


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the benchmark, which ends them
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
