"""How numbers and tables are written for people: with units, without false precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scpl.report.groups import BASELINE

__all__ = [
    "DASH",
    "TIMES",
    "aligned",
    "count",
    "duration",
    "memory",
    "one_line",
    "percent",
    "short",
    "text",
    "throughput_table",
    "time_axis",
    "traffic",
    "widths_of",
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


# Tables of plain text, for terminals


def one_line(text: str) -> str:
    """Keep a name from breaking the table or steering the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def widths_of(rows: Sequence[Sequence[str]]) -> list[int]:
    """Characters of the widest cell of each column."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def aligned(rows: Sequence[Sequence[str]], widths: Sequence[int], columns: Sequence[int]) -> str:
    """Write some columns of a table; all but the first stand to the right.

    Args:
        rows: Cells; the first row is the header, which is underlined.
        widths: Characters of each column of ``rows``.
        columns: Which of them to write, the first one first.
    """
    first, *others = columns
    table = [
        [row[first].ljust(widths[first]), *(row[c].rjust(widths[c]) for c in others)]
        for row in rows
    ]
    table.insert(1, ["-" * widths[c] for c in columns])
    return "\n".join("  ".join(row).rstrip() for row in table)


def throughput_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Compare methods in a table of plain text: samples per second and their ratios.

    Args:
        results: What `scpl bench` measured: `samples_per_second`, `ratio_to` and the rest.
    """
    methods = [result["method"] for result in results]
    reference = BASELINE if BASELINE in methods else methods[0]
    header = ["method", f"processes {TIMES} threads", "samples/s", f"ratio to {reference}"]
    header += ["peak memory", "waiting", "sent per step", "other load"]
    rows = (header, *(_row(result, reference) for result in results))
    num_rounds = results[0]["samples_per_second"]["n"]
    note = (
        f"Samples/s and ratios: median (lowest-highest) of {num_rounds} rounds; a ratio is taken "
        "round by round.\n"
        "Memory, waiting and bytes sent to other processes: one number per process. Other load: "
        "cores that other\nprograms used meanwhile."
    )
    return f"{aligned(rows, widths_of(rows), range(len(header)))}\n\n{note}\n"


def _row(result: Mapping[str, Any], reference: str) -> tuple[str, ...]:
    is_reference = result["method"] == reference
    load = result["other_load"]
    return (
        result["method"],
        f"{result['processes']} {TIMES} {result['threads']}",
        _median(result["samples_per_second"], count),
        "1 (reference)" if is_reference else _median(result["ratio_to"][reference], _ratio),
        " | ".join(map(memory, result["peak_memory_bytes"])),
        " | ".join(percent(share, 0) for share in result["wait_share"]),
        " | ".join(map(traffic, result["bytes_per_step"])),
        DASH if load is None else _median(load, _ratio),
    )


def _median(values: Mapping[str, Any], write: Callable[[float], str]) -> str:
    if values["n"] == 1:
        return write(values["median"])
    return f"{write(values['median'])} ({write(values['min'])}-{write(values['max'])})"


def _ratio(value: float) -> str:
    return f"{value:.2f}"
