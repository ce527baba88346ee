"""Group runs that differ only in their seed, and compare the groups pair by pair.

A ratio of two means mixes the change between methods with the change between seeds and between
hours of the day. So throughput is compared run by run: a run of one method with the run of another
on the same data, network and seed; of several such runs, the first with the first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scpl.runs.numbers import as_number, as_numbers

__all__ = ["BASELINE", "Group", "Sample", "baseline", "group_runs", "paired_ratio"]

BASELINE = "bp"
"""The method that others are measured against."""
_NAMING = ("data", "model", "stages", "processes", "epochs")


@dataclass(frozen=True)
class Sample:
    """The finite values of one quantity over the runs of a group."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Sample:
        """Keep the finite values."""
        return cls(tuple(value for value in values if math.isfinite(value)))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        """Arithmetic mean; NaN of nothing."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def sd(self) -> float:
        """Standard deviation of the sample (n - 1); NaN of fewer than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def median(self) -> float:
        """Median; NaN of nothing."""
        return statistics.median(self.values) if self.values else math.nan

    @property
    def low(self) -> float:
        """Smallest value; NaN of nothing."""
        return min(self.values, default=math.nan)

    @property
    def high(self) -> float:
        """Largest value; NaN of nothing."""
        return max(self.values, default=math.nan)

    def statistics(self) -> dict[str, float | int | None]:
        """Give all of it as JSON values; None where there are too few values."""
        found = {"mean": self.mean, "sd": self.sd, "median": self.median}
        found |= {"min": self.low, "max": self.high}
        return {k: v if math.isfinite(v) else None for k, v in found.items()} | {"n": len(self)}


@dataclass(frozen=True)
class Group:
    """Runs of one method that differ only in their seed.

    Args:
        label: The method, with what else tells this group from others of the same method.
        method: The method alone.
        members: Positions of the runs in the sequence that was grouped.
        summaries: The summaries of these runs.
    """

    label: str
    method: str
    members: tuple[int, ...]
    summaries: tuple[Mapping[str, Any], ...]

    def sample(self, key: str) -> Sample:
        """Collect one number of the summaries."""
        return Sample.of(as_number(summary.get(key)) for summary in self.summaries)

    def memory(self) -> tuple[Sample, Sample]:
        """Collect peak memory in bytes: of the largest process, and of all processes together."""
        known = self.lists("peak_memory_bytes")
        return Sample.of(map(max, known)), Sample.of(map(sum, known))

    def traffic(self) -> Sample:
        """Collect the bytes that all processes together send per training step."""
        return Sample.of(map(sum, self.lists("bytes_per_step")))

    def waiting(self) -> tuple[Sample, Sample]:
        """Collect shares of time spent waiting: the mean over the stages, and the largest."""
        known = self.lists("wait_share")
        return Sample.of(map(statistics.fmean, known)), Sample.of(map(max, known))

    def notes(self) -> list[str]:
        """Collect what the runs say must be known of them, each note once."""
        noted = [summary.get("notes") for summary in self.summaries]
        return list(
            dict.fromkeys(str(n) for notes in noted if isinstance(notes, list) for n in notes)
        )

    def lists(self, key: str) -> list[list[float]]:
        """Collect the lists of numbers that are complete."""
        every = [as_numbers(summary.get(key)) for summary in self.summaries]
        return [values for values in every if values and all(map(math.isfinite, values))]


def group_runs(summaries: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Group runs by everything but the seed, in order of first appearance.

    Example:
        >>> [group.label for group in group_runs([{"method": "bp"}, {"method": "scpl"}])]
        ['bp', 'scpl']
    """
    members: dict[tuple[str, ...], list[int]] = {}
    for index, summary in enumerate(summaries):
        members.setdefault(_settings(summary, "method", *_NAMING), []).append(index)
    return [
        Group(_label(key, members), key[0], tuple(indices), tuple(summaries[i] for i in indices))
        for key, indices in members.items()
    ]


def paired_ratio(group: Group, rivals: Iterable[Group], key: str = "samples_per_second") -> Sample:
    """Divide a group's values by those of its rivals on the same data, network and seed.

    Returns:
        One ratio per pair; empty where no rival was run.
    """
    below: dict[tuple[str, ...], list[float]] = {}
    for rival in rivals:
        for summary in rival.summaries:
            below.setdefault(_pair(summary), []).append(as_number(summary.get(key)))
    ratios = []
    for summary in group.summaries:
        waiting = below.get(_pair(summary))
        divisor = waiting.pop(0) if waiting else math.nan
        ratios.append(as_number(summary.get(key)) / divisor if divisor else math.nan)
    return Sample.of(ratios)


def baseline(groups: Iterable[Group]) -> list[Group]:
    """Pick the groups of plain backpropagation, which others are measured against."""
    return [group for group in groups if group.method == BASELINE]


def _pair(summary: Mapping[str, Any]) -> tuple[str, ...]:
    return _settings(summary, "data", "model", "seed")


def _settings(summary: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    values = map(summary.get, names)
    return tuple("?" if value is None else str(value) for value in values)


def _label(key: tuple[str, ...], keys: Iterable[tuple[str, ...]]) -> str:
    """Name a group by its method and by what differs among the groups of that method."""
    rivals = [other for other in keys if other[0] == key[0]]
    words = []
    for position, name in enumerate(_NAMING, start=1):
        if len({other[position] for other in rivals}) > 1:
            value = key[position]
            words.append(value if name in ("data", "model") else f"{value} {name}")
    return f"{key[0]} ({', '.join(words)})" if words else key[0]
