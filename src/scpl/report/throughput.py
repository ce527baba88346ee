"""The table of a benchmark: one row per method, samples per second and their ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scpl.report.columns import aligned, widths_of
from scpl.report.formats import DASH, TIMES, count, memory, percent, traffic
from scpl.report.groups import BASELINE

__all__ = ["throughput_table"]


def throughput_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Compare methods in a table of plain text.

    Args:
        results: What `scpl bench` measured: `samples_per_second`, `ratio_to` and the rest.
    """
    methods = [result["method"] for result in results]
    reference = BASELINE if BASELINE in methods else methods[0]
    header = (
        "method",
        f"processes {TIMES} threads",
        "samples/s",
        f"ratio to {reference}",
        "peak memory",
        "waiting",
        "sent per step",
        "other load",
    )
    rows = [_row(result, reference) for result in results]
    num_rounds = results[0]["samples_per_second"]["n"]
    note = (
        f"Samples/s and ratios: median (lowest-highest) of {num_rounds} rounds; a ratio is taken "
        "round by round.\n"
        "Memory, waiting and bytes sent to other processes: one number per process. Other load: "
        "cores that other\nprograms used meanwhile."
    )
    lines = (header, *rows)
    return f"{aligned(lines, widths_of(lines), range(len(header)))}\n\n{note}\n"


def _row(result: Mapping[str, Any], reference: str) -> tuple[str, ...]:
    is_reference = result["method"] == reference
    load = result["other_load"]
    return (
        result["method"],
        f"{result['processes']} {TIMES} {result['threads']}",
        _spread(result["samples_per_second"], count),
        "1 (reference)" if is_reference else _spread(result["ratio_to"][reference], _ratio),
        " | ".join(map(memory, result["peak_memory_bytes"])),
        " | ".join(percent(share, 0) for share in result["wait_share"]),
        " | ".join(map(traffic, result["bytes_per_step"])),
        DASH if load is None else _spread(load, _ratio),
    )


def _spread(values: Mapping[str, Any], write: Callable[[float], str]) -> str:
    if values["n"] == 1:
        return write(values["median"])
    return f"{write(values['median'])} ({write(values['min'])}-{write(values['max'])})"


def _ratio(value: float) -> str:
    return f"{value:.2f}"
