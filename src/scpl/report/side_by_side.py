"""Timelines of several methods over the same time span, from measured events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from scpl.report.activities import NUMBERED, activity_legend, bars, in_order, steady_window
from scpl.report.panels import Panel
from scpl.report.reading import Event, RunRecord
from scpl.report.style import INK, short_label

__all__ = ["side_by_side_panels"]

WIDEST = 4.0
"""The span is that of the slowest method's few steps, or this many times the fastest one's."""


def side_by_side_panels(runs: Mapping[str, Sequence[RunRecord]]) -> Iterator[Panel]:
    """Draw one lane per process, method below method; nothing without recorded steps.

    Args:
        runs: The runs of each method, by label; the first with a timeline is drawn.
    """
    recorded = {}
    for label, records in runs.items():
        for record in records:
            if any(event.activity == "forward" for event in record.timeline):
                recorded[label] = record.timeline
                break
    if not recorded:
        return
    picture = _SideBySide(recorded)
    steps = "; ".join(f"{label} {number}" for label, number in picture.num_steps().items())
    yield Panel(
        name="timelines",
        title="The same time span of every method",
        caption="Measured, from the middle of a run of each method; a lane is a process, a "
        "number on a bar counts the steps shown; white is none of these: idle, or preparing data.",
        alternative=f"Gantt chart of {len(picture.lanes)} processes over "
        f"{1000 * picture.span:.3g} milliseconds. Training steps within that time: {steps}.",
        draw=picture,
        height=1.3 + 0.4 * len(picture.lanes) + 0.12 * len(recorded),
        wide=True,
    )


class _SideBySide:
    def __init__(self, recorded: Mapping[str, Sequence[Event]]) -> None:
        self.recorded = recorded
        windows = {label: steady_window(events) for label, events in recorded.items()}
        lengths = [end - begin for begin, end in windows.values()]
        known = [
            max(e.end for e in events) - windows[label][0] for label, events in recorded.items()
        ]
        self.span = min(max(lengths), WIDEST * min(lengths), *known)
        self.windows = {
            label: steady_window(events, length=self.span) for label, events in recorded.items()
        }
        self.lanes = [
            (label, rank, list(own))
            for label, events in recorded.items()
            for rank, own in groupby(sorted(events, key=lambda e: e.rank), lambda e: e.rank)
        ]

    def num_steps(self) -> dict[str, int]:
        """Count the steps that begin within the span, by label."""
        return {label: len(self._steps(label)) for label in self.recorded}

    def _steps(self, label: str) -> set[int]:
        begin, end = self.windows[label]
        first: dict[int, float] = {}
        for event in self.recorded[label]:
            if event.activity == "forward":
                first[event.step] = min(event.begin, first.get(event.step, event.begin))
        rounding = 1e-9
        return {step for step, moment in first.items() if begin <= moment < end - rounding}

    def _first_step(self, label: str) -> int:
        """Find the earliest step on any lane, so that numbers on the bars begin with 1."""
        begin, end = self.windows[label]
        steps = (e.step for e in self.recorded[label]
                 if e.activity in NUMBERED and e.end > begin and e.begin < end)  # fmt: skip
        return min(steps, default=1)

    def __call__(self, axes: Any) -> None:
        places, names, place = [], [], -0.3
        for label, lanes in groupby(self.lanes, lambda lane: lane[0]):
            own = list(lanes)
            origin = self._first_step(label) - 1
            if place > 0:
                axes.axhline(place - 0.37, color=INK, linewidth=0.4, alpha=0.4)
            place += 0.3
            for _, rank, events in own:
                bars(axes, place, events, self.windows[label], origin)
                places.append(place)
                names.append(short_label(label) + (f", process {rank}" if own[1:] else ""))
                place += 1
        axes.set_xlim(0, self.span * 1000 or 1)
        axes.set_ylim(place - 0.45, -0.5)
        axes.set_yticks(places, names)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("milliseconds")
        activity_legend(axes, in_order(self._activities()))

    def _activities(self) -> Iterator[str]:
        for label, _, events in self.lanes:
            begin, end = self.windows[label]
            yield from (e.activity for e in events if e.end > begin and e.begin < end)
