"""Pictures of the measured timeline: what every stage did when, and the share of each activity."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from scpl.report.formats import percent
from scpl.report.panels import Panel
from scpl.report.reading import Event
from scpl.report.style import MUTED, side_legend

__all__ = ["activity_shares", "steady_window", "timeline_panels"]

NUM_STEPS = 4
_COLOURS = {
    "forward": "#79b4d1",
    "learn": "#2c728e",
    "evaluate": "#5fa777",
    "snapshot": "#8e5ea2",
    "wait": "#d0d7de",
    "receive": "#e69f00",
}
_PRIORITY = tuple(_COLOURS)
_TRAINING = ("forward", "learn")
_MESSAGES = {"receive": 0.24}  # a thin bar under the lane: it overlaps with computing


def timeline_panels(events: Sequence[Event], wait_share: Sequence[float]) -> Iterator[Panel]:
    """Draw the timeline if there is one; the share of waiting from it, else as it was reported."""
    if events:
        window = steady_window(events)
        lanes = _lanes(events)
        yield Panel(
            name="timeline",
            title="Timeline of the stages",
            caption="A few steps from the middle of the recording; a bar shows its step.",
            alternative=f"Gantt chart of {len(lanes)} stages over "
            f"{1000 * (window[1] - window[0]):.3g} milliseconds in the steady state.",
            draw=_Gantt(events, window, lanes),
            height=1.5 + 0.46 * len(lanes),
            wide=True,
        )
        shares = activity_shares(events)
    elif any(map(math.isfinite, wait_share)):
        shares = {
            _name(stage, None): {"wait": share}
            for stage, share in enumerate(wait_share)
            if math.isfinite(share)
        }
    else:
        return
    said = ", ".join(f"{lane} {percent(share.get('wait', 0.0))}" for lane, share in shares.items())
    yield Panel(
        name="waiting",
        title="Where the time of each stage went" if events else "Time each stage waited",
        caption="Share of the recorded time. Receiving counts where it does not overlap with "
        "computing or waiting."
        if events
        else "Share of the training time in which a stage had nothing to do.",
        alternative=f"Bar chart of the share of time spent waiting: {said}.",
        draw=_Shares(shares),
        height=1.0 + 0.34 * len(shares),
        wide=True,
    )


def steady_window(events: Sequence[Event], num_steps: int = NUM_STEPS) -> tuple[float, float]:
    """Choose the time span of a few steps in the middle, away from filling and draining."""
    computing = [[e for e in own if e.activity in _TRAINING] for own in _lanes(events).values()]
    computing = [own for own in computing if own]
    filled = max((min(e.begin for e in own) for own in computing), default=0.0)
    drains = min((max(e.end for e in own) for own in computing), default=0.0)
    ticks = sorted(
        e.begin
        for own in computing[:1]
        for e in own
        if e.activity == "forward" and filled <= e.begin < drains
    )
    if len(ticks) <= num_steps:
        return min(event.begin for event in events), max(event.end for event in events)
    period = statistics.median(b - a for a, b in pairwise(ticks))
    begin = ticks[(len(ticks) - num_steps) // 2]
    return begin, min(drains, begin + num_steps * period)


def activity_shares(events: Sequence[Event]) -> dict[str, dict[str, float]]:
    """Give each stage's share of its recorded time per activity.

    What overlaps counts once, as computing before waiting before receiving.
    """
    shares: dict[str, dict[str, float]] = {}
    for lane, own in _lanes(events).items():
        span = max(event.end for event in own) - min(event.begin for event in own)
        covered: list[Event] = []
        shares[lane] = {}
        before = 0.0
        for name in _PRIORITY:
            covered += [event for event in own if event.activity == name]
            total = _covered(covered)
            shares[lane][name] = (total - before) / span if span else 0.0
            before = total
    return shares


def _covered(events: Sequence[Event]) -> float:
    """Length of the union of events."""
    total, reached = 0.0, -math.inf
    for event in sorted(events, key=lambda event: event.begin):
        total += max(0.0, event.end - max(event.begin, reached))
        reached = max(reached, event.end)
    return total


def _lanes(events: Sequence[Event]) -> dict[str, list[Event]]:
    lanes: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in events:
        lanes[event.stage, event.rank].append(event)
    return {_name(*place): lanes[place] for place in sorted(lanes)}


def _name(stage: int, rank: int | None) -> str:
    return f"stage {stage}" if rank is None else f"stage {stage}, rank {rank}"


class _Gantt:
    def __init__(
        self,
        events: Sequence[Event],
        window: tuple[float, float],
        lanes: Mapping[str, Sequence[Event]],
    ) -> None:
        self.window, self.lanes = window, lanes
        self.activities = [name for name in _COLOURS if any(e.activity == name for e in events)]

    def __call__(self, axes: Any) -> None:
        begin, end = self.window
        for lane, own in enumerate(self.lanes.values()):
            for event in own:
                low, high = max(event.begin, begin), min(event.end, end)
                if low < high:
                    self._bar(axes, lane, event, (low - begin) * 1000, (high - low) * 1000)
        axes.set_xlim(0, (end - begin) * 1000 or 1)
        axes.set_ylim(len(self.lanes) - 0.45, -0.45)
        axes.set_yticks(range(len(self.lanes)), list(self.lanes))
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("milliseconds since the first step shown")
        _activity_legend(axes, self.activities)

    def _bar(self, axes: Any, lane: int, event: Event, left: float, width: float) -> None:
        thin = _MESSAGES.get(event.activity)
        axes.barh(
            lane - 0.08 if thin is None else lane + thin,
            width,
            left=left,
            height=0.5 if thin is None else 0.1,
            color=_COLOURS[event.activity],
            edgecolor="white",
            linewidth=0.6,
        )
        share = width / ((self.window[1] - self.window[0]) * 1000)
        if event.activity == "learn" and share > 0.04:
            axes.text(
                left + width / 2,
                lane - 0.08,
                str(event.step),
                ha="center",
                va="center_baseline",
                color="white",
                fontsize=8,
            )


class _Shares:
    def __init__(self, shares: Mapping[str, Mapping[str, float]]) -> None:
        self.shares = shares
        self.activities = [
            name for name in _COLOURS if any(share.get(name) for share in shares.values())
        ] or ["wait"]

    def __call__(self, axes: Any) -> None:
        lone = self.activities == ["wait"]
        for lane, share in enumerate(self.shares.values()):
            left = 0.0
            for name in self.activities:
                width = 100 * share.get(name, 0.0)
                colour = MUTED if lone else _COLOURS[name]
                axes.barh(lane, width, left=left, height=0.62, color=colour)
                left += width
        labels = [f"{k}: waits {percent(s.get('wait', 0.0))}" for k, s in self.shares.items()]
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(self.shares) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("share of time (%)")
        if lone:
            axes.set_xlim(0, max(10.0, *(105 * s.get("wait", 0.0) for s in self.shares.values())))
        else:
            axes.set_xlim(0, 100)
            _activity_legend(axes, self.activities)


def _activity_legend(axes: Any, activities: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    side_legend(axes, [Patch(facecolor=_COLOURS[name], label=name) for name in activities])
