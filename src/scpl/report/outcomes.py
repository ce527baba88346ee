"""Pictures of what runs came to: time to a target, throughput, memory, traffic, waiting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from scpl.report.formats import TIMES, count, duration, memory, percent, traffic
from scpl.report.groups import BASELINE, Group, Sample, baseline, paired_ratio
from scpl.report.panels import Panel
from scpl.report.style import INK, MUTED, Styles, short_label
from scpl.report.target import SECONDS_TO_TARGET, Target

__all__ = ["outcome_panels", "outcome_words", "throughput_panels"]

_BYTES = (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10))


def outcome_panels(
    groups: Sequence[Group], styles: Styles, target: Target | None = None
) -> Iterator[Panel]:
    """Draw what each run came to beside its throughput; what no run measured is left out."""
    if target is not None:
        yield from _target_panels(groups, styles, target)
    yield from _memory_panels(groups, styles)
    yield from _traffic_panels(groups, styles)
    yield from _waiting_panels(groups, styles)


def outcome_words(group: Group) -> str:
    """Say accuracy and time of a group."""
    accuracy, seconds = group.sample("test_accuracy").mean, group.sample("wall_seconds").median
    return f"{group.label}: test accuracy {percent(accuracy)}, {duration(seconds)}"


def throughput_panels(groups: Sequence[Group], styles: Styles) -> Iterator[Panel]:
    """Draw how fast each method trained."""
    samples = [group.sample("samples_per_second") for group in groups]
    rivals = baseline(groups)
    notes = []
    for group, sample in zip(groups, samples, strict=True):
        ratio = paired_ratio(group, rivals)
        compared = group.method != BASELINE and len(ratio)
        notes.append(
            count(sample.median) + (f"  ({ratio.median:.2f} {TIMES} bp)" if compared else "")
        )
    yield from _bar_panel(
        "throughput",
        "Training throughput",
        "Median over the runs; the whisker goes from the lowest to the highest.",
        _Bars(groups, samples, styles, notes, "samples per second"),
    )


def _target_panels(groups: Sequence[Group], styles: Styles, target: Target) -> Iterator[Panel]:
    samples = [group.sample(SECONDS_TO_TARGET) for group in groups]
    notes = []
    for group, sample in zip(groups, samples, strict=True):
        missed = len(group.summaries) - len(sample)
        part = f"  ({len(sample)} of {len(group.summaries)} runs)" if missed else ""
        notes.append(duration(sample.median) + part if len(sample) else "not reached")
    yield from _bar_panel(
        "target",
        f"Time to {target.words} validation accuracy",
        f"The target is {target.origin}. Between the ends of two epochs accuracy is taken to move "
        "along a straight line; shorter than the first epoch nothing can be measured.",
        _Bars(groups, samples, styles, notes, "seconds"),
    )


def _memory_panels(groups: Sequence[Group], styles: Styles) -> Iterator[Panel]:
    largest = [group.memory()[0] for group in groups]
    together = [group.memory()[1] for group in groups]
    notes = [
        memory(one.median)
        + (f"  ({memory(all_.median)} in all)" if all_.median > one.median else "")
        for one, all_ in zip(largest, together, strict=True)
    ]
    yield from _bar_panel(
        "memory",
        "Peak memory",
        "Filled: the largest process, which is what one device must hold. "
        "Outline: all processes together.",
        _Bars(groups, largest, styles, notes, "peak memory", _BYTES, outline=together),
    )


def _traffic_panels(groups: Sequence[Group], styles: Styles) -> Iterator[Panel]:
    samples = [group.traffic() for group in groups]
    if not any(sample.high > 0 for sample in samples):
        return  # a single process sends nothing
    yield from _bar_panel(
        "traffic",
        "Traffic",
        "Bytes that all processes together send to each other per training step.",
        _Bars(
            groups, samples, styles, [traffic(s.median) for s in samples], "sent per step", _BYTES
        ),
    )


def _waiting_panels(groups: Sequence[Group], styles: Styles) -> Iterator[Panel]:
    mean = [Sample.of(100 * v for v in group.waiting()[0].values) for group in groups]
    most = [Sample.of(100 * v for v in group.waiting()[1].values) for group in groups]
    if not any(sample.high > 0 for sample in most):
        return
    notes = [
        percent(one.median / 100)
        + (f"  (most {percent(worst.median / 100)})" if worst.median > one.median else "")
        for one, worst in zip(mean, most, strict=True)
    ]
    yield from _bar_panel(
        "waiting",
        "Time spent waiting",
        "Share of the time in which a stage had nothing to do. Filled: mean of the stages. "
        "Outline: the stage that waits most.",
        _Bars(groups, mean, styles, notes, "share of time (%)", outline=most),
    )


def _bar_panel(name: str, title: str, caption: str, bars: _Bars) -> Iterator[Panel]:
    """Make the panel, unless there is nothing to show."""
    if any(map(len, bars.samples)):
        said = "; ".join(
            f"{label} {note}" for label, note in zip(bars.labels, bars.notes, strict=True)
        )
        yield Panel(
            name=name,
            title=title,
            caption=caption,
            alternative=f"Bar chart: {title.lower()}: {said}.",
            draw=bars,
            height=max(2.6, 1.2 + 0.34 * len(bars.labels)),
        )


class _Bars:
    def __init__(
        self,
        groups: Sequence[Group],
        samples: Sequence[Sample],
        styles: Styles,
        notes: Sequence[str],
        quantity: str,
        units: Sequence[tuple[str, float]] = (("", 1.0),),
        outline: Sequence[Sample] = (),
    ) -> None:
        self.labels = [group.label for group in groups]
        self.samples, self.styles, self.notes = samples, styles, notes
        self.quantity, self.outline = quantity, outline
        reach = max((sample.high for sample in samples if len(sample)), default=0.0)
        self.unit, self.scale = next((u for u in units if reach >= u[1]), units[-1])

    def __call__(self, axes: Any) -> None:
        reach = 0.0
        for row, (label, sample) in enumerate(zip(self.labels, self.samples, strict=True)):
            if not len(sample):
                self._note(axes, row, 0.0)
                continue
            middle, low, high = (v / self.scale for v in (sample.median, sample.low, sample.high))
            colour = self.styles[label].colour
            axes.barh(row, middle, height=0.56, color=colour, alpha=0.85)
            if high > low:
                spread = [[middle - low], [high - middle]]
                axes.errorbar(middle, row, xerr=spread, color=INK, linewidth=1.1, capsize=3)
            end = high
            if self.outline and len(self.outline[row]):
                end = max(end, self.outline[row].median / self.scale)
                axes.barh(row, end, height=0.56, fill=False, edgecolor=colour, linewidth=1.0)
            reach = max(reach, end)
            self._note(axes, row, end)
        axes.set_yticks(range(len(self.labels)), [short_label(label) for label in self.labels])
        axes.set_ylim(len(self.labels) - 0.5, -0.5)
        axes.set_xlim(0, reach * 1.45 or 1)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_color(MUTED)
        axes.set_xlabel(f"{self.quantity} ({self.unit})" if self.unit else self.quantity)

    def _note(self, axes: Any, row: int, end: float) -> None:
        place = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(self.notes[row], (end, row), color=INK, fontsize=8.5, **place)
