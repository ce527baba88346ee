"""Rivals that take turns on one machine, and what comes of it."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from scpl.app.bench.teams import Team, Teams, Unable
from scpl.app.signals import end_signals
from scpl.errors import Interrupted
from scpl.report.groups import Sample

__all__ = ["Answers", "Record", "Rival", "paired", "spread", "take_turns"]

Answers: TypeAlias = list[dict[str, Any]]
"""What every rank of a team says."""


@dataclass(frozen=True)
class Rival:
    """One of those that take turns.

    Attributes:
        team: Name of its team; several rivals may share one.
        start: Starts the team.
        work: Has the team train a block; gives samples per second, and what every rank said.
    """

    team: str
    start: Callable[[], Team]
    work: Callable[[Team], tuple[float, Answers]]


@dataclass
class Record:
    """What was measured of a rival, round by round.

    Attributes:
        ready: What its ranks said when they were ready.
        rates: Samples per second.
        loads: Cores that others used meanwhile; empty where the system does not tell.
        answers: What its ranks said of each block.
    """

    ready: Answers
    rates: list[float] = field(default_factory=list)
    loads: list[dict[str, float]] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)

    def mean_shares(self) -> list[dict[str, float]]:
        """For every rank, the mean over rounds of the share of time of each activity."""
        return [
            {name: statistics.fmean(a["shares"][name] for a in rank) for name in rank[0]["shares"]}
            for rank in zip(*self.answers, strict=True)
        ]


def take_turns(
    rivals: Mapping[str, Rival], repeats: int, say: Callable[[str], None]
) -> tuple[dict[str, Record], dict[str, str]]:
    """Start all teams; then let one rival at a time train a block, forth and back through them.

    Args:
        rivals: By name.
        repeats: Blocks of each.
        say: Takes lines of progress.

    Returns:
        The record of each rival that ran to the end, and why the others could not.

    Raises:
        LinkError: if a process is killed.
        Interrupted: if this process is told to end; all others are ended first.
    """
    records: dict[str, Record] = {}
    failures: dict[str, str] = {}
    ready: dict[str, Answers] = {}

    def leave(team: str, error: Unable) -> None:
        say(f"{team} cannot run: {error}")
        for name in [name for name, rival in rivals.items() if rival.team == team]:
            failures[name] = str(error)
            records.pop(name, None)

    with end_signals(_interrupt), Teams() as teams:
        for name, rival in rivals.items():
            if name in failures:
                continue  # its team has failed
            if rival.team not in teams:
                say(f"starting {rival.team}")
                try:
                    ready[rival.team] = teams.start(rival.team, rival.start())
                except Unable as error:
                    leave(rival.team, error)
                    continue
            records[name] = Record(ready[rival.team])
        for number, order in enumerate(_forth_and_back(list(records), repeats), 1):
            for name in order:
                if name in records:
                    try:
                        _take_turn(rivals[name], teams[rivals[name].team], records[name])
                    except Unable as error:
                        teams.drop(rivals[name].team)
                        leave(rivals[name].team, error)
            if not records:
                break
            say(_progress(number, repeats, records))
    return records, failures


def _take_turn(rival: Rival, team: Team, record: Record) -> None:
    load = Load(team)
    rate, answers = rival.work(team)
    if (cores := load.cores()) is not None:
        record.loads.append(cores)
    record.rates.append(rate)
    record.answers.append(answers)


def _progress(number: int, repeats: int, records: Mapping[str, Record]) -> str:
    rates = ", ".join(f"{name} {record.rates[-1]:,.1f}" for name, record in records.items())
    return f"{time.strftime('%H:%M:%S')} round {number}/{repeats}, samples/s: {rates}"


def _forth_and_back(names: Sequence[str], repeats: int) -> Iterator[list[str]]:
    """The order of each round: every other one backwards, so that a steady drift cancels out."""
    for repeat in range(repeats):
        yield list(names) if repeat % 2 == 0 else list(reversed(names))


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, standard deviation (None of one value), median, least, most, and how many."""
    return Sample.of(values).statistics()


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


def _interrupt(received: signal.Signals) -> None:
    """Turn Ctrl-C and SIGTERM into an error, so that all processes are ended."""
    error = Interrupted("The benchmark was interrupted")
    error.signal = received
    raise error
