"""Start several processes on this machine, with torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import sys
import uuid

from scpl.errors import InputError

__all__ = ["is_rank", "launch"]


def is_rank() -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: list[str], processes: int, max_restarts: int) -> int:
    """Run ``scpl`` with the same arguments as several ranks, and wait for them.

    Args:
        arguments: What follows ``scpl``.
        processes: How many ranks.
        max_restarts: How often to restart them all if one fails.

    Returns:
        Exit status: 0, or that of the first rank that failed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    available = os.cpu_count() or 1
    if processes > 64 * available:
        raise InputError(
            "--processes must fit this machine", f"Got {processes} on {available} cores"
        )
    # Our ranks tell the first cause themselves; the launcher would tell each consequence.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "scpl", *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        own = [code for code in codes if code in (2, 130, 143)]
        return own[0] if own else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
