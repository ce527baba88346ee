"""Start several processes on this machine, and again if one is lost: torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import sys
import uuid

from scpl.app.config import TrainConfig
from scpl.engine.ranks import Ranks
from scpl.errors import InputError
from scpl.runs import RunFolder

__all__ = ["after_restart", "is_rank", "launch", "launcher"]

BAD_INPUT = 2
INTERRUPTED = (130, 143)


def is_rank() -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: list[str], processes: int, max_restarts: int) -> int:
    """Run ``scpl`` with the same arguments as several ranks, and wait for them.

    If a rank is lost, all are started again, and `after_restart` finds where they go on. Bad input
    and interruptions are no reason to: they would only come again.

    Returns:
        Exit status: 0, or that of the first rank that failed.

    Raises:
        InputError: if there are too many for this machine.
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


def after_restart(config: TrainConfig, ranks: Ranks) -> TrainConfig:
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
    if ranks.mesh.is_first:
        # What another run left in a folder that is to be overwritten is nothing to go on from.
        folder = RunFolder(config.run.out)
        known = folder.environment.exists() and folder.config.exists()
        about = folder.read_json(folder.environment) if known else {}
        ranks.share("restarted", about.get("launcher") == launcher())
    return config.changed(resume=config.run.out) if ranks.fetch("restarted") else config
