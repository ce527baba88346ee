"""Pictures of several runs: accuracy against time and epochs, throughput, memory, traffic, waiting.

Runs that differ only in their seed are one group, with one colour and mark in all pictures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from scpl.report.comparison import SECONDS_TO_TARGET, Target, metric_of_runs
from scpl.report.formats import TIMES, count, duration, memory, percent, time_axis, traffic
from scpl.report.groups import BASELINE, Group, Sample, baseline, group_runs, paired_ratio
from scpl.report.panels import (
    INK,
    MUTED,
    Panel,
    Style,
    Styles,
    balanced,
    band,
    lane_axis,
    method_styles,
    moved_apart,
    score_axis,
    short_label,
    side_legend,
    small_marks,
    whole_axis,
)
from scpl.report.timelines import comparison_timelines
from scpl.runs import RunRecord
from scpl.runs.columns import EPOCH, SECONDS
from scpl.runs.metrics import METRICS, Metric

__all__ = ["comparison_panels", "mean_curve"]

Points = dict[float, tuple[float, float]]  # epoch to x and the main metric, shares in percent
Curves = Mapping[str, Sequence[Points]]  # label to one curve per run
Ends = Mapping[str, Sequence[tuple[float, float]]]  # label to seconds and test metric


def comparison_panels(runs: Sequence[RunRecord], target: Target | None = None) -> list[Panel]:
    """List the pictures the runs have data for."""
    groups = group_runs([run.summary for run in runs])
    styles = method_styles([g.label for g in groups], [g.method for g in groups])
    by_group = {group.label: [runs[i] for i in group.members] for group in groups}
    panels = [
        *_score_panels(groups, by_group, styles, target),
        *_throughput_panels(groups, styles),
        *_depth_panels(groups, styles),
        *comparison_timelines(by_group),
        *(_target_panels(groups, styles, target) if target else ()),
        *_cost_panels(groups, styles),
    ]
    return balanced(panels)


def mean_curve(runs: Sequence[Points]) -> Points:
    """Average runs epoch by epoch, over the epochs that all of them have."""
    common = [epoch for epoch in runs[0] if all(epoch in run for run in runs)]
    return {epoch: _middle([run[epoch] for run in runs]) for epoch in common}


def _middle(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    xs, ys = zip(*points, strict=True)
    return statistics.fmean(xs), statistics.fmean(ys)


# The main metric


def _score_panels(
    groups: Sequence[Group],
    by_group: Mapping[str, Sequence[RunRecord]],
    styles: Styles,
    target: Target | None,
) -> Iterator[Panel]:
    metric = metric_of_runs(groups)
    title = f"{metric.title[0].upper()}{metric.title[1:]}"
    words = "; ".join(
        f"{group.label}: test {metric.title} "
        f"{metric.write(group.sample(f'test_{metric.name}').mean, 1)}, "
        f"{duration(group.sample('wall_seconds').median)}"
        for group in groups
    )
    several = any(len(group.members) > 1 for group in groups)
    against_time = {label: _points(runs, SECONDS) for label, runs in by_group.items()}
    against_epoch = {label: _points(runs, EPOCH) for label, runs in by_group.items()}
    ends = {label: _ends(runs) for label, runs in by_group.items()}
    floor = _floor(against_epoch, ends) if metric.is_share else None
    cut = "" if floor is None else f" Cut off below {floor:.0f} %."
    if any(against_time.values()) or any(ends.values()):
        yield Panel(
            name="accuracy-seconds",
            title=f"{title} against wall-clock time",
            caption=f"Lines: validation {metric.title}; time since training began, data loading "
            f"and validation included. Large marks: test {metric.title} at the end."
            + (" Thin and small: single seeds; thick and large: their mean." if several else "")
            + cut,
            alternative=f"Line chart of {metric.title} against wall-clock time. {words}.",
            draw=partial(_draw_against_time, against_time, ends, styles, target, floor, metric),
            height=max(4.6, 1.2 + 0.26 * len(groups)),
            wide=True,
        )
    if any(against_epoch.values()):
        height = max(3.7, 1.2 + 0.2 * len(groups))
        yield Panel(
            name="accuracy-epoch",
            title=f"Validation {metric.title} per epoch",
            caption="The same runs without the time they took."
            + (" Line: mean over the seeds; band: lowest to highest." if several else "")
            + cut,
            alternative=f"Line chart of validation {metric.title} against epochs. {words}.",
            draw=partial(_draw_against_epochs, against_epoch, styles, height, floor, metric),
            height=height,
        )


def _floor(curves: Curves, ends: Ends) -> float | None:
    """Choose where to cut pictures off (in percent), so that the ends can be told apart."""
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
        rows = zip(*map(run.column, (EPOCH, against, run.valid_column)), strict=True)
        known = (row for row in rows if math.isfinite(sum(row)))
        found.append({epoch: (x, run.metric.scale * y) for epoch, x, y in known})
    return [points for points in found if points]


def _ends(runs: Sequence[RunRecord]) -> list[tuple[float, float]]:
    pairs = [
        (run.number("wall_seconds"), run.metric.scale * run.number(f"test_{run.metric.name}"))
        for run in runs
    ]
    return [pair for pair in pairs if math.isfinite(sum(pair))]


_DOTTED: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (2, 3))}


def _draw_against_time(
    curves: Curves,
    ends: Ends,
    styles: Styles,
    target: Target | None,
    floor: float | None,
    metric: Metric,
    axes: Any,
) -> None:
    from matplotlib.lines import Line2D

    moments = [x for runs in curves.values() for run in runs for x, _ in run.values()]
    moments += [x for marks in ends.values() for x, _ in marks]
    scale, unit = time_axis(moments)
    drawn = [label for label in curves if curves[label] or ends[label]]
    for label in drawn:
        _lines(axes, styles[label], curves[label], scale)
        _end_marks(axes, styles[label], ends[label], scale)
    if target is not None:
        axes.axhline(metric.scale * target.score, zorder=0, **_DOTTED)
    score_axis(axes, metric, floor)
    axes.set_xlabel(f"wall-clock time ({unit})")
    axes.set_xlim(left=0)
    final = {label: [y for _, y in ends[label]] for label in drawn}
    mean = {label: statistics.fmean(ys) for label, ys in final.items() if ys}
    handles = []
    for label in sorted(drawn, key=lambda label: mean.get(label, -math.inf), reverse=True):
        times = f" {TIMES}{len(final[label])}" if len(final[label]) > 1 else ""
        end = f"  {metric.write(mean[label] / metric.scale, 1)}" if label in mean else ""
        colour, line, mark = styles[label]
        look: dict[str, Any] = {"color": colour, "linestyle": line, "marker": mark, "linewidth": 2}
        handles.append(Line2D([], [], label=f"{short_label(label)}{times}{end}", **look))
    if target is not None:
        handles.append(Line2D([], [], label=f"target {target.words}", **_DOTTED))
    side_legend(axes, handles, title=f"by test {metric.title}" if any(ends.values()) else None)


def _lines(axes: Any, style: Style, runs: Sequence[Points], scale: float) -> None:
    if len(runs) > 1:
        for run in runs:
            single = [x / scale for x, _ in run.values()], [y for _, y in run.values()]
            axes.plot(*single, color=style.colour, linewidth=0.7, alpha=0.35)
    if runs:
        _mean_line(axes, style, mean_curve(runs), scale)


def _mean_line(axes: Any, style: Style, mean: Points, scale: float = 1.0) -> None:
    xs, ys = [x / scale for x, _ in mean.values()], [y for _, y in mean.values()]
    marks = small_marks(xs, 3.4) | {"marker": style.mark}
    axes.plot(xs, ys, color=style.colour, linestyle=style.line, linewidth=2.0, **marks)


def _end_marks(axes: Any, style: Style, ends: Sequence[tuple[float, float]], scale: float) -> None:
    look: dict[str, Any] = {"color": style.colour, "marker": style.mark}
    if len(ends) > 1:
        xs, ys = [x / scale for x, _ in ends], [y for _, y in ends]
        axes.scatter(xs, ys, s=16, alpha=0.5, linewidths=0, zorder=4, **look)
    if ends:
        x, y = _middle(ends)
        axes.scatter([x / scale], [y], s=95, zorder=6, edgecolors="white", linewidths=1.0, **look)


def _draw_against_epochs(
    curves: Curves, styles: Styles, height: float, floor: float | None, metric: Metric, axes: Any
) -> None:
    means = {label: mean_curve(runs) for label, runs in curves.items() if runs}
    for label, mean in means.items():
        if len(curves[label]) > 1:
            accuracies = [[run[epoch][1] for epoch in mean] for run in curves[label]]
            band(axes, list(mean), accuracies, styles[label].colour)
        _mean_line(axes, styles[label], mean)
    score_axis(axes, metric, floor)
    whole_axis(axes, "epoch")
    last = {label: list(mean.values())[-1] for label, mean in means.items()}
    _name_ends(axes, last, styles, height)


def _name_ends(
    axes: Any, last: Mapping[str, tuple[float, float]], styles: Styles, height: float
) -> None:
    """Write each name at the height where its line ends, as far apart as text must be."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.17 / (height - 0.8)  # inches per line of text
    heights = moved_apart([y for _, y in last.values()], gap)
    for (label, point), place in zip(last.items(), heights, strict=True):
        colour = styles[label].colour
        axes.annotate(
            short_label(label, 18),
            point,
            xytext=(1.06, place),
            textcoords=("axes fraction", "data"),
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 1},
            annotation_clip=False,
            va="center",
            color=INK,
            fontsize=8.5,
        )


def _depth_panels(groups: Sequence[Group], styles: Styles) -> Iterator[Panel]:
    """Draw the accuracy of linear read-outs by stage, if runs were probed."""
    found = {group.label: group.lists("readout_accuracy") for group in groups}
    known = {label: runs for label, runs in found.items() if runs}
    if not known:
        return
    means = {
        label: [statistics.fmean(column) for column in zip(*runs, strict=False)]
        for label, runs in known.items()
    }
    words = "; ".join(f"{label} {', '.join(map(percent, mean))}" for label, mean in means.items())
    several = any(len(runs) > 1 for runs in known.values())
    yield Panel(
        name="readout-depth",
        title="What a linear read-out finds after every stage",
        caption="Ridge regression on the features, fitted to the training images and judged on the "
        "validation images (on the test images, where none were held out)."
        + (" Line: mean over the seeds; band: lowest to highest." if several else ""),
        alternative=f"Line chart of the accuracy of read-outs by stage. {words}.",
        draw=partial(_draw_depth, known, means, styles),
        height=3.7,
    )


def _draw_depth(
    found: Mapping[str, Sequence[Sequence[float]]],
    means: Mapping[str, Sequence[float]],
    styles: Styles,
    axes: Any,
) -> None:
    for label, mean in means.items():
        colour, line, mark = styles[label]
        stages = range(len(mean))
        if len(found[label]) > 1:
            shares = [[100 * run[stage] for stage in stages] for run in found[label]]
            band(axes, stages, shares, colour)
        ys = [100 * value for value in mean]
        axes.plot(stages, ys, color=colour, linestyle=line, marker=mark, label=short_label(label))
    score_axis(axes, METRICS["accuracy"])
    whole_axis(axes, "after stage")
    side_legend(axes)


# What each run came to, as bars


_BYTES = (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10))


def _throughput_panels(groups: Sequence[Group], styles: Styles) -> Iterator[Panel]:
    samples = [group.sample("samples_per_second") for group in groups]
    rivals = baseline(groups)
    notes = []
    for group, sample in zip(groups, samples, strict=True):
        ratio = paired_ratio(group, rivals)
        compared = group.method != BASELINE and len(ratio)
        against = f"  ({ratio.median:.2f} {TIMES} {BASELINE})" if compared else ""
        notes.append(count(sample.median) + against)
    yield from _Bars(styles, samples, notes, "samples per second").panels(
        "throughput",
        "Training throughput",
        "Median over the runs; the whisker goes from the lowest to the highest.",
    )


def _target_panels(groups: Sequence[Group], styles: Styles, target: Target) -> Iterator[Panel]:
    samples = [group.sample(SECONDS_TO_TARGET) for group in groups]
    notes = []
    for group, sample in zip(groups, samples, strict=True):
        num_runs = len(group.summaries)
        share = f"  ({len(sample)} of {num_runs} runs)" if len(sample) < num_runs else ""
        notes.append(duration(sample.median) + share if len(sample) else "not reached")
    yield from _Bars(styles, samples, notes, "seconds").panels(
        "target",
        f"Time to {target.words} validation {target.metric.title}",
        f"The target is {target.origin}. Between the ends of two epochs accuracy is taken to move "
        "along a straight line; shorter than the first epoch nothing can be measured.",
    )


def _cost_panels(groups: Sequence[Group], styles: Styles) -> Iterator[Panel]:
    """Draw memory, traffic and waiting."""
    largest, together = zip(*(group.memory() for group in groups), strict=True)
    notes = _notes_of_two(largest, together, memory, "{} in all")
    yield from _Bars(styles, largest, notes, "peak memory", _BYTES, together).panels(
        "memory",
        "Peak memory",
        "Filled: the largest process, which is what one device must hold. "
        "Outline: all processes together.",
    )
    sent = [group.traffic() for group in groups]
    if any(sample.high > 0 for sample in sent):  # a single process sends nothing
        notes = [traffic(sample.median) for sample in sent]
        yield from _Bars(styles, sent, notes, "sent per step", _BYTES).panels(
            "traffic",
            "Traffic",
            "Bytes that all processes together send to each other per training step.",
        )
    mean, most = zip(*(group.waiting() for group in groups), strict=True)
    if any(sample.high > 0 for sample in most):
        notes = _notes_of_two(mean, most, percent, "most {}")
        yield from _Bars(styles, mean, notes, "share of time", (("%", 0.01),), most).panels(
            "waiting",
            "Time spent waiting",
            "Share of the time in which a stage had nothing to do. Filled: mean of the stages. "
            "Outline: the stage that waits most.",
        )


def _notes_of_two(
    samples: Sequence[Sample], above: Sequence[Sample], write: Callable[[float], str], words: str
) -> list[str]:
    """Write the median of each sample, and of the one above it where that is larger."""
    return [
        write(one.median)
        + (f"  ({words.format(write(other.median))})" if other.median > one.median else "")
        for one, other in zip(samples, above, strict=True)
    ]


@dataclass(frozen=True)
class _Bars:
    """One bar per group: the median, a whisker from lowest to highest, a note, maybe an outline."""

    styles: Styles
    samples: Sequence[Sample]
    notes: Sequence[str]
    quantity: str
    units: Sequence[tuple[str, float]] = (("", 1.0),)
    outline: Sequence[Sample] = ()

    def panels(self, name: str, title: str, caption: str) -> Iterator[Panel]:
        """Make the panel, unless there is nothing to show."""
        if any(map(len, self.samples)):
            said = "; ".join(map(" ".join, zip(self.styles, self.notes, strict=True)))
            yield Panel(
                name=name,
                title=title,
                caption=caption,
                alternative=f"Bar chart: {title.lower()}: {said}.",
                draw=self._draw,
                height=max(2.6, 1.2 + 0.34 * len(self.styles)),
            )

    def _draw(self, axes: Any) -> None:
        reach = max((sample.high for sample in self.samples if len(sample)), default=0.0)
        unit, scale = next((u for u in self.units if reach >= u[1]), self.units[-1])
        ends = [self._bar(axes, place, scale) for place in range(len(self.styles))]
        lane_axis(axes, range(len(self.styles)), list(map(short_label, self.styles)))
        axes.set_ylim(len(self.styles) - 0.5, -0.5)
        axes.set_xlim(0, max(ends) * 1.45 or 1)
        axes.spines["left"].set(visible=True, color=MUTED)
        axes.set_xlabel(f"{self.quantity} ({unit})" if unit else self.quantity)

    def _bar(self, axes: Any, place: int, scale: float) -> float:
        """Draw a bar and its note; returns how far it reaches."""
        sample, end = self.samples[place], 0.0
        if len(sample):
            middle, low, end = (v / scale for v in (sample.median, sample.low, sample.high))
            colour = list(self.styles.values())[place].colour
            axes.barh(place, middle, height=0.56, color=colour, alpha=0.85)
            if end > low:
                whisker = [[middle - low], [end - middle]]
                axes.errorbar(middle, place, xerr=whisker, color=INK, linewidth=1.1, capsize=3)
            if self.outline and len(self.outline[place]):
                end = max(end, self.outline[place].median / scale)
                axes.barh(place, end, height=0.56, fill=False, edgecolor=colour, linewidth=1.0)
        offset = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(self.notes[place], (end, place), color=INK, fontsize=8.5, **offset)
        return end
