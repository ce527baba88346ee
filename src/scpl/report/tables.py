"""The table of a comparison: one row per method, accuracy and time side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scpl.report.columns import aligned, widths_of
from scpl.report.formats import DASH, count, memory, percent, traffic
from scpl.report.groups import BASELINE, Group, Sample, baseline, group_runs, paired_ratio
from scpl.report.target import SECONDS_TO_TARGET, Target

__all__ = ["Absent", "ComparisonTable", "comparison_table"]


@dataclass(frozen=True)
class Absent:
    """A run that is missing from a comparison.

    Attributes:
        run: Name of the run, or the method if none of its runs could begin.
        reason: Why, in one sentence.
        failed: True: it began and broke; False: the method cannot run in this setting.
    """

    run: str
    reason: str
    failed: bool

    @property
    def words(self) -> str:
        """What happened to it."""
        return f"{'failed' if self.failed else 'cannot run here'}: {self.reason}"


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[Group], str]
    note: str


class ComparisonTable:
    """What runs came to, by method; columns that no run has a value for are left out.

    Args:
        summaries: What the ``summary.json`` of each run holds.
        target: The accuracy of the column ``seconds to ...``.
        absent: Runs that are missing.
    """

    def __init__(
        self,
        summaries: Sequence[Mapping[str, Any]],
        target: Target | None = None,
        absent: Sequence[Absent] = (),
    ) -> None:
        groups = group_runs(summaries)
        rows = [[(column, column.cell(group)) for column in _columns(groups, target)]
                for group in groups]  # fmt: skip
        used = {column.title for row in rows for column, cell in row if cell != DASH}
        kept = [column for column, _ in rows[0] if column.title in used] if rows else []
        self.header = ("method", *(column.title for column in kept))
        self.rows = [
            (group.label, *(cell for column, cell in row if column.title in used))
            for group, row in zip(groups, rows, strict=True)
        ]
        self.notes = tuple(column.note for column in kept if column.note)
        self.absent = tuple(absent)

    @property
    def footnote(self) -> str:
        """How the columns were measured."""
        return " ".join(self.notes)

    def markdown(self) -> str:
        """Write a Markdown table."""
        empty = [""] * (len(self.header) - 2)
        lines = [[_cell(text) for text in row] for row in (self.header, *self.rows)]
        lines += [[_cell(absent.run), _cell(absent.words), *empty] for absent in self.absent]
        lines.insert(1, ["---", *["---:"] * (len(self.header) - 1)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{self.footnote}\n"

    def text(self, width: int | None = None) -> str:
        """Write aligned columns, as several tables if they are wider than ``width``."""
        clean = [[_one_line(text) for text in row] for row in (self.header, *self.rows)]
        widths = widths_of(clean)
        tables = [aligned(clean, widths, columns) for columns in _pages(widths, width)]
        return "\n\n".join([*tables, *self._missing(width)]) + "\n"

    def _missing(self, width: int | None) -> Iterator[str]:
        if not self.absent:
            return
        names = [_one_line(absent.run) for absent in self.absent]
        indent = max(map(len, names)) + 2
        room = max(40, (width or 100))
        lines = [
            textwrap.fill(
                _one_line(absent.words),
                room,
                initial_indent=name.ljust(indent),
                subsequent_indent=" " * indent,
                break_on_hyphens=False,
            )
            for name, absent in zip(names, self.absent, strict=True)
        ]
        yield "\n".join(lines)


def comparison_table(
    summaries: Sequence[Mapping[str, Any]], markdown: bool = False, width: int | None = None
) -> str:
    """Compare runs in a table of plain text or Markdown, one row per method.

    Args:
        summaries: What the ``summary.json`` of each run holds.
        markdown: Whether to write a Markdown table instead of aligned columns.
        width: Characters per line of the plain text; default: as many as it takes.
    """
    table = ComparisonTable(summaries)
    return table.markdown() if markdown else table.text(width)


def _columns(groups: Sequence[Group], target: Target | None) -> Iterator[_Column]:
    rivals = baseline(groups)
    yield _Column("runs", lambda group: str(len(group.summaries)), "")
    if len({epochs for group in groups for epochs in group.sample("epochs").values}) > 1:
        yield _Column(
            "epochs",
            lambda group: median_with_range(group.sample("epochs"), count),
            "Epochs: passes over the training samples; the schedule of a run spans them.",
        )
    yield _Column(
        "test accuracy",
        lambda group: accuracy_with_deviation(group.sample("test_accuracy")),
        "Accuracy: mean ± standard deviation over the seeds, of the last epoch.",
    )
    yield _Column(
        "seconds",
        lambda group: median_with_range(group.sample("wall_seconds"), _seconds),
        "Seconds: wall-clock time of the training, data loading and validation included. Times "
        "and rates: median (lowest-highest).",
    )
    if target is not None:
        yield _Column(
            f"seconds to {target.words}",
            _time_to_target,
            f"Seconds to {target.words}: until the validation accuracy was that "
            f"high ({target.origin}), on a straight line between the ends of two epochs; at the "
            "earliest the end of the first.",
        )
    yield _Column(
        "samples/s", lambda group: median_with_range(group.sample("samples_per_second"), count), ""
    )
    if rivals:
        yield _Column(
            "ratio to bp",
            lambda group: _ratio(group, rivals),
            "Ratio: samples/s against bp, run by run with the same data, network and seed.",
        )
    yield _Column("peak memory", _memory, "Memory: largest process (all processes together).")
    yield _Column(
        "sent per step",
        lambda group: median_with_range(group.traffic(), traffic),
        "Sent: bytes from process to process per training step, all processes together.",
    )
    yield _Column(
        "waiting",
        _waiting,
        "Waiting: share of the time in which a stage had nothing to do, mean (most) of the stages.",
    )


def _time_to_target(group: Group) -> str:
    if not any(SECONDS_TO_TARGET in summary for summary in group.summaries):
        return DASH
    sample, runs = group.sample(SECONDS_TO_TARGET), len(group.summaries)
    if not len(sample):
        return "not reached"
    share = "" if len(sample) == runs else f", {len(sample)} of {runs}"
    return f"{median_with_range(sample, _seconds)}{share}"


def _ratio(group: Group, rivals: Sequence[Group]) -> str:
    if group.method == BASELINE:
        return "1 (reference)"
    return median_with_range(paired_ratio(group, rivals), lambda value: f"{value:.2f}")


def _memory(group: Group) -> str:
    largest, together = group.memory()
    one = memory(largest.median)
    several = together.median > largest.median
    return f"{one} ({memory(together.median)})" if several else one


def _waiting(group: Group) -> str:
    mean, most = group.waiting()
    one = percent(mean.median, 0)
    return f"{one} ({percent(most.median, 0)})" if most.median > mean.median else one


def accuracy_with_deviation(sample: Sample) -> str:
    """Write mean and standard deviation: ``91.2 ± 0.3 %``."""
    if math.isnan(sample.sd):
        return percent(sample.mean, 2)
    return f"{100 * sample.mean:.2f} ± {100 * sample.sd:.2f} %"


def median_with_range(sample: Sample, write: Callable[[float], str]) -> str:
    """Write the median, and the range where there is more than one value."""
    if not len(sample):
        return DASH
    low, high = write(sample.low), write(sample.high)
    return f"{write(sample.median)} ({low}-{high})" if low != high else low


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _pages(widths: Sequence[int], width: int | None) -> Iterator[list[int]]:
    """Share out the columns so that no table is too wide; the first column begins each."""
    columns: list[int] = []
    for column in range(1, len(widths)):
        if columns and width and _total(widths, [0, *columns, column]) > width:
            yield [0, *columns]
            columns = []
        columns.append(column)
    yield [0, *columns]


def _total(widths: Sequence[int], columns: Sequence[int]) -> int:
    return sum(widths[column] + 2 for column in columns) - 2


def _one_line(text: str) -> str:
    """Keep a name from breaking the table or steering the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _cell(text: str) -> str:
    escaped = _one_line(text).replace("\\", "\\\\").replace("|", "\\|")
    return escaped.replace("<", "&lt;")
