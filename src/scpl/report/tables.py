"""The table of a comparison: one row per method, accuracy and time side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scpl.report.formats import DASH, count, memory, percent
from scpl.report.groups import BASELINE, Group, Sample, group_runs, paired_ratio

__all__ = ["FOOTNOTE", "comparison_rows", "comparison_table"]

FOOTNOTE = (
    "Accuracy: mean ± standard deviation over the seeds. "
    "Wall-clock seconds and rates: median (lowest-highest). "
    "Ratio: samples/s against bp, run by run with the same data, network and seed. "
    "Memory: largest process (all processes together)."
)
_HEADER = (
    "method",
    "runs",
    "test accuracy",
    "seconds",
    "samples/s",
    "ratio to bp",
    "peak memory",
)


def comparison_table(summaries: Sequence[Mapping[str, Any]], markdown: bool = False) -> str:
    """Compare runs in a table of plain text or Markdown, one row per method.

    Args:
        summaries: What the ``summary.json`` of each run holds.
        markdown: Whether to write a Markdown table instead of aligned columns.
    """
    header, rows = comparison_rows(summaries)
    if markdown:
        rule = ["---" if column == 0 else "---:" for column in range(len(header))]
        lines = [[_cell(text) for text in row] for row in (header, *rows)]
        lines.insert(1, rule)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{FOOTNOTE}\n"
    clean = [[_one_line(text) for text in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*clean, strict=True)]
    lines = [_aligned(row, widths) for row in clean]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines) + "\n"


def comparison_rows(
    summaries: Sequence[Mapping[str, Any]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Give the header and the cells; without a run of bp there is no column for the ratio."""
    groups = group_runs(summaries)
    has_baseline = any(group.method == BASELINE for group in groups)
    keep = [name != "ratio to bp" or has_baseline for name in _HEADER]
    table = [_HEADER, *(_row(group, groups) for group in groups)]
    kept = [tuple(c for c, kept in zip(row, keep, strict=True) if kept) for row in table]
    return kept[0], kept[1:]


def _row(group: Group, groups: Sequence[Group]) -> tuple[str, ...]:
    largest, together = group.memory()
    peak = memory(largest.median)
    if together.median > largest.median:
        peak = f"{peak} ({memory(together.median)})"
    ratio = paired_ratio(group, groups)
    is_baseline = group.method == BASELINE
    return (
        group.label,
        str(len(group.summaries)),
        accuracy_with_deviation(group.sample("test_accuracy")),
        median_with_range(group.sample("wall_seconds"), _seconds),
        median_with_range(group.sample("samples_per_second"), count),
        "1 (reference)" if is_baseline else median_with_range(ratio, lambda value: f"{value:.2f}"),
        peak,
    )


def accuracy_with_deviation(sample: Sample) -> str:
    """Write mean and standard deviation: ``91.2 ± 0.3 %``."""
    if math.isnan(sample.sd):
        return percent(sample.mean, 2)
    return f"{100 * sample.mean:.2f} ± {100 * sample.sd:.2f} %"


def median_with_range(sample: Sample, write: Callable[[float], str]) -> str:
    """Write the median, and the range where there is more than one value."""
    if len(sample) < 2:
        return write(sample.median) if len(sample) else DASH
    return f"{write(sample.median)} ({write(sample.low)}-{write(sample.high)})"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first = row[0].ljust(widths[0])
    return [first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def _one_line(text: str) -> str:
    """Keep a name from breaking the table or steering the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _cell(text: str) -> str:
    escaped = _one_line(text).replace("\\", "\\\\").replace("|", "\\|")
    return escaped.replace("<", "&lt;")
