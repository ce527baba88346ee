"""Start several processes on this machine, with torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from pathlib import Path

from scpl.errors import InputError

__all__ = ["is_rank", "launch"]

BAD_INPUT = 2
INTERRUPTED = (130, 143)


def is_rank() -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: list[str], processes: int, max_restarts: int, folder: Path) -> int:
    """Run ``scpl`` with the same arguments as several ranks, and wait for them.

    If a rank is lost, all are started again and go on from the newest checkpoint. Bad input and
    interruptions are no reason to: they would only come again.

    Args:
        arguments: What follows ``scpl``.
        processes: How many ranks.
        max_restarts: How often to restart them all if one fails.
        folder: The run folder, to continue from.

    Returns:
        Exit status: 0, or that of the first rank that failed.
    """
    available = os.cpu_count() or 1
    if processes > 64 * available:
        raise InputError(
            "--processes must fit this machine", f"Got {processes} on {available} cores"
        )
    before = _identity(folder)
    for attempt in range(max_restarts + 1):
        status, again = _run_ranks(arguments, processes)
        if not again or attempt == max_restarts:
            break
        # What another run left in a folder that is to be overwritten is nothing to go on from.
        if _identity(folder) not in (None, before) and "--resume" not in arguments:
            arguments = [*arguments, "--resume", str(folder)]
        sys.stderr.write(f"scpl: restarting all processes ({attempt + 1} of {max_restarts})\n")
        sys.stderr.flush()
    return status


def _run_ranks(arguments: list[str], processes: int) -> tuple[int, bool]:
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
        run_id=uuid.uuid4().hex,
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


def _identity(folder: Path) -> tuple[int, int] | None:
    """Tell runs in the same folder apart."""
    try:
        found = (folder / "config.toml").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
