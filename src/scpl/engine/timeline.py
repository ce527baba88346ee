"""What each rank did when: received, computed, sent, waited. Cheap enough to leave on."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Timeline"]

KEPT_EVENTS = 4_000


class Timeline:
    """Records events in memory; the newest are kept, the sums are of all.

    An event is ``(activity, stage, step, begin, end)``. Times are taken from the monotonic clock
    and written as seconds since 1970, so that machines with synchronised clocks can be compared.
    On an accelerator computing is asynchronous, and what is recorded is the time to launch it.

    Args:
        rank: This rank, for the written events.
    """

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._events: deque[tuple[str, int, int, float, float]] = deque(maxlen=KEPT_EVENTS)
        self._sums: dict[str, float] = defaultdict(float)
        self._first = self._last = 0.0
        self._epoch = time.time() - time.perf_counter()

    @contextmanager
    def during(self, activity: str, stage: int, step: int) -> Iterator[None]:
        """Record the time spent inside."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(activity, stage, step, begin, time.perf_counter())

    def add(self, activity: str, stage: int, step: int, begin: float, end: float) -> None:
        """Record one event."""
        self._events.append((activity, stage, step, begin, end))
        self._sums[activity] += end - begin
        self._first = self._first or begin
        self._last = max(self._last, end)

    def wait_share(self) -> float:
        """Share of the time between first and last event that was spent waiting, 0 .. 1."""
        total = self._last - self._first
        return self._sums["wait"] / total if total > 0 else 0.0

    def seconds(self) -> dict[str, float]:
        """Total seconds by activity."""
        return dict(self._sums)

    def during_window(self, begin: float, end: float) -> dict[str, float]:
        """Seconds of each activity between two moments of ``time.perf_counter``, of late."""
        spent: dict[str, float] = defaultdict(float)
        for activity, _, _, since, until in tuple(self._events):
            spent[activity] += max(0.0, min(until, end) - max(since, begin))
        return dict(spent)

    def events(self) -> list[dict[str, Any]]:
        """The newest events, oldest first."""
        return [
            {
                "rank": self._rank,
                "stage": stage,
                "step": step,
                "activity": activity,
                "begin": self._epoch + begin,
                "end": self._epoch + end,
            }
            for activity, stage, step, begin, end in self._events
        ]
