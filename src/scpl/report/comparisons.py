"""Pictures of several runs: accuracy against wall-clock time and against epochs, and outcomes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from scpl.report.formats import TIMES, time_axis
from scpl.report.groups import Group, group_runs
from scpl.report.outcomes import outcome_panels, outcome_words
from scpl.report.panels import Panel, balanced
from scpl.report.reading import RunRecord
from scpl.report.style import (
    Styles,
    method_styles,
    percent_axis,
    short_label,
    side_legend,
    whole_axis,
)

__all__ = ["comparison_panels", "mean_curve"]

Points = dict[float, tuple[float, float]]  # epoch to x and accuracy in percent


def comparison_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """List the pictures the runs have data for."""
    groups = group_runs([run.summary for run in runs])
    styles = method_styles([g.label for g in groups], [g.method for g in groups])
    by_group = {group.label: [runs[i] for i in group.members] for group in groups}
    curves = _accuracy_panels(groups, by_group, styles)
    return balanced([*curves, *outcome_panels(groups, styles)])


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
    by_group: dict[str, list[RunRecord]],
    styles: Styles,
) -> Iterator[Panel]:
    ends = "; ".join(outcome_words(group) for group in groups)
    several = any(len(group.members) > 1 for group in groups)
    for against, title, caption, band in (
        (
            "seconds",
            "Validation accuracy against wall-clock time",
            "Time since training began, data loading and evaluation included."
            + (" Thin lines: single seeds; thick: their mean, epoch by epoch." if several else ""),
            False,
        ),
        (
            "epoch",
            "Validation accuracy per epoch",
            "The same runs without the time they took."
            + (" Line: mean over the seeds; band: lowest to highest." if several else ""),
            True,
        ),
    ):
        curves = {label: _points(runs, against) for label, runs in by_group.items()}
        if any(curves.values()):
            yield Panel(
                name=f"accuracy-{against}",
                title=title,
                caption=caption,
                alternative=f"Line chart: {title.lower()}, one line per method. {ends}.",
                draw=_Accuracy(curves, styles, against, band),
                height=4.4 if against == "seconds" else 3.7,
                wide=against == "seconds",
            )


def _points(runs: Sequence[RunRecord], against: str) -> list[Points]:
    found = []
    for run in runs:
        columns = map(run.column, ("epoch", against, "valid_accuracy"))
        rows = zip(*columns, strict=True)
        found.append({epoch: (x, 100 * y) for epoch, x, y in rows if math.isfinite(epoch + x + y)})
    return [points for points in found if points]


class _Accuracy:
    def __init__(
        self,
        curves: dict[str, list[Points]],
        styles: Styles,
        against: str,
        band: bool,
    ) -> None:
        self.curves, self.styles, self.against, self.band = curves, styles, against, band

    def __call__(self, axes: Any) -> None:
        every = [x for runs in self.curves.values() for run in runs for x, _ in run.values()]
        scale, unit = time_axis(every) if self.against == "seconds" else (1.0, "")
        for label, runs in self.curves.items():
            if runs:
                self._draw(axes, label, runs, scale)
        percent_axis(axes)
        if self.against == "seconds":
            axes.set_xlabel(f"wall-clock time ({unit})")
            axes.set_xlim(left=0)
        else:
            whole_axis(axes, "epoch")
        side_legend(axes)

    def _draw(self, axes: Any, label: str, runs: list[Points], scale: float) -> None:
        colour, dashes = self.styles[label]
        mean = mean_curve(runs)
        xs, ys = [x / scale for x, _ in mean.values()], [y for _, y in mean.values()]
        if len(runs) > 1 and self.band:
            columns = [[run[epoch][1] for run in runs] for epoch in mean]
            low, high = list(map(min, columns)), list(map(max, columns))
            axes.fill_between(xs, low, high, color=colour, alpha=0.16, linewidth=0)
        elif len(runs) > 1:
            for run in runs:
                single = [x / scale for x, _ in run.values()], [y for _, y in run.values()]
                axes.plot(*single, color=colour, linewidth=0.8, alpha=0.4)
        shown = short_label(label) + (f"  {TIMES}{len(runs)}" if len(runs) > 1 else "")
        style = {"color": colour, "linestyle": dashes, "linewidth": 2.2, "label": shown}
        axes.plot(xs, ys, marker="o", markersize=3.2 if len(xs) <= 40 else 0, **style)
