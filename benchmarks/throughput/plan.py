"""What one variant trains, and how; written by the benchmarks, read by `job.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scpl.app.bench.teams import Team
from scpl.app.bench.turns import Answers

JOB = Path(__file__).with_name("job.py")


@dataclass(frozen=True)
class Job:
    """What one variant trains, and how.

    Attributes:
        kind: ``engine`` (a `scpl.Pipeline`), ``bp`` (a plain loop), ``ddp`` (a plain loop around
            DistributedDataParallel) or ``alone`` (each process runs only its own stages, on a
            recorded input, and talks to nobody).
        work: The network and its data.
        method: Name of the engine's method.
        micro_batches: Slices of a mini-batch, for methods that have any.
        stages: How many stages the network is cut into.
        cuts: Names of the layers that stages begin with; empty: chosen by `scpl.split`.
        processes: How many processes.
        threads: Threads of each process.
        batch_size: Rows of a mini-batch, of all processes together.
        depth: Messages in flight on a link.
        steps: Steps of a block that are timed.
        checkpoint_every: Steps between checkpoints; 0: none.
        folder: Where checkpoints go.
        quick: A narrow network.
    """

    kind: str = "engine"
    work: str = "transformer"
    method: str = "scpl"
    micro_batches: int = 1
    stages: int = 2
    cuts: tuple[str, ...] = ()
    processes: int = 1
    threads: int = 1
    batch_size: int = 64
    depth: int = 2
    steps: int = 10
    checkpoint_every: int = 0
    folder: str = ""
    quick: bool = False

    @classmethod
    def read(cls, text: str) -> Job:
        """Undo `write`."""
        fields = json.loads(text)
        return cls(**{**fields, "cuts": tuple(fields["cuts"])})

    def write(self) -> str:
        """As an argument of `job.py`."""
        return json.dumps(asdict(self))


def team_of(
    name: str,
    job: Job,
    *,
    address: str = "127.0.0.1",
    prefixes: Sequence[Sequence[str]] = (),
    environment: Mapping[str, str] | None = None,
) -> Team:
    """Start the processes of a variant; see `Team`."""
    return Team(
        name,
        [sys.executable, str(JOB), job.write()],
        processes=job.processes,
        threads=job.threads,
        address=address,
        prefixes=prefixes,
        environment=environment,
        everyone=job.kind in ("alone", "ddp"),
    )


def work(team: Team, job: Job) -> tuple[float, Answers]:
    """Have a team train a block; return samples per second and what every rank says."""
    answers = team.work()
    if job.kind == "alone":  # they go on until the slowest one is timed, which counts
        team.tell("stop")
        seconds = max(answer["seconds"] for answer in answers)
    else:
        seconds = answers[-1]["seconds"]  # the last rank's clock
    return job.steps * job.batch_size / seconds, answers
