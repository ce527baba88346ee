"""Pictures of one run's timeline: what every stage did when, and the share of each activity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scpl.report.activities import activity_legend, bars, colour_of, in_order, steady_window
from scpl.report.formats import percent
from scpl.report.panels import Panel
from scpl.report.reading import Event
from scpl.report.style import MUTED

__all__ = ["activity_shares", "timeline_panels"]


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
        for name in in_order(event.activity for event in own):
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
    lanes: dict[tuple[int, int], list[Event]] = {}
    for event in events:
        lanes.setdefault((event.stage, event.rank), []).append(event)
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
        self.activities = in_order(event.activity for event in events)

    def __call__(self, axes: Any) -> None:
        begin, end = self.window
        for lane, own in enumerate(self.lanes.values()):
            bars(axes, lane, own, self.window)
        axes.set_xlim(0, (end - begin) * 1000 or 1)
        axes.set_ylim(len(self.lanes) - 0.45, -0.45)
        _lane_axis(axes, list(self.lanes))
        axes.set_xlabel("milliseconds since the first step shown")
        activity_legend(axes, self.activities)


class _Shares:
    def __init__(self, shares: Mapping[str, Mapping[str, float]]) -> None:
        self.shares = shares
        self.activities = in_order(
            name for share in shares.values() for name, value in share.items() if value
        ) or ["wait"]

    def __call__(self, axes: Any) -> None:
        lone = self.activities == ["wait"]
        for lane, share in enumerate(self.shares.values()):
            left = 0.0
            for name in self.activities:
                width = 100 * share.get(name, 0.0)
                colour = MUTED if lone else colour_of(name)
                axes.barh(lane, width, left=left, height=0.62, color=colour)
                left += width
        labels = [f"{k}: waits {percent(s.get('wait', 0.0))}" for k, s in self.shares.items()]
        axes.set_ylim(len(self.shares) - 0.5, -0.5)
        _lane_axis(axes, labels)
        axes.set_xlabel("share of time (%)")
        if lone:
            axes.set_xlim(0, max(10.0, *(105 * s.get("wait", 0.0) for s in self.shares.values())))
        else:
            axes.set_xlim(0, 100)
            activity_legend(axes, self.activities)


def _lane_axis(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
