"""A comparison: its runs, the accuracy they must reach, and what they came to, by method.

Accuracy (of other tasks than classes: the main metric) is known at the end of each epoch, where the
validation samples were predicted. Between two such moments it is taken to move along a straight
line; before the first of them nothing is known, so a run that is good enough there counts as having
needed all of its first epoch.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from scpl.errors import InputError
from scpl.report.formats import DASH, aligned, count, memory, one_line, percent, traffic, widths_of
from scpl.report.groups import BASELINE, Group, Sample, baseline, group_runs, paired_ratio
from scpl.runs import RunRecord
from scpl.runs.columns import SECONDS
from scpl.runs.metrics import METRICS, Metric, metric_of

__all__ = [
    "SECONDS_TO_TARGET",
    "Absent",
    "Comparison",
    "ComparisonTable",
    "Target",
    "choose_target",
    "comparison_results",
    "metric_of_runs",
    "seconds_to",
]

SECONDS_TO_TARGET = "seconds_to_target"
SHARE = 0.99  # of the accuracy that every seed of the baseline reaches


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
class Target:
    """A validation accuracy to reach, or another metric.

    Attributes:
        score: Its value.
        origin: Where the number comes from, in words.
        metric: Which metric.
    """

    score: float
    origin: str
    metric: Metric = METRICS["accuracy"]

    @property
    def words(self) -> str:
        """The value as people read it."""
        digits = 2 if round(self.score * 1000) != self.score * 1000 else 1
        return self.metric.write(self.score, digits)


@dataclass(frozen=True)
class Comparison:
    """Runs of several methods on the same network and data.

    Attributes:
        title: Heading of the report.
        runs: The runs; with a target, their summaries hold ``seconds_to_target``.
        target: The accuracy to reach; None if the runs were not validated.
        absent: Runs that are missing, and why.
        command: The command line that made it.
    """

    title: str
    runs: tuple[RunRecord, ...]
    target: Target | None = None
    absent: tuple[Absent, ...] = ()
    command: str = ""

    @classmethod
    def read(
        cls,
        folders: Sequence[Path],
        title: str = "Comparison of methods",
        *,
        target: float | None = None,
        absent: Sequence[Absent] = (),
        command: str = "",
    ) -> Comparison:
        """Read run folders.

        Args:
            folders: Runs; those that differ only in their seed are put together.
            title: Heading of the report.
            target: Accuracy (or main metric) to reach; default: chosen from the runs.
            absent: Runs that are missing, and why.
            command: The command line that made it.

        Raises:
            InputError: There is no run, or a folder is not a run folder or is damaged.
        """
        if not folders:
            raise InputError("A comparison needs at least one run folder", "Got none")
        runs = [RunRecord.read(folder) for folder in folders]
        chosen = choose_target(runs, target)
        if chosen is not None:
            runs = [
                replace(run, summary={**run.summary, SECONDS_TO_TARGET: seconds})
                for run in runs
                for seconds in (seconds_to(run, chosen.score),)
            ]
        return cls(title, tuple(runs), chosen, tuple(absent), command)

    @property
    def summaries(self) -> list[Mapping[str, Any]]:
        """What the ``summary.json`` of each run holds."""
        return [run.summary for run in self.runs]

    @property
    def groups(self) -> list[Group]:
        """The runs by method."""
        return group_runs(self.summaries)

    def table(self) -> ComparisonTable:
        """Put the results into one row per method."""
        return ComparisonTable(self.summaries, self.target, self.absent)

    def results(self) -> list[dict[str, Any]]:
        """Give the results as JSON values, one per method."""
        return comparison_results(self.summaries)


def choose_target(runs: Sequence[RunRecord], wanted: float | None = None) -> Target | None:
    """Take the accuracy that was asked for, or one that plain backpropagation surely reaches.

    Returns:
        The target; None if no run was validated.
    """
    last = [
        (run.summary.get("method"), curve[-1][1]) for run in runs if (curve := _score_curve(run))
    ]
    if not last:
        return None
    metric = runs[0].metric
    if wanted is not None:
        return Target(wanted, "as asked for", metric)
    rivals = [score for method, score in last if method == BASELINE]
    whose = BASELINE if rivals else "any method"
    lowest = min(rivals or [score for _, score in last])
    share = SHARE if lowest > 0 else 1 / SHARE  # of what is below zero, more is less
    return Target(
        math.floor(1e4 * share * lowest) / 1e4,
        f"{percent(SHARE, 0)} of the lowest validation {metric.title} that a run of {whose} ended "
        "with",
        metric,
    )


def seconds_to(run: RunRecord, score: float) -> float | None:
    """Seconds from the start until a run's validation was that good; None for never."""
    curve = _score_curve(run)
    if curve and curve[0][1] >= score:
        return curve[0][0]
    for (begin, low), (end, high) in pairwise(curve):
        if low < score <= high:
            return begin + (end - begin) * (score - low) / (high - low)
    return None


def _score_curve(run: RunRecord) -> list[tuple[float, float]]:
    """Seconds and main metric of the validation at the end of each epoch."""
    rows = zip(run.column(SECONDS), run.column(run.valid_column), strict=True)
    return [(x, y) for x, y in rows if math.isfinite(x + y)]


class _Column(NamedTuple):
    title: str
    cell: Callable[[Group], str]
    note: str = ""


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
        columns = {c: [c.cell(group) for group in groups] for c in _columns(groups, target)}
        columns = {c: cells for c, cells in columns.items() if set(cells) - {DASH}}
        self.header = ("method", *(column.title for column in columns))
        self.rows = list(zip((group.label for group in groups), *columns.values(), strict=True))
        self.footnote = " ".join(column.note for column in columns if column.note)
        self.absent = tuple(absent)

    def text(self, width: int | None = None) -> str:
        """Write aligned columns, as several tables if they are wider than ``width``."""
        clean = [list(map(one_line, row)) for row in (self.header, *self.rows)]
        widths = widths_of(clean)
        tables = [aligned(clean, widths, columns) for columns in _fitting(widths, width)]
        names = [one_line(absent.run) for absent in self.absent]
        indent = max(map(len, names), default=0) + 2
        lines = [
            textwrap.fill(
                one_line(absent.words),
                max(40, (width or 100)),
                initial_indent=name.ljust(indent),
                subsequent_indent=" " * indent,
                break_on_hyphens=False,
            )
            for name, absent in zip(names, self.absent, strict=True)
        ]
        missing = ["\n".join(lines)] if lines else []
        return "\n\n".join([*tables, *missing]) + "\n"


def _columns(groups: Sequence[Group], target: Target | None) -> Iterator[_Column]:
    def median(key: str, write: Callable[[float], str]) -> Callable[[Group], str]:
        return lambda group: _median_with_range(group.sample(key), write)

    rivals = baseline(groups)
    yield _Column("runs", lambda group: str(len(group.summaries)))
    if len({epochs for group in groups for epochs in group.sample("epochs").values}) > 1:
        yield _Column(
            "epochs",
            median("epochs", count),
            "Epochs: passes over the training samples; the schedule of a run spans them.",
        )
    main = metric_of_runs(groups)
    for metric in (main, *(each for each in METRICS.values() if each is not main)):
        yield _Column(
            f"test {metric.title}",
            partial(_mean_with_deviation, metric=metric),
            f"{metric.title[0].upper()}{metric.title[1:]}: mean ± standard deviation over the "
            "seeds, of the last epoch."
            if metric is main
            else "",
        )
    yield _Column(
        "seconds",
        median("wall_seconds", _seconds),
        "Seconds: wall-clock time of the training, data loading and validation included. Times "
        "and rates: median (lowest-highest).",
    )
    if target is not None:
        yield _Column(
            f"seconds to {target.words}",
            _time_to_target,
            f"Seconds to {target.words}: until the validation {target.metric.title} was that "
            f"high ({target.origin}), on a straight line between the ends of two epochs; at the "
            "earliest the end of the first.",
        )
    yield _Column("samples/s", median("samples_per_second", count))
    if rivals:
        yield _Column(
            f"ratio to {BASELINE}",
            lambda group: _ratio(group, rivals),
            f"Ratio: samples/s against {BASELINE}, run by run with the same data, network and "
            "seed.",
        )
    yield _Column(
        "peak memory",
        lambda group: _two(group.memory(), memory),
        "Memory: largest process (all processes together).",
    )
    yield _Column(
        "sent per step",
        lambda group: _median_with_range(group.traffic(), traffic),
        "Sent: bytes from process to process per training step, all processes together.",
    )
    yield _Column(
        "waiting",
        lambda group: _two(group.waiting(), lambda share: percent(share, 0)),
        "Waiting: share of the time in which a stage had nothing to do, mean (most) of the stages.",
    )


def _time_to_target(group: Group) -> str:
    if not any(SECONDS_TO_TARGET in summary for summary in group.summaries):
        return DASH
    sample, runs = group.sample(SECONDS_TO_TARGET), len(group.summaries)
    if not len(sample):
        return "not reached"
    share = "" if len(sample) == runs else f", {len(sample)} of {runs}"
    return f"{_median_with_range(sample, _seconds)}{share}"


def _ratio(group: Group, rivals: Sequence[Group]) -> str:
    if group.method == BASELINE:
        return "1 (reference)"
    return _median_with_range(paired_ratio(group, rivals), lambda value: f"{value:.2f}")


def _two(samples: tuple[Sample, Sample], write: Callable[[float], str]) -> str:
    """Write the median of one sample, and that of another where it is larger."""
    one, other = (sample.median for sample in samples)
    return f"{write(one)} ({write(other)})" if other > one else write(one)


def metric_of_runs(groups: Sequence[Group]) -> Metric:
    """Find the main metric of runs that are compared; runs of earlier versions do not name it."""
    named = [summary.get("metric") for group in groups for summary in group.summaries]
    return metric_of(next((name for name in named if name), "accuracy"))


def _mean_with_deviation(group: Group, metric: Metric) -> str:
    """Write mean and standard deviation of a metric: ``91.20 ± 0.30 %``."""
    sample = group.sample(f"test_{metric.name}")
    if math.isnan(sample.sd):
        return metric.write(sample.mean)
    mean, deviation, unit = (
        metric.write(sample.mean),
        metric.write(sample.sd),
        " %" * metric.is_share,
    )
    return f"{mean.removesuffix(unit)} ± {deviation.removesuffix(unit)}{unit}"


def _median_with_range(sample: Sample, write: Callable[[float], str]) -> str:
    """Write the median, and the range where there is more than one value."""
    if not len(sample):
        return DASH
    low, high = write(sample.low), write(sample.high)
    return f"{write(sample.median)} ({low}-{high})" if low != high else low


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _fitting(widths: Sequence[int], width: int | None) -> Iterator[list[int]]:
    """Share out the columns so that no table is too wide; the first column begins each."""

    def total(columns: Sequence[int]) -> int:
        return sum(widths[column] + 2 for column in columns) - 2

    columns: list[int] = []
    for column in range(1, len(widths)):
        if columns and width and total([0, *columns, column]) > width:
            yield [0, *columns]
            columns = []
        columns.append(column)
    yield [0, *columns]


_SETTINGS = (
    "method", "data", "model", "stages", "processes", "epochs", "micro_batches", "task", "metric",
)  # fmt: skip


def comparison_results(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put runs that differ only in their seed together, one result per method.

    Args:
        summaries: What the ``summary.json`` of each run holds.

    Returns:
        Per method the settings of its runs; every measured key of the summaries as ``{"mean",
        "sd", "median", "min", "max", "n"}`` over the seeds (a list of these where a summary has a
        list, per process or stage); ``ratio_to``, the same of samples/s against every other
        method, paired by seed; the notes; and the summaries themselves under ``runs``.
    """
    groups = group_runs(summaries)
    return [_result(group, groups) for group in groups]


def _result(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    first = group.summaries[0]
    keys = dict.fromkeys(key for summary in group.summaries for key in summary)
    measured = {
        key: found
        for key in keys
        if key not in (*_SETTINGS, "seed")
        and (found := _statistics(group.summaries, key)) is not None
    }
    return {
        "label": group.label,
        **{key: first[key] for key in _SETTINGS if key in first},
        "seeds": [summary.get("seed") for summary in group.summaries],
        **measured,
        "ratio_to": {
            rival.label: ratio.statistics()
            for rival in groups
            if rival is not group and len(ratio := paired_ratio(group, [rival]))
        },
        "notes": group.notes(),
        "runs": [dict(summary) for summary in group.summaries],
    }


def _statistics(summaries: Sequence[Mapping[str, Any]], key: str) -> Any:
    """Give the statistics of one key; None if it holds no numbers."""
    values = [summary[key] for summary in summaries if summary.get(key) is not None]
    if not values and key == SECONDS_TO_TARGET:
        return Sample.of([]).statistics()  # nobody got there, which is a result
    if values and all(map(_is_number, values)):
        return Sample.of(values).statistics()
    if values and all(isinstance(value, list) and value for value in values):
        same_length = len({len(value) for value in values}) == 1
        if same_length and all(_is_number(item) for value in values for item in value):
            return [Sample.of(place).statistics() for place in zip(*values, strict=True)]
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
