"""How numbers are written for people: always with a unit, never with false precision."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = [
    "DASH",
    "TIMES",
    "count",
    "duration",
    "memory",
    "percent",
    "short",
    "text",
    "time_axis",
    "traffic",
]

DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


def text(value: object) -> str:
    """Write a value as it is; a dash for nothing."""
    return DASH if value is None else str(value)


def short(value: float) -> str:
    """Write a number without a unit with four digits: ``0.1235``."""
    return f"{value:.4g}" if math.isfinite(value) else DASH


def percent(share: float, digits: int = 1) -> str:
    """Write a share of one as a percentage: ``0.9123`` is ``91.2 %``."""
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else DASH


def count(value: float) -> str:
    """Write a count or rate with thousands set off: ``12,345``, ``56.3``."""
    if not math.isfinite(value):
        return DASH
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Write a duration: ``0.42 s``, ``45.2 s``, ``12 min 05 s``, ``3 h 07 min``."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def memory(num_bytes: float) -> str:
    """Write a size in memory: ``812 MiB``, ``1.44 GiB``."""
    if not math.isfinite(num_bytes):
        return DASH
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:.3g} MiB" if mebibytes < 999.5 else f"{mebibytes / 1024:.3g} GiB"


def traffic(num_bytes: float) -> str:
    """Write an amount of data that was sent: ``0``, ``64 KiB``, ``1.44 MiB``."""
    if not math.isfinite(num_bytes):
        return DASH
    if num_bytes == 0:
        return "0"
    return f"{num_bytes / 1024:.3g} KiB" if num_bytes < 999.5 * 1024 else memory(num_bytes)


def time_axis(seconds: Sequence[float]) -> tuple[float, str]:
    """Choose the unit of a time axis: the seconds in one unit, and the unit's name."""
    longest = max((value for value in seconds if math.isfinite(value)), default=0.0)
    if longest > 3 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if longest > 600 else (1.0, "seconds")
