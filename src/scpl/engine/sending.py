"""What messages cost a processor, by measurement: two ends of torch's gloo in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from statistics import median
from typing import Any

import torch
from torch.distributed import HashStore, PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]

from scpl.simulation.machines import MessageCosts

__all__ = ["measure_messages"]

VISITS, EXCHANGES = 5, 4
SMALL, LARGE = 4, 2**20
PATIENCE = timedelta(seconds=60)


def measure_messages() -> MessageCosts:
    """Send between two ends of gloo over loopback, and count the processor's seconds.

    Both ends are in this process, and cost the same.
    """
    store = HashStore()

    def end(rank: int) -> Any:
        return ProcessGroupGloo(PrefixStore("ends", store), rank, 2, PATIENCE)

    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(end, range(2)))

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
        added=max(sums - small, 0.0) / LARGE,
    )


def _seconds(exchange: Callable[[Sequence[torch.Tensor]], None], num_bytes: int) -> float:
    """The processor's seconds of an exchange, by all threads of this process."""
    tensors = [torch.zeros(num_bytes // 4) for _ in range(2)]
    found = []
    for _ in range(VISITS + 1):
        begin = time.process_time()
        for _ in range(EXCHANGES):
            exchange(tensors)
        found.append((time.process_time() - begin) / EXCHANGES)
    return median(found[1:])  # the first one warms up
