"""What messages cost a machine of one core: measured between two ends of gloo in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from statistics import median
from typing import Any

import torch
from torch.distributed import HashStore, PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]

from scpl.errors import LinkError
from scpl.simulation.machines import MessageCosts

__all__ = ["measure_messages"]

VISITS, EXCHANGES = 5, 4
SMALL, LARGE = 4, 2**20
PATIENCE = timedelta(seconds=60)
_ADDRESS = "127.0.0.1"  # this machine alone, and no name that would have to be looked up


def measure_messages() -> MessageCosts:
    """Time messages between two ends of gloo over loopback, where this process has one core.

    Both ends take turns on that core, and cost the same: half of the time is that of one.

    Raises:
        LinkError: if this machine cannot send to itself.
    """
    try:
        ends = _two_ends()
    except RuntimeError as error:
        raise LinkError(
            "A plan for machines of one core must send to itself over loopback",
            str(error).splitlines()[0],
            f"Let processes of this machine reach {_ADDRESS}, or give it two cores",
        ) from error

    def sent(tensors: Sequence[torch.Tensor]) -> None:
        received, posted = ends[1].recv([tensors[1]], 0, 0), ends[0].send([tensors[0]], 1, 0)
        posted.wait()
        received.wait()

    def added(tensors: Sequence[torch.Tensor]) -> None:
        for work in [end.allreduce([each]) for end, each in zip(ends, tensors, strict=True)]:
            work.wait()

    small, large, sums = (
        _seconds(exchange, num_bytes) / 2
        for exchange, num_bytes in ((sent, SMALL), (sent, LARGE), (added, LARGE))
    )
    return MessageCosts(
        message=small,
        byte=max(large - small, 0.0) / LARGE,
        # Of two in a ring each sends half the bytes twice.
        added=max(sums - 2 * small, 0.0) / LARGE,
    )


def _two_ends() -> list[Any]:
    store, kind = HashStore(), ProcessGroupGloo
    options: Any = kind._Options()  # type: ignore[attr-defined]
    options._devices = [kind.create_device(hostname=_ADDRESS)]
    options._timeout = PATIENCE

    def end(rank: int) -> Any:
        return kind(PrefixStore("ends", store), rank, 2, options)

    with ThreadPoolExecutor(2) as pool:  # each waits for the other
        return list(pool.map(end, range(2)))


def _seconds(exchange: Callable[[Sequence[torch.Tensor]], None], num_bytes: int) -> float:
    tensors = [torch.zeros(num_bytes // 4) for _ in range(2)]
    found = []
    for _ in range(VISITS + 1):
        begin = time.perf_counter()
        for _ in range(EXCHANGES):
            exchange(tensors)
        found.append((time.perf_counter() - begin) / EXCHANGES)
    return median(found[1:])  # the first one warms up
