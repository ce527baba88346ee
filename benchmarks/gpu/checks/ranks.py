"""Several ranks: two that share a GPU, the NCCL library, and a GPU for each where there are two."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_job import Job

import scpl
from checks.base import Differs, Setup, Skipped, check, distance, require
from scpl.engine.local import local_ranks

FILE = Path(__file__).parents[1] / "rank_job.py"
TO_END = 5.0
"""Seconds between the time that ranks get and the end of the check, to end them all."""


def job_of(setup: Setup, method: str, name: str, **settings: Any) -> Job:
    """A job for ranks that share the device, and talk over gloo."""
    device = "cuda:0" if setup.device == "cuda" else "cpu"
    backend = "gloo" if setup.device == "cuda" else None
    seconds = int(setup.limit - TO_END)
    wanted = {"device": device, "backend": backend, **settings}
    return Job(
        tiny=setup.tiny, method=method, name=name, out=str(setup.folder), seconds=seconds, **wanted
    )


def needs_gloo(setup: Setup) -> None:
    """Two ranks can share a GPU only over gloo.

    Raises:
        Skipped: if that cannot be asked for.
    """
    if setup.device == "cuda" and "backend" not in inspect.signature(scpl.connect).parameters:
        raise Skipped("scpl.connect has no argument backend, so ranks cannot share a GPU")


@check(
    "shared",
    {
        f"{method}-{name}": {"method": method, "name": name}
        for method, name in (
            *(("scpl", name) for name in ("small-cnn", "transformer")),
            *(("early-exit", "transformer"), ("al", "small-cnn")),
        )
    },
    limit=90.0,
)
def shared(setup: Setup, method: str, name: str) -> str:
    """Two ranks on one device, over gloo, compute what one computes, bit for bit."""
    needs_gloo(setup)
    job = job_of(setup, method, name)
    alone = job.learn()
    found = run_ranks(job, setup)
    losses, weights = (distance(found[key], alone[key]) for key in ("losses", "weights"))
    text = f"losses {losses:.1e} and weights {weights:.1e} apart, over {found['backend']}"
    require(losses == weights == 0, f"{text}; they must be equal bit for bit")
    return f"{text}; {len(found['losses'][0])} steps x {len(found['losses'])} stages"


@check("shared-by-default", needs_cuda=True)
def shared_by_default(setup: Setup) -> str:
    """Who asks for no backend gets gloo where two ranks share a GPU."""
    needs_gloo(setup)
    found = run_ranks(job_of(setup, "early-exit", "mlp", backend=None), setup)
    require("nccl" not in found["backend"], f"it must not be NCCL; it is {found['backend']}")
    return f"{len(found['losses'][0])} steps over {found['backend']}"


@check("shared-ddp", tolerance=2e-2)
def shared_ddp(setup: Setup) -> str:
    """Two replicas on one device, over gloo, learn what bp learns on one rank."""
    needs_gloo(setup)
    alone = job_of(setup, "bp", "transformer").learn()
    found = run_ranks(job_of(setup, "ddp", "transformer"), setup)
    text = setup.near("losses", distance(found["losses"], alone["losses"]))
    return f"{text}, over {found['backend']}"


@check("shared-killed", {"first": {"killed": 0}, "last": {"killed": 1}})
def killed(setup: Setup, killed: int) -> str:
    """When a rank is killed the other one says which, and ends."""
    needs_gloo(setup)
    begin = time.monotonic()
    ended = start_ranks(job_of(setup, "scpl", "mlp", killed=killed), setup)
    status, told = ended[1 - killed]
    require(status > 0, f"the other rank must end with an error; it ended with {status}")
    verdict = f"Rank {killed} (process"
    require(verdict in told, f"it must say {verdict!r}; it said: {told[-600:]}")
    return f"rank {1 - killed} blamed rank {killed} and ended in {time.monotonic() - begin:.1f} s"


@check("nccl-alone", needs_cuda=True)
def nccl_alone(setup: Setup) -> str:
    """NCCL starts on this machine: a group of one rank, and a sum over it."""
    device = torch.device("cuda:0")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        value = torch.arange(4.0, device=device)
        dist.all_reduce(value)
        require(value.tolist() == [0.0, 1.0, 2.0, 3.0], f"a sum of one must be itself: {value}")
    finally:
        dist.destroy_process_group()
    return f"all_reduce of one rank, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"


@check(
    "torchrun",
    {
        f"{method}-{name}": {"method": method, "name": name}
        for method, name in (
            *(("scpl", name) for name in ("small-cnn", "transformer")),
            *((method, "transformer") for method in ("ddp", "bp-cut", "gpipe", "1f1b")),
        )
    },
    tolerance=2e-2,
    limit=120.0,
)
def torchrun(setup: Setup, method: str, name: str) -> str:
    """Two ranks of torchrun, with a GPU each over NCCL, learn what one rank learns."""
    if setup.device == "cuda" and torch.cuda.device_count() < 2:
        raise Skipped(f"it needs two GPUs; here is {torch.cuda.device_count()}")
    expected = job_of(setup, "scpl" if method == "scpl" else "bp", name).learn()
    job = job_of(setup, method, name, device=setup.device, backend=None)
    found = run_ranks(job, setup, torchrun=True)
    # However many stages end-to-end methods have, there is one loss: that of the last one.
    losses = found["losses"] if method == "scpl" else found["losses"][-1:]
    text = setup.near("losses", distance(losses, expected["losses"]))
    return f"{text}; {len(losses[0])} steps over {found['backend']}"


def run_ranks(job: Job, setup: Setup, *, torchrun: bool = False) -> dict[str, Any]:
    """Run two ranks; returns what the last one found.

    Raises:
        Differs: if one of them fails.
    """
    ended = (launch_ranks if torchrun else start_ranks)(job, setup)
    for status, told in ended:
        require(status == 0, f"a rank ended with status {status}: {told[-1500:]}")
    found: dict[str, Any] = torch.load(Path(job.out) / "found.pt")
    return found


def start_ranks(job: Job, setup: Setup) -> list[tuple[int, str]]:
    """Start two ranks as a launcher would, but faster; returns how each ended, and what it said."""
    with local_ranks(2) as places:
        return _run([[sys.executable, str(FILE)]] * 2, places, job, setup)


def launch_ranks(job: Job, setup: Setup) -> list[tuple[int, str]]:
    """Start two ranks by torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return _run([[*launcher, "--nproc-per-node", "2", str(FILE)]], [{}], job, setup)


def _run(
    commands: Sequence[list[str]], places: Sequence[dict[str, str]], job: Job, setup: Setup
) -> list[tuple[int, str]]:
    """Run processes side by side until all have ended; none is left in any case."""
    processes = []
    told = [setup.folder / f"told-{number}" for number in range(len(commands))]
    try:
        for command, place, file in zip(commands, places, told, strict=True):
            with file.open("wb") as out:
                processes.append(
                    subprocess.Popen(
                        [*command, json.dumps(asdict(job))], stdout=out, stderr=out,
                        env={**os.environ, **place},
                    )
                )  # fmt: skip
        deadline = time.monotonic() + job.seconds
        for process in processes:
            process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired as error:
        said = "\n".join(file.read_text(errors="replace")[-1000:] for file in told)
        raise Differs(f"ranks must end within {job.seconds} s; they said: {said}") from error
    finally:
        for process in processes:
            process.terminate()  # a launcher ends its ranks
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(TO_END / 2)
            process.kill()
            process.wait()
    return [
        (process.returncode, file.read_text(errors="replace"))
        for process, file in zip(processes, told, strict=True)
    ]
