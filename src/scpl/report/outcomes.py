"""Pictures of what runs came to: test accuracy and time, throughput, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

from scpl.report.formats import TIMES, count, duration, memory, percent, time_axis
from scpl.report.groups import BASELINE, Group, Sample, paired_ratio
from scpl.report.panels import Panel
from scpl.report.reading import as_number
from scpl.report.style import INK, MUTED, Styles, percent_axis, short_label, side_legend

__all__ = ["outcome_panels", "outcome_words"]


def outcome_panels(groups: Sequence[Group], styles: Styles) -> Iterator[Panel]:
    """Draw what each run came to: accuracy and time, throughput, memory."""
    yield from _result_panels(groups, styles)
    yield from _throughput_panels(groups, styles)
    yield from _memory_panels(groups, styles)


def outcome_words(group: Group) -> str:
    """Say accuracy and time of a group."""
    accuracy, seconds = group.sample("test_accuracy").mean, group.sample("wall_seconds").median
    return f"{group.label}: test accuracy {percent(accuracy)}, {duration(seconds)}"


def _result_panels(groups: Sequence[Group], styles: Styles) -> Iterator[Panel]:
    points = {}
    for group in groups:
        pairs = (
            map(as_number, map(s.get, ("wall_seconds", "test_accuracy"))) for s in group.summaries
        )
        known = [(x, 100 * y) for x, y in pairs if math.isfinite(x + y)]
        if known:
            points[group.label] = known
    if points:
        yield Panel(
            name="outcome",
            title="Test accuracy and the time it took",
            caption="Each mark is a run: further up is more accurate, further left is sooner done.",
            alternative=f"Scatter chart. {'; '.join(map(outcome_words, groups))}.",
            draw=_Results(points, styles),
            height=3.7,
        )


class _Results:
    def __init__(self, points: dict[str, list[tuple[float, float]]], styles: Styles) -> None:
        self.points, self.styles = points, styles

    def __call__(self, axes: Any) -> None:
        scale, unit = time_axis([x for pairs in self.points.values() for x, _ in pairs])
        for (label, pairs), marker in zip(self.points.items(), cycle("osD^vPX<>"), strict=False):
            xs, ys = [x / scale for x, _ in pairs], [y for _, y in pairs]
            style = {"color": self.styles[label][0], "marker": marker, "alpha": 0.85}
            axes.scatter(xs, ys, s=34, linewidths=0, label=short_label(label), **style)
        percent_axis(axes)
        axes.set_xlabel(f"wall-clock time ({unit})")
        axes.set_xlim(left=0)
        side_legend(axes)


def _throughput_panels(groups: Sequence[Group], styles: Styles) -> Iterator[Panel]:
    samples = [group.sample("samples_per_second") for group in groups]
    if not any(map(len, samples)):
        return
    notes = []
    for group, sample in zip(groups, samples, strict=True):
        ratio = paired_ratio(group, groups)
        compared = group.method != BASELINE and len(ratio)
        notes.append(
            count(sample.median) + (f"  ({ratio.median:.2f} {TIMES} bp)" if compared else "")
        )
    yield Panel(
        name="throughput",
        title="Training throughput",
        caption="Median over the runs; the whisker goes from the lowest to the highest.",
        alternative="Bar chart of samples per second: "
        + "; ".join(f"{g.label} {note}" for g, note in zip(groups, notes, strict=True))
        + ".",
        draw=_Bars(groups, samples, styles, notes, "samples per second", count),
        height=max(2.6, 1.3 + 0.44 * len(groups)),
    )


def _memory_panels(groups: Sequence[Group], styles: Styles) -> Iterator[Panel]:
    largest = [group.memory()[0] for group in groups]
    together = [group.memory()[1] for group in groups]
    if not any(map(len, largest)):
        return
    notes = [
        memory(one.median)
        + (f"  ({memory(all_.median)} in all)" if all_.median > one.median else "")
        for one, all_ in zip(largest, together, strict=True)
    ]
    yield Panel(
        name="memory",
        title="Peak memory",
        caption="Filled: the largest process, which is what one device must hold. "
        "Outline: all processes together.",
        alternative="Bar chart of peak memory: "
        + "; ".join(f"{g.label} {note}" for g, note in zip(groups, notes, strict=True))
        + ".",
        draw=_Bars(groups, largest, styles, notes, "peak memory", memory, outline=together),
        height=max(2.6, 1.3 + 0.44 * len(groups)),
    )


class _Bars:
    def __init__(
        self,
        groups: Sequence[Group],
        samples: Sequence[Sample],
        styles: Styles,
        notes: Sequence[str],
        quantity: str,
        write: Callable[[float], str],
        outline: Sequence[Sample] = (),
    ) -> None:
        self.labels = [group.label for group in groups]
        self.samples, self.styles, self.notes = samples, styles, notes
        self.quantity, self.outline = quantity, outline
        self.unit, self.scale = _memory_unit(samples) if write is memory else ("", 1.0)

    def __call__(self, axes: Any) -> None:
        reach = 0.0
        for row, (label, sample) in enumerate(zip(self.labels, self.samples, strict=True)):
            if not len(sample):
                continue
            middle, low, high = (v / self.scale for v in (sample.median, sample.low, sample.high))
            colour = self.styles[label][0]
            axes.barh(row, middle, height=0.56, color=colour, alpha=0.85)
            if high > low:
                spread = [[middle - low], [high - middle]]
                axes.errorbar(middle, row, xerr=spread, color=INK, linewidth=1.1, capsize=3)
            end = high
            if self.outline and len(self.outline[row]):
                end = max(end, self.outline[row].median / self.scale)
                axes.barh(row, end, height=0.56, fill=False, edgecolor=colour, linewidth=1.0)
            reach = max(reach, end)
            axes.annotate(
                self.notes[row],
                (end, row),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                color=INK,
                fontsize=8.5,
            )
        axes.set_yticks(range(len(self.labels)), [short_label(label) for label in self.labels])
        axes.set_ylim(len(self.labels) - 0.5, -0.5)
        axes.set_xlim(0, reach * 1.45 or 1)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_color(MUTED)
        axes.set_xlabel(f"{self.quantity} ({self.unit})" if self.unit else self.quantity)


def _memory_unit(samples: Sequence[Sample]) -> tuple[str, float]:
    largest = max(sample.high for sample in samples if len(sample))
    return ("GiB", 2.0**30) if largest >= 2**30 else ("MiB", 2.0**20)
