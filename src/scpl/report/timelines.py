"""Pictures of what stages did when: of one run, and of several methods over the same time."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from scpl.report.formats import percent
from scpl.report.panels import INK, MUTED, Panel, lane_axis, short_label, side_legend
from scpl.runs import Event, RunRecord

__all__ = [
    "activity_shares",
    "bars",
    "comparison_timelines",
    "in_order",
    "steady_window",
    "timeline_panels",
]

NUM_STEPS = 4
NUM_NEAR = 100  # events that may overlap with one another: stages of several ranks
WIDEST = 4.0
"""The span of several methods is that of the slowest one's few steps, or this many times the
fastest one's."""
# Computing comes first: what overlaps with it costs nothing. Learning locally and a backward pass
# are the same kind of work, so they look the same.
_COLOURS = {
    "forward": "#79b4d1",
    "learn": "#2c728e",
    "backward": "#2c728e",
    "update": "#1d3b4f",
    "evaluate": "#5fa777",
    "snapshot": "#8e5ea2",
    "wait": "#d0d7de",
    "send": "#cc6677",
    "receive": "#e69f00",
}
_OTHER = "#999933"
_TRAINING = ("forward", "learn", "backward", "update")
_PAUSES = ("evaluate", "snapshot")
_NUMBERED = ("learn", "backward")
_MESSAGES = ("send", "receive")  # a thin bar under the lane: they overlap with computing
_SHOWN = {"snapshot": "save"}

Lanes = Mapping[str, Sequence[Event]]
Window = tuple[float, float]


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
            draw=partial(_draw_timeline, lanes, window),
            height=1.5 + 0.46 * len(lanes),
            wide=True,
        )
        shares = activity_shares(events)
    else:
        known = [(k, share) for k, share in enumerate(wait_share) if math.isfinite(share)]
        shares = {f"stage {stage}": {"wait": share} for stage, share in known}
    if not shares:
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
        draw=partial(_draw_shares, shares),
        height=1.0 + 0.34 * len(shares),
        wide=True,
    )


def comparison_timelines(runs: Mapping[str, Sequence[RunRecord]]) -> Iterator[Panel]:
    """Draw one lane per process, method below method; nothing without recorded steps.

    Args:
        runs: The runs of each method, by label; the first with a timeline is drawn.
    """
    recorded: dict[str, Sequence[Event]] = {}
    for label, records in runs.items():
        for events in (record.timeline for record in records):
            if any(event.activity == "forward" for event in events):
                recorded.setdefault(label, events)
    if not recorded:
        return
    windows = _equal_windows(recorded)
    begin, end = next(iter(windows.values()))
    steps = "; ".join(f"{k} {_num_steps(recorded[k], windows[k])}" for k in recorded)
    num_lanes = sum(len({event.rank for event in events}) for events in recorded.values())
    yield Panel(
        name="timelines",
        title="The same time span of every method",
        caption="Measured, from the middle of a run of each method; a lane is a process, a "
        "number on a bar counts the steps shown; white is none of these: idle, or preparing data.",
        alternative=f"Gantt chart of {num_lanes} processes over "
        f"{1000 * (end - begin):.3g} milliseconds. Training steps within that time: {steps}.",
        draw=partial(_draw_methods, recorded, windows),
        height=1.3 + 0.4 * num_lanes + 0.12 * len(recorded),
        wide=True,
    )


def in_order(activities: Iterable[str]) -> list[str]:
    """List each activity once: computing, then what is unknown, then waiting, then messages."""
    place = {name: index for index, name in enumerate(_COLOURS)}
    return sorted(set(activities), key=lambda name: (place.get(name, place["wait"] - 1), name))


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
            total = _length_of_union(covered)
            shares[lane][name] = (total - before) / span if span else 0.0
            before = total
    return shares


def _length_of_union(events: Sequence[Event]) -> float:
    total, reached = 0.0, -math.inf
    for event in sorted(events, key=lambda event: event.begin):
        total += max(0.0, event.end - max(event.begin, reached))
        reached = max(reached, event.end)
    return total


def _lanes(events: Iterable[Event]) -> dict[str, list[Event]]:
    lanes: dict[tuple[int, int], list[Event]] = {}
    for event in events:
        lanes.setdefault((event.stage, event.rank), []).append(event)
    return {f"stage {stage}, rank {rank}": lanes[stage, rank] for stage, rank in sorted(lanes)}


# Which part of a recording is worth a look


def steady_window(
    events: Sequence[Event], num_steps: int = NUM_STEPS, length: float | None = None
) -> Window:
    """Choose a time span of a few steps, or of ``length`` seconds, near the middle of a run.

    Filling and draining, evaluations and checkpoints are avoided if the recording is long enough.

    Returns:
        Begin and end in seconds; all there is if that is less than asked for.
    """
    starts, end = _steady_starts(events)
    if len(starts) <= num_steps:
        begin = min(event.begin for event in events)
        return begin, max(event.end for event in events) if length is None else begin + length
    period = statistics.median(b - a for a, b in pairwise(starts))
    wanted = num_steps * period if length is None else length
    middle = starts[(len(starts) - num_steps) // 2]
    fitting = [start for start in starts if start + wanted <= end] or [middle]
    pauses = sorted((e.begin, e.end) for e in events if e.activity in _PAUSES)
    begin = min(
        fitting, key=lambda start: (_overlap(pauses, start, start + wanted), abs(start - middle))
    )
    return begin, begin + wanted if length is not None else min(end, begin + wanted)


def _steady_starts(events: Sequence[Event]) -> tuple[list[float], float]:
    """Find when the first stage began its steps while all stages were busy, and when that ended."""
    lanes = list(_lanes(event for event in events if event.activity in _TRAINING).values())
    filled = max((min(e.begin for e in own) for own in lanes), default=0.0)
    drains = min((max(e.end for e in own) for own in lanes), default=0.0)
    starts = _step_starts(lanes[0] if lanes else (), (filled, drains))
    return sorted(starts.values()), drains


def _step_starts(events: Iterable[Event], window: Window) -> dict[int, float]:
    """When each step began that began in a time span; it may have several forward passes."""
    starts: dict[int, float] = {}
    for event in events:
        if event.activity == "forward" and window[0] <= event.begin < window[1]:
            starts[event.step] = min(event.begin, starts.get(event.step, event.begin))
    return starts


def _overlap(pauses: Sequence[Window], begin: float, end: float) -> bool:
    """Whether one of the pauses, sorted by their begin, reaches into a time span."""
    before = bisect_left(pauses, (end,))
    return any(stop > begin for _, stop in pauses[max(0, before - NUM_NEAR) : before])


def _equal_windows(recorded: Lanes) -> dict[str, Window]:
    """Choose time spans of one length, one for each method."""
    windows = {label: steady_window(events) for label, events in recorded.items()}
    lengths = [end - begin for begin, end in windows.values()]
    known = [max(e.end for e in events) - windows[k][0] for k, events in recorded.items()]
    span = min(max(lengths), WIDEST * min(lengths), *known)
    return {label: steady_window(events, length=span) for label, events in recorded.items()}


def _num_steps(events: Sequence[Event], window: Window) -> int:
    """Count the steps that begin within a time span."""
    begin, end = window[0], window[1] - 1e-9  # for rounding
    starts = _step_starts(events, (-math.inf, math.inf))
    return sum(begin <= moment < end for moment in starts.values())


# Drawing


def _draw_timeline(lanes: Lanes, window: Window, axes: Any) -> None:
    for place, events in enumerate(lanes.values()):
        bars(axes, place, events, window)
    axes.set_xlim(0, (window[1] - window[0]) * 1000 or 1)
    axes.set_ylim(len(lanes) - 0.45, -0.45)
    lane_axis(axes, range(len(lanes)), list(lanes))
    axes.set_xlabel("milliseconds since the first step shown")
    _activity_legend(axes, in_order(e.activity for events in lanes.values() for e in events))


def _draw_methods(recorded: Lanes, windows: Mapping[str, Window], axes: Any) -> None:
    places: list[float] = []
    names: list[str] = []
    shown: set[str] = set()
    place = -0.3
    for label, events in recorded.items():
        begin, end = windows[label]
        inside = [event for event in events if event.end > begin and event.begin < end]
        shown |= {event.activity for event in inside}
        # The earliest step on any lane, so that numbers on the bars begin with 1.
        first = min((e.step for e in inside if e.activity in _NUMBERED), default=1)
        if place > 0:
            axes.axhline(place - 0.37, color=INK, linewidth=0.4, alpha=0.4)
        place += 0.3
        ranks = sorted({event.rank for event in events})
        for rank in ranks:
            own = [event for event in inside if event.rank == rank]
            bars(axes, place, own, windows[label], first - 1)
            places.append(place)
            names.append(short_label(label) + (f", process {rank}" if ranks[1:] else ""))
            place += 1
        axes.set_xlim(0, (end - begin) * 1000 or 1)
    axes.set_ylim(place - 0.45, -0.5)
    lane_axis(axes, places, names)
    axes.set_xlabel("milliseconds")
    _activity_legend(axes, in_order(shown))


def bars(axes: Any, lane: float, events: Iterable[Event], window: Window, origin: int = 0) -> None:
    """Draw what was done in a time span as one lane of bars, in milliseconds since it began.

    ``lane`` is the height of the lane; ``origin`` is taken from the numbers written on bars.
    """
    begin, end = window
    inside: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        low, high = max(event.begin, begin), min(event.end, end)
        if low >= high:
            continue
        left, width = (low - begin) * 1000, (high - low) * 1000
        inside.setdefault(event.activity, []).append((left, width))
        if event.activity in _NUMBERED and high - low > 0.035 * (end - begin):
            where = {"ha": "center", "va": "center_baseline", "fontsize": 8, "clip_on": True}
            number = str(event.step - origin)
            axes.text(left + width / 2, lane - 0.08, number, color="white", **where)
    for name in reversed(in_order(inside)):  # computing lies on top
        thin = name in _MESSAGES
        place = (lane + 0.19, 0.1) if thin else (lane - 0.33, 0.5)
        style = {"edgecolor": "white", "linewidth": 0.0 if thin else 0.5}
        axes.broken_barh(inside[name], place, facecolor=_COLOURS.get(name, _OTHER), **style)


def _draw_shares(shares: Mapping[str, Mapping[str, float]], axes: Any) -> None:
    activities = in_order(k for share in shares.values() for k, value in share.items() if value)
    only_waiting = activities in ([], ["wait"])
    for lane, share in enumerate(shares.values()):
        left = 0.0
        for name in activities:
            width = 100 * share.get(name, 0.0)
            colour = MUTED if only_waiting else _COLOURS.get(name, _OTHER)
            axes.barh(lane, width, left=left, height=0.62, color=colour)
            left += width
    labels = [f"{k}: waits {percent(s.get('wait', 0.0))}" for k, s in shares.items()]
    axes.set_ylim(len(shares) - 0.5, -0.5)
    lane_axis(axes, range(len(shares)), labels)
    axes.set_xlabel("share of time (%)")
    if only_waiting:
        axes.set_xlim(0, max(10.0, *(105 * s.get("wait", 0.0) for s in shares.values())))
    else:
        axes.set_xlim(0, 100)
        _activity_legend(axes, activities)


def _activity_legend(axes: Any, activities: Sequence[str]) -> None:
    """Explain the colours; activities that look the same share a line."""
    from matplotlib.patches import Patch

    names: dict[str, list[str]] = {}
    for activity in activities:
        names.setdefault(_COLOURS.get(activity, _OTHER), []).append(_SHOWN.get(activity, activity))
    side_legend(axes, [Patch(facecolor=c, label=" / ".join(same)) for c, same in names.items()])
