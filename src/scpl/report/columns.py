"""Columns of plain text, for terminals."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned", "widths_of"]


def widths_of(lines: Sequence[Sequence[str]]) -> list[int]:
    """Characters of the widest cell of each column."""
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def aligned(lines: Sequence[Sequence[str]], widths: Sequence[int], columns: Sequence[int]) -> str:
    """Write some columns of a table; all but the first stand to the right.

    Args:
        lines: Cells; the first line is the header, which is underlined.
        widths: Characters of each column of ``lines``.
        columns: Which of them to write, the first one first.
    """
    table = [[line[c].rjust(widths[c]) for c in columns] for line in lines]
    for line, full in zip(table, lines, strict=True):
        line[0] = full[0].ljust(widths[0])
    table.insert(1, ["-" * widths[c] for c in columns])
    return "\n".join("  ".join(line).rstrip() for line in table)
