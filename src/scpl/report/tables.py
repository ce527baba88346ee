"""Tables of plain text, for terminals; among them that of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scpl.report.formats import DASH, TIMES, count, memory, percent, traffic
from scpl.report.groups import BASELINE

__all__ = ["aligned", "one_line", "throughput_table", "widths_of"]


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
    table = [[row[c].rjust(widths[c]) for c in columns] for row in rows]
    for shown, row in zip(table, rows, strict=True):
        shown[0] = row[0].ljust(widths[0])
    table.insert(1, ["-" * widths[c] for c in columns])
    return "\n".join("  ".join(row).rstrip() for row in table)


def throughput_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Compare methods in a table of plain text: samples per second and their ratios.

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
