"""The timeline in the format of Perfetto and chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["chrome_trace"]

MICROSECONDS = 1e6


def chrome_trace(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Turn events into a trace: a process per rank, a track per stage.

    Args:
        events: As `scpl.timeline.Timeline.events` gives them.
    """
    listed = list(events)
    origin = min((event["begin"] for event in listed), default=0.0)
    names = [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        for rank in sorted({event["rank"] for event in listed})
    ]
    spans = [
        {
            "ph": "X",
            "name": event["activity"],
            "cat": event["activity"],
            "pid": event["rank"],
            # What goes on behind the worker's back gets a track of its own.
            "tid": f"stage {event['stage']}"
            + (" (link)" if event["activity"] == "receive" else ""),
            "ts": (event["begin"] - origin) * MICROSECONDS,
            "dur": (event["end"] - event["begin"]) * MICROSECONDS,
            "args": {"step": event["step"]},
        }
        for event in listed
    ]
    return {"traceEvents": names + spans, "displayTimeUnit": "ms"}
