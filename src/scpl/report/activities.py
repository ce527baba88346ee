"""What a recorded event looks like, and which part of a recording is worth a look."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from scpl.report.reading import Event
from scpl.report.style import side_legend

__all__ = ["NUMBERED", "activity_legend", "bars", "colour_of", "in_order", "steady_window"]

NUM_STEPS = 4
NUM_NEAR = 100  # events that may overlap with one another: stages of several ranks
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
NUMBERED = ("learn", "backward")
_MESSAGES = ("send", "receive")  # a thin bar under the lane: they overlap with computing
_SHOWN = {"snapshot": "save"}


def colour_of(activity: str) -> str:
    """Colour of an activity."""
    return _COLOURS.get(activity, _OTHER)


def in_order(activities: Iterable[str]) -> list[str]:
    """List each activity once: computing, then what is unknown, then waiting, then messages."""
    known = list(_COLOURS)
    place = {name: (known.index(name), name) for name in known}
    return sorted(
        set(activities), key=lambda name: place.get(name, (known.index("wait") - 1, name))
    )


def steady_window(
    events: Sequence[Event], num_steps: int = NUM_STEPS, length: float | None = None
) -> tuple[float, float]:
    """Choose a time span of a few steps: away from filling and draining, near the middle.

    Evaluations and checkpoints are avoided where the recording is long enough.

    Args:
        events: One run.
        num_steps: How many steps to show.
        length: Seconds to show instead, whatever number of steps that is.

    Returns:
        Begin and end in seconds; all there is if that is less than asked for.
    """
    ticks, end = _ticks(events)
    if len(ticks) <= num_steps:
        begin = min(event.begin for event in events)
        return begin, max(event.end for event in events) if length is None else begin + length
    period = statistics.median(b - a for a, b in pairwise(ticks))
    wanted = num_steps * period if length is None else length
    middle = ticks[(len(ticks) - num_steps) // 2]
    fitting = [tick for tick in ticks if tick + wanted <= end] or [middle]
    pauses = sorted((e.begin, e.end) for e in events if e.activity in _PAUSES)
    begin = min(
        fitting, key=lambda tick: (_overlap(pauses, tick, tick + wanted), abs(tick - middle))
    )
    return begin, begin + wanted if length is not None else min(end, begin + wanted)


def _ticks(events: Sequence[Event]) -> tuple[list[float], float]:
    """Find when the first stage began its steps while the line was full, and when it was not."""
    lanes: dict[tuple[int, int], list[Event]] = {}
    for event in events:
        if event.activity in _TRAINING:
            lanes.setdefault((event.stage, event.rank), []).append(event)
    computing = [lanes[place] for place in sorted(lanes)]
    filled = max((min(e.begin for e in own) for own in computing), default=0.0)
    drains = min((max(e.end for e in own) for own in computing), default=0.0)
    steps: dict[int, float] = {}  # a step may have several forward passes: micro-batches
    for event in computing[0] if computing else ():
        if event.activity == "forward" and filled <= event.begin < drains:
            steps[event.step] = min(event.begin, steps.get(event.step, event.begin))
    return sorted(steps.values()), drains


def _overlap(pauses: Sequence[tuple[float, float]], begin: float, end: float) -> bool:
    """Whether one of the pauses, sorted by their begin, reaches into a time span."""
    before = bisect_left(pauses, (end,))
    return any(stop > begin for _, stop in pauses[max(0, before - NUM_NEAR) : before])


def bars(
    axes: Any, lane: float, events: Iterable[Event], window: tuple[float, float], origin: int = 0
) -> None:
    """Draw what was done in a time span as one lane of bars.

    Args:
        axes: Where to draw; milliseconds since the span began.
        lane: The lane's height on the axes.
        events: What was done.
        window: Begin and end of the span, in seconds.
        origin: Is taken from the number of a step before it is written on its bar.
    """
    begin, end = window
    inside: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        low, high = max(event.begin, begin), min(event.end, end)
        if low >= high:
            continue
        left, width = (low - begin) * 1000, (high - low) * 1000
        inside.setdefault(event.activity, []).append((left, width))
        if event.activity in NUMBERED and high - low > 0.035 * (end - begin):
            where = {"ha": "center", "va": "center_baseline", "fontsize": 8, "clip_on": True}
            number = str(event.step - origin)
            axes.text(left + width / 2, lane - 0.08, number, color="white", **where)
    for name in reversed(in_order(inside)):  # computing lies on top
        thin = name in _MESSAGES
        place = (lane + 0.19, 0.1) if thin else (lane - 0.33, 0.5)
        style = {"edgecolor": "white", "linewidth": 0.0 if thin else 0.5}
        axes.broken_barh(inside[name], place, facecolor=colour_of(name), **style)


def activity_legend(axes: Any, activities: Sequence[str]) -> None:
    """Explain the colours; activities that look the same share a line."""
    from matplotlib.patches import Patch

    names: dict[str, list[str]] = {}
    for activity in activities:
        names.setdefault(colour_of(activity), []).append(_SHOWN.get(activity, activity))
    side_legend(axes, [Patch(facecolor=c, label=" / ".join(same)) for c, same in names.items()])
