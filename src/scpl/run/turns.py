"""Rivals that take turns: in which order, on how busy a machine, and what comes of it."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence

from scpl.run.teams import Team

__all__ = ["Load", "forth_and_back", "paired", "spread"]


def forth_and_back(names: Sequence[str], repeats: int) -> Iterator[list[str]]:
    """The order of each round: every other one backwards, so that a steady drift cancels out."""
    for repeat in range(repeats):
        yield list(names) if repeat % 2 == 0 else list(reversed(names))


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, standard deviation (None of one value), median, least, most, and how many."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def paired(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratios round by round: what slows the machine for a while slows both."""
    return [a / b for a, b in zip(above, below, strict=True)]


class Load:
    """How busy the machine is with other things than one team, from now on.

    Args:
        team: The team that is measured.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self._before = self._read()

    def cores(self) -> dict[str, float] | None:
        """Cores used since by other processes here, and by other guests of the host (steal).

        Returns:
            ``{"others", "steal"}``; None where the system does not tell.
        """
        now = self._read()
        if now is None or self._before is None:
            return None
        busy, stolen, total, ours = (a - b for a, b in zip(now, self._before, strict=True))
        scale = (os.cpu_count() or 1) / max(total, 1.0)
        return {"others": max(0.0, busy - ours) * scale, "steal": stolen * scale}

    def _read(self) -> tuple[float, float, float, float] | None:
        """Ticks of all cores so far: busy, stolen, all, and busy with this team (Linux)."""
        try:
            with open("/proc/stat", encoding="utf-8") as file:
                fields = file.readline().split()[1:9]
            ours = self._team.processor_seconds() * os.sysconf("SC_CLK_TCK")
        except OSError:
            return None
        user, nice, system, idle, io_wait, irq, soft_irq, steal = map(float, fields)
        busy = user + nice + system + irq + soft_irq
        return busy, steal, busy + steal + idle + io_wait, ours
