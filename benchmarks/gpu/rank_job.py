"""One rank of a small run, alone or beside others; `checks/ranks.py` starts it.

usage: rank_job.py JOB, where JOB is `Job` as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checks.base import Setup
from checks.subjects import deterministic, learn, make_pipeline, task_named

import scpl
from scpl.engine.ranks import OneRank, Ranks


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        device: "cpu", or "cuda:0" for all ranks, or "cuda" for a GPU of its own for each.
        tiny: As in `Setup`.
        method: The method.
        name: The network.
        backend: "gloo", "nccl", or None for what `scpl.connect` chooses.
        out: Where the last rank writes what it found.
        seconds: After which a rank ends itself, if nobody else did.
        killed: The rank that kills itself at the third step, as a machine would that is lost.
    """

    device: str
    tiny: bool
    method: str
    name: str
    backend: str | None
    out: str
    seconds: int
    killed: int | None = None

    def learn(self, ranks: Ranks | None = None) -> dict[str, Any]:
        """Train, on these ranks or alone."""
        setup = Setup(self.device, self.tiny, Path(self.out))
        task = task_named(self.name, setup)
        ranks = ranks or OneRank(self.device)
        with (
            deterministic(),
            make_pipeline(task, self.method, self.device, ranks=ranks) as pipeline,
        ):
            if self.killed is not None:
                self._die_in(pipeline, task.batches)
            learned = learn(pipeline, task.batches)
            return {"losses": learned.losses, "weights": learned.weights}

    def _die_in(self, pipeline: scpl.Pipeline, batches: Any) -> None:
        for _ in pipeline.steps(batches):
            if pipeline.mesh.rank == self.killed and pipeline.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run one rank."""
    job = Job(**json.loads(sys.argv[1]))
    signal.alarm(job.seconds)
    if job.device == "cuda":
        job = Job(**{**vars(job), "device": f"cuda:{os.environ['LOCAL_RANK']}"})
    torch.backends.cudnn.allow_tf32 = False
    wanted = {} if job.backend is None else {"backend": job.backend}
    ranks = scpl.connect(job.device, timeout=20.0, **wanted)
    backend = dist.get_backend() if dist.is_initialized() else "none"
    found = {**job.learn(ranks), "backend": backend}
    if ranks.mesh.is_last:
        torch.save(found, Path(job.out) / "found.pt")
    ranks.close()


if __name__ == "__main__":
    main()
