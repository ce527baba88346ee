"""The processes of one variant, as the benchmark that starts them sees them.

They stay alive for the whole benchmark and train one block of steps each time they are told to, so
that variants can take turns every few seconds and a drift of the machine hits all of them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

JOB = Path(__file__).with_name("job.py")


@dataclass(frozen=True)
class Job:
    """What one variant trains, and how.

    Attributes:
        kind: ``bp`` (a plain loop), ``line`` (the engine) or ``alone`` (each process runs only its
            own stages, on a recorded input, and talks to nobody).
        work: The network and its data.
        method: The local objectives, where the network is cut.
        stages: How many stages the network is cut into.
        cuts: Names of the layers that stages begin with; empty: chosen by `scpl.split`.
        processes: How many processes.
        threads: Threads of each process.
        batch_size: Rows of a mini-batch.
        depth: Messages in flight on a link.
        warm: Steps of a block before the clock starts.
        steps: Steps of a block that are timed.
        cool: Steps after that, so that no rank is idle while another one is timed.
        checkpoint_every: Steps between checkpoints; 0: none.
        folder: Where checkpoints go.
        quick: A narrow network.
    """

    kind: str
    work: str = "transformer"
    method: str = "scpl"
    stages: int = 2
    cuts: tuple[str, ...] = ()
    processes: int = 1
    threads: int = 1
    batch_size: int = 64
    depth: int = 2
    warm: int = 1
    steps: int = 10
    cool: int = 0
    checkpoint_every: int = 0
    folder: str = ""
    quick: bool = False


class Team:
    """The processes of one variant.

    Args:
        job: What they do.
        address: Where ranks meet.
        prefixes: For each rank what its command line begins with (``ip netns exec ...``).
        environment: Variables for all of them.

    Raises:
        SystemExit: if a process ends; it has said why.
    """

    def __init__(
        self,
        job: Job,
        address: str = "127.0.0.1",
        prefixes: Sequence[Sequence[str]] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.job = job
        self._processes: list[subprocess.Popen[str]] = []
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": str(job.threads),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            **(environment or {}),
        }
        if job.processes > 1:  # what torchrun would set
            variables |= {
                "WORLD_SIZE": str(job.processes),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(_free_port()),
            }
        for rank in range(job.processes):
            prefix = prefixes[rank] if prefixes else ()
            command = [*prefix, sys.executable, str(JOB), json.dumps(asdict(job)), str(rank)]
            process = subprocess.Popen(
                command,
                env={**variables, "RANK": str(rank)} if job.processes > 1 else variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the parent, which ends them
            )
            self._processes.append(process)
        self._answers()  # ready

    def train_block(self) -> list[dict[str, Any]]:
        """Train one block of steps; return what every rank says of it."""
        everyone = self.job.kind == "alone"
        listeners = self._processes if everyone else self._processes[:1]
        self._tell(listeners, "go")
        answers = self._answers()
        if everyone:  # they go on until the slowest one is timed
            self._tell(listeners, "stop")
        return answers

    def processor_seconds(self) -> float:
        """Processor time that these processes have used so far."""
        ticks = 0
        for process in self._processes:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the processes: they finish when their input ends, or are killed."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def kill(self) -> None:
        """End the processes at once."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _tell(self, processes: Sequence[subprocess.Popen[str]], word: str) -> None:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{word}\n")
            process.stdin.flush()

    def _answers(self) -> list[dict[str, Any]]:
        return [self._answer(process) for process in self._processes]

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of {self.job.kind} ended with status {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Teams:
    """Teams by name; leaving the block ends all their processes."""

    def __init__(self) -> None:
        self.of: dict[str, Team] = {}

    def start(self, name: str, team: Team) -> None:
        """Add a team."""
        self.of[name] = team

    def __enter__(self) -> Teams:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        for team in self.of.values():
            team.close() if kind is None else team.kill()


class Load:
    """How busy the machine is with other things than one team.

    Args:
        team: The team that is measured from now on.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self._before = (*_processor_ticks(), team.processor_seconds())

    def cores(self) -> dict[str, float]:
        """Cores that others used since: other processes here, and other guests (steal)."""
        busy, stolen, total = (
            now - then for now, then in zip(_processor_ticks(), self._before[:3], strict=True)
        )
        ours = (self._team.processor_seconds() - self._before[3]) * os.sysconf("SC_CLK_TCK")
        scale = (os.cpu_count() or 1) / max(total, 1)
        return {"others": max(0.0, busy - ours) * scale, "steal": stolen * scale}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def shown(values: Mapping[str, float], digits: int = 3) -> str:
    """Write a spread."""
    middle, low, high = (f"{values[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"**{middle}** ({low} .. {high})"


def environment() -> dict[str, Any]:
    """Describe hardware and versions; torch comes late, since measuring does not need it."""
    import torch

    from scpl.run.environment import describe_environment

    return describe_environment(torch.device("cpu"), threads=1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _processor_ticks() -> tuple[float, float, float]:
    """Ticks of all cores so far: busy, stolen, all."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, idle, io_wait, irq, soft_irq, steal = map(float, fields)
    busy = user + nice + system + irq + soft_irq
    return busy, steal, busy + steal + idle + io_wait
