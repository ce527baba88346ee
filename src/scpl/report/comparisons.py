"""Pictures of several runs: accuracy against wall-clock time and against epochs, and outcomes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scpl.report.depth import depth_panels
from scpl.report.formats import TIMES, percent, time_axis
from scpl.report.groups import Group, Sample, group_runs
from scpl.report.outcomes import outcome_panels, outcome_words, throughput_panels
from scpl.report.panels import Panel, balanced
from scpl.report.reading import RunRecord
from scpl.report.side_by_side import side_by_side_panels
from scpl.report.style import (
    INK,
    MUTED,
    Style,
    Styles,
    method_styles,
    percent_axis,
    short_label,
    side_legend,
    spread,
    whole_axis,
)
from scpl.report.target import Target

__all__ = ["comparison_panels", "mean_curve"]

Points = dict[float, tuple[float, float]]  # epoch to x and accuracy in percent
Ends = dict[str, list[tuple[float, float]]]  # label to seconds and test accuracy in percent


def comparison_panels(runs: Sequence[RunRecord], target: Target | None = None) -> list[Panel]:
    """List the pictures the runs have data for."""
    groups = group_runs([run.summary for run in runs])
    styles = method_styles([g.label for g in groups], [g.method for g in groups])
    by_group = {group.label: [runs[i] for i in group.members] for group in groups}
    panels = [
        *_accuracy_panels(groups, by_group, styles, target),
        *throughput_panels(groups, styles),
        *depth_panels(groups, styles),
        *side_by_side_panels(by_group),
        *outcome_panels(groups, styles, target),
    ]
    return balanced(panels)


def mean_curve(runs: Sequence[Points]) -> Points:
    """Average runs epoch by epoch, over the epochs that all of them have."""
    common = [epoch for epoch in runs[0] if all(epoch in run for run in runs)]
    return {
        epoch: (
            statistics.fmean(run[epoch][0] for run in runs),
            statistics.fmean(run[epoch][1] for run in runs),
        )
        for epoch in common
    }


def _accuracy_panels(
    groups: Sequence[Group],
    by_group: Mapping[str, Sequence[RunRecord]],
    styles: Styles,
    target: Target | None,
) -> Iterator[Panel]:
    words = "; ".join(outcome_words(group) for group in groups)
    several = any(len(group.members) > 1 for group in groups)
    against_time = {label: _points(runs, "seconds") for label, runs in by_group.items()}
    against_epoch = {label: _points(runs, "epoch") for label, runs in by_group.items()}
    ends = {label: _ends(runs) for label, runs in by_group.items()}
    floor = _floor(against_epoch, ends)
    cut = "" if floor is None else f" Cut off below {floor:.0f} %."
    if any(against_time.values()) or any(ends.values()):
        yield Panel(
            name="accuracy-seconds",
            title="Accuracy against wall-clock time",
            caption="Lines: validation accuracy; time since training began, data loading and "
            "validation included. Large marks: test accuracy at the end."
            + (" Thin and small: single seeds; thick and large: their mean." if several else "")
            + cut,
            alternative=f"Line chart of accuracy against wall-clock time. {words}.",
            draw=_AgainstTime(against_time, ends, styles, target, floor),
            height=max(4.6, 1.2 + 0.26 * len(groups)),
            wide=True,
        )
    if any(against_epoch.values()):
        height = max(3.7, 1.2 + 0.2 * len(groups))
        yield Panel(
            name="accuracy-epoch",
            title="Validation accuracy per epoch",
            caption="The same runs without the time they took."
            + (" Line: mean over the seeds; band: lowest to highest." if several else "")
            + cut,
            alternative=f"Line chart of validation accuracy against epochs. {words}.",
            draw=_AgainstEpochs(against_epoch, styles, height, floor),
            height=height,
        )


def _floor(curves: Mapping[str, Sequence[Points]], ends: Ends) -> float | None:
    """Choose where to cut pictures off below, so that the ends of the runs can be told apart.

    Returns:
        Accuracy in percent; None if nothing has to be cut off.
    """
    every = [[y for _, y in run.values()] for runs in curves.values() for run in runs]
    final = [ys[-1] for ys in every] + [y for marks in ends.values() for _, y in marks]
    if not every or not final:
        return None
    room = max(10.0, 3 * (max(final) - min(final)))
    floor = 5.0 * math.floor((min(final) - room) / 5)
    return floor if min(map(min, every)) < floor else None


def _points(runs: Sequence[RunRecord], against: str) -> list[Points]:
    found = []
    for run in runs:
        columns = map(run.column, ("epoch", against, "valid_accuracy"))
        rows = zip(*columns, strict=True)
        found.append({epoch: (x, 100 * y) for epoch, x, y in rows if math.isfinite(epoch + x + y)})
    return [points for points in found if points]


def _ends(runs: Sequence[RunRecord]) -> list[tuple[float, float]]:
    pairs = [(run.number("wall_seconds"), 100 * run.number("test_accuracy")) for run in runs]
    return [pair for pair in pairs if math.isfinite(sum(pair))]


_DOTTED: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (2, 3))}


class _AgainstTime:
    def __init__(
        self,
        curves: Mapping[str, list[Points]],
        ends: Ends,
        styles: Styles,
        target: Target | None,
        floor: float | None,
    ) -> None:
        self.curves, self.ends, self.styles = curves, ends, styles
        self.target, self.floor = target, floor

    def __call__(self, axes: Any) -> None:
        from matplotlib.lines import Line2D

        moments = [x for runs in self.curves.values() for run in runs for x, _ in run.values()]
        moments += [x for marks in self.ends.values() for x, _ in marks]
        scale, unit = time_axis(moments)
        drawn = [label for label in self.curves if self.curves[label] or self.ends[label]]
        for label in drawn:
            _lines(axes, self.styles[label], self.curves[label], scale)
            self._marks(axes, label, scale)
        if self.target is not None:
            reached = 100 * self.target.accuracy
            axes.axhline(reached, zorder=0, **_DOTTED)
        percent_axis(axes, self.floor)
        axes.set_xlabel(f"wall-clock time ({unit})")
        axes.set_xlim(left=0)
        drawn.sort(key=self._final, reverse=True)
        handles = [
            Line2D([], [], color=s.colour, linestyle=s.line, marker=s.mark, label=text, linewidth=2)
            for s, text in ((self.styles[label], self._text(label)) for label in drawn)
        ]
        if self.target is not None:
            handles.append(Line2D([], [], label=f"target {self.target.words}", **_DOTTED))
        side_legend(axes, handles, title="by test accuracy" if any(self.ends.values()) else None)

    def _marks(self, axes: Any, label: str, scale: float) -> None:
        colour, _, mark = self.styles[label]
        every = self.ends[label]
        if len(every) > 1:
            xs, ys = [x / scale for x, _ in every], [y for _, y in every]
            axes.scatter(xs, ys, s=16, color=colour, marker=mark, alpha=0.5, linewidths=0, zorder=4)
        if every:
            x, y = (statistics.fmean(column) for column in zip(*every, strict=True))
            style = {"color": colour, "marker": mark, "edgecolors": "white", "linewidths": 1.0}
            axes.scatter([x / scale], [y], s=95, zorder=6, **style)

    def _final(self, label: str) -> float:
        sample = Sample.of(y for _, y in self.ends[label])
        return sample.mean if len(sample) else -math.inf

    def _text(self, label: str) -> str:
        marks = self.ends[label]
        times = f" {TIMES}{len(marks)}" if len(marks) > 1 else ""
        end = f"  {percent(self._final(label) / 100)}" if marks else ""
        return f"{short_label(label)}{times}{end}"


class _AgainstEpochs:
    def __init__(
        self,
        curves: Mapping[str, list[Points]],
        styles: Styles,
        height: float,
        floor: float | None,
    ) -> None:
        self.curves = {label: runs for label, runs in curves.items() if runs}
        self.styles, self.height, self.floor = styles, height, floor

    def __call__(self, axes: Any) -> None:
        for label, runs in self.curves.items():
            mean = mean_curve(runs)
            if len(runs) > 1:
                columns = [[run[epoch][1] for run in runs] for epoch in mean]
                low, high = list(map(min, columns)), list(map(max, columns))
                colour = self.styles[label].colour
                axes.fill_between(list(mean), low, high, color=colour, alpha=0.14, linewidth=0)
            _mean_line(axes, self.styles[label], mean, 1.0)
        percent_axis(axes, self.floor)
        whole_axis(axes, "epoch")
        self._name_ends(axes)

    def _name_ends(self, axes: Any) -> None:
        """Write each name at the height where its line ends, as far apart as text must be."""
        last = {label: list(mean_curve(runs).values())[-1] for label, runs in self.curves.items()}
        low, high = axes.get_ylim()
        gap = (high - low) * 0.17 / (self.height - 0.8)  # inches per line of text
        heights = spread([y for _, y in last.values()], gap)
        for (label, point), height in zip(last.items(), heights, strict=True):
            colour = self.styles[label].colour
            axes.annotate(
                short_label(label, 18),
                point,
                xytext=(1.06, height),
                textcoords=("axes fraction", "data"),
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1},
                annotation_clip=False,
                va="center",
                color=INK,
                fontsize=8.5,
            )


def _lines(axes: Any, style: Style, runs: Sequence[Points], scale: float) -> None:
    if len(runs) > 1:
        for run in runs:
            single = [x / scale for x, _ in run.values()], [y for _, y in run.values()]
            axes.plot(*single, color=style.colour, linewidth=0.7, alpha=0.35)
    if runs:
        _mean_line(axes, style, mean_curve(runs), scale)


def _mean_line(axes: Any, style: Style, mean: Points, scale: float) -> None:
    xs, ys = [x / scale for x, _ in mean.values()], [y for _, y in mean.values()]
    size = 3.4 if len(xs) <= 40 else 0
    axes.plot(xs, ys, color=style.colour, linestyle=style.line, linewidth=2.0,
              marker=style.mark, markersize=size)  # fmt: skip
