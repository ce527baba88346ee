"""What a run uses while it trains: memory of each process, and how long each stage waits.

Every rank measures itself. At the end of an epoch the others leave their numbers in the control's
store, which costs them a message to the launcher and makes nobody wait; the last rank, which is
behind all others in the stream, finds them there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from scpl.pipeline import Pipeline
from scpl.run.environment import peak_memory

__all__ = ["Meter", "Usage"]


@dataclass(frozen=True)
class Usage:
    """What the processes use.

    Attributes:
        memory: Peak memory of each process in bytes.
        waits: For each stage the share of the epoch that its process waited, 0 .. 1; nothing if
            there is one process, which has nobody to wait for.
    """

    memory: tuple[int, ...] = ()
    waits: tuple[float, ...] = ()


class Meter:
    """Measures this rank, and on the last rank knows all.

    Args:
        pipeline: The pipeline of this rank.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._others: list[dict[str, float]] = []
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Measure waiting from now on."""
        self._since = time.perf_counter()
        self._waited = self._pipeline.timeline.seconds().get("wait", 0.0)

    def end_epoch(self, epoch: int) -> None:
        """Take the measure of an epoch's training, and tell the last rank."""
        self._own = self._measure()
        mesh = self._pipeline.mesh
        if not mesh.is_last:
            self._pipeline.control.share(f"usage/{epoch}/{mesh.rank}", self._own)

    def collect(self, epoch: int) -> Usage:
        """On the last rank: put together what all ranks measured in an epoch."""
        fetch, mesh = self._pipeline.control.fetch, self._pipeline.mesh
        self._others = [fetch(f"usage/{epoch}/{rank}") for rank in range(mesh.num_ranks - 1)]
        return self._together(self._own)

    def live(self) -> Usage:
        """On the last rank: its own numbers of this moment, and those of others as last told."""
        if len(self._others) + 1 < self._pipeline.mesh.num_ranks:
            return Usage((int(self._measure()["memory"]),))
        return self._together(self._measure())

    def _measure(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        waited = self._pipeline.timeline.seconds().get("wait", 0.0) - self._waited
        return {
            "memory": peak_memory(self._pipeline.device),
            "wait": waited / seconds if seconds > 0 else 0.0,
            "stages": len(self._pipeline.stages),
        }

    def _together(self, own: dict[str, float]) -> Usage:
        every = [*self._others, own]
        memory = tuple(int(one["memory"]) for one in every)
        if len(every) == 1:
            return Usage(memory)
        return Usage(memory, tuple(one["wait"] for one in every for _ in range(int(one["stages"]))))
