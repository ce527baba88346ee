"""Pictures of one run: losses, accuracy against epochs and against time, memory and waiting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scpl.report.formats import duration, percent, time_axis
from scpl.report.observations import observation_panels
from scpl.report.panels import Panel, balanced
from scpl.report.reading import RunRecord, as_numbers
from scpl.report.style import INK, MUTED, percent_axis, side_legend, stage_colours, whole_axis
from scpl.report.timeline import timeline_panels

__all__ = ["condense", "run_panels"]

NUM_POINTS = 300
Curve = tuple[Sequence[float], Sequence[float]]


def run_panels(run: RunRecord) -> list[Panel]:
    """List the pictures a run has data for."""
    panels = [*_loss_panels(run), *_accuracy_panels(run), *observation_panels(run)]
    waits = as_numbers(run.summary.get("wait_share"))
    return balanced([*panels, *timeline_panels(run.timeline, waits)])


def condense(curve: Curve, num_points: int = NUM_POINTS) -> Curve:
    """Average neighbours until at most ``num_points`` are left; NaN stays a gap.

    Example:
        >>> condense(([1, 2, 3, 4], [1.0, 3.0, 5.0, 7.0]), 2)
        ([1.5, 3.5], [2.0, 6.0])
    """
    size = math.ceil(len(curve[0]) / num_points)
    if size <= 1:
        return curve
    xs, ys = (
        [math.fsum(values[i : i + size]) / len(values[i : i + size]) for i in starts]
        for values, starts in ((v, range(0, len(v), size)) for v in map(_finite_or_nan, curve))
    )
    return xs, ys


def _loss_panels(run: RunRecord) -> Iterator[Panel]:
    curves, every = _loss_curves(run)
    for index, (term, by_stage) in enumerate(curves.items()):
        name = "loss" if term == "loss" else f"loss: {term.replace('_', ' ')}"
        stages = f"stage{'s' if len(by_stage) > 1 else ''} {_ranges(sorted(by_stage))}"
        ends = ", ".join(f"stage {k} {_last(ys):.3g}" for k, (_, ys) in sorted(by_stage.items()))
        yield Panel(
            name=f"loss-{index}",
            title=f"Training {name}",
            caption=f"{'Each line is' if len(by_stage) > 1 else 'The line is'} the local loss of "
            f"one stage; {every}.",
            alternative=f"Line chart of training {name} against steps, {stages}. Last: {ends}.",
            draw=_Losses(by_stage, run.num_stages),
        )


class _Losses:
    def __init__(self, by_stage: Mapping[int, Curve], num_stages: int) -> None:
        self.by_stage, self.num_stages = by_stage, num_stages

    def __call__(self, axes: Any) -> None:
        colours = stage_colours(self.num_stages)
        for stage, curve in sorted(self.by_stage.items()):
            xs, ys = condense(curve)
            axes.plot(
                xs, ys, color=colours[stage], label=str(stage), marker="o" if len(xs) < 3 else ""
            )
        whole_axis(axes, "step")
        axes.set_ylabel("loss (mean per batch)")
        if self.num_stages > 1:
            side_legend(axes, title="stage")


def _loss_curves(run: RunRecord) -> tuple[dict[str, dict[int, Curve]], str]:
    """Collect term to stage to curve, from the steps if they were logged, else from the epochs."""
    found: dict[str, dict[int, tuple[list[float], list[float]]]] = {}
    for row in run.steps:
        for stage, terms in enumerate(row.losses):
            for term, value in terms.items():
                xs, ys = found.setdefault(term, {}).setdefault(stage, ([], []))
                xs.append(row.step)
                ys.append(value)
    curves: dict[str, dict[int, Curve]] = {
        term: {k: curve for k, curve in by_stage.items() if any(map(math.isfinite, curve[1]))}
        for term, by_stage in found.items()
    }
    curves = {term: by_stage for term, by_stage in curves.items() if by_stage}
    if curves:
        size = math.ceil(len(run.steps) / NUM_POINTS)
        return (
            curves,
            f"a point is the mean of {size} logged steps" if size > 1 else "every logged step",
        )
    steps = run.column("step") if run.has("step") else run.column("epoch")
    columns = run.train_columns()
    return {
        term: {stage: (steps, run.column(name)) for stage, name in by_stage.items()}
        for term, by_stage in columns.items()
    }, "a point is the mean of an epoch"


def _accuracy_panels(run: RunRecord) -> Iterator[Panel]:
    final, readouts = "valid_accuracy", run.readout_columns()
    if not run.has(final) and not readouts:
        return
    if len(readouts) == 1 and run.has(final):
        readouts = {}  # the only read-out is the prediction itself
    best = _last(run.column(final))
    words = f"{percent(best)} after the last epoch" if math.isfinite(best) else "per stage"
    note = " A thin line is what a read-out of that stage alone predicts." if readouts else ""
    yield Panel(
        name="accuracy-epochs",
        title="Validation accuracy per epoch",
        caption=f"Black: the prediction of the whole network.{note}",
        alternative=f"Line chart of validation accuracy against epochs: {words}.",
        draw=_Accuracy(run, "epoch", readouts),
    )
    if run.has("seconds") and run.has(final):
        seconds = _last(run.column("seconds"))
        yield Panel(
            name="accuracy-time",
            title="Validation accuracy against time",
            caption="Wall-clock time since training began, data loading and evaluation included.",
            alternative="Line chart of validation accuracy against wall-clock time: "
            f"{words}, at {duration(seconds)}.",
            draw=_Accuracy(run, "seconds", {}),
        )


class _Accuracy:
    def __init__(self, run: RunRecord, against: str, readouts: Mapping[int, str]) -> None:
        self.run, self.against, self.readouts = run, against, readouts

    def __call__(self, axes: Any) -> None:
        xs = self.run.column(self.against)
        if self.against == "seconds":
            scale, unit = time_axis(xs)
            xs = [value / scale for value in xs]
            axes.set_xlabel(f"wall-clock time ({unit})")
        else:
            whole_axis(axes, "epoch")
        small = {"marker": "o", "markersize": 3.2 if len(xs) <= 40 else 0}
        colours = stage_colours(self.run.num_stages)
        for stage, name in self.readouts.items():
            ys = [100 * value for value in self.run.column(name)]
            axes.plot(xs, ys, color=colours[stage], linewidth=1.3, label=str(stage), **small)
        if self.run.has("valid_accuracy"):
            ys = [100 * value for value in self.run.column("valid_accuracy")]
            axes.plot(xs, ys, color=INK, linewidth=2.2, label="whole network", zorder=5, **small)
            _mark_last(axes, xs, ys)
        percent_axis(axes)
        if self.against == "seconds":
            axes.set_xlim(left=0)
        if self.readouts:
            side_legend(axes, title="read-out of stage")


def _mark_last(axes: Any, xs: Sequence[float], ys: Sequence[float]) -> None:
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x + y)]
    if points:
        axes.annotate(
            f"{points[-1][1]:.1f} %",
            points[-1],
            xytext=(0, 7),
            textcoords="offset points",
            ha="right" if len(points) > 1 else "center",
            color=MUTED,
            fontsize=9,
            annotation_clip=False,
        )


def _finite_or_nan(values: Sequence[float]) -> list[float]:
    return [value if math.isfinite(value) else math.nan for value in values]


def _last(values: Sequence[float]) -> float:
    return next((value for value in reversed(values) if math.isfinite(value)), math.nan)


def _ranges(stages: Sequence[int]) -> str:
    consecutive = len(stages) > 2 and stages[-1] - stages[0] == len(stages) - 1
    return f"{stages[0]} to {stages[-1]}" if consecutive else ", ".join(map(str, stages))
