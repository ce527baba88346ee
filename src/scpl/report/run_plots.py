"""Pictures of one run: losses, the main metric over epochs and time, what objectives observed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from scpl.report.formats import duration, time_axis
from scpl.report.panels import (
    INK,
    MUTED,
    Panel,
    balanced,
    score_axis,
    side_legend,
    small_marks,
    stage_colours,
    whole_axis,
)
from scpl.report.timelines import timeline_panels
from scpl.runs import RunRecord
from scpl.runs.columns import EPOCH, LOSS, OBSERVED, SECONDS, STEP, TRAIN
from scpl.runs.metrics import METRICS, Metric

__all__ = ["condense", "observation_words", "run_panels"]

NUM_POINTS = 300
Curve = tuple[Sequence[float], Sequence[float]]


def run_panels(run: RunRecord) -> list[Panel]:
    """List the pictures a run has data for."""
    panels = [*_loss_panels(run), *_score_panels(run), *_observation_panels(run)]
    return balanced([*panels, *timeline_panels(run.timeline, run.numbers("wait_share"))])


def condense(curve: Curve, num_points: int = NUM_POINTS) -> Curve:
    """Average neighbours until at most ``num_points`` are left; NaN stays a gap.

    Example:
        >>> condense(([1, 2, 3, 4], [1.0, 3.0, 5.0, 7.0]), 2)
        ([1.5, 3.5], [2.0, 6.0])
    """
    size = math.ceil(len(curve[0]) / num_points)
    if size <= 1:
        return curve

    def average(values: Sequence[float]) -> list[float]:
        known = [value if math.isfinite(value) else math.nan for value in values]
        parts = [known[i : i + size] for i in range(0, len(known), size)]
        return [math.fsum(part) / len(part) for part in parts]

    return average(curve[0]), average(curve[1])


def _loss_panels(run: RunRecord) -> Iterator[Panel]:
    curves, every = _loss_curves(run)
    for index, (term, by_stage) in enumerate(curves.items()):
        name = "loss" if term == LOSS else f"loss: {term.replace('_', ' ')}"
        stages = f"stage{'s' if len(by_stage) > 1 else ''} {_ranges(sorted(by_stage))}"
        ends = ", ".join(f"stage {k} {_last(ys):.3g}" for k, (_, ys) in sorted(by_stage.items()))
        yield Panel(
            name=f"loss-{index}",
            title=f"Training {name}",
            caption=f"{'Each line is' if len(by_stage) > 1 else 'The line is'} the local loss of "
            f"one stage; {every}.",
            alternative=f"Line chart of training {name} against steps, {stages}. Last: {ends}.",
            draw=partial(_draw_losses, by_stage, run.num_stages),
        )


def _draw_losses(by_stage: Mapping[int, Curve], num_stages: int, axes: Any) -> None:
    colours = stage_colours(num_stages)
    for stage, curve in sorted(by_stage.items()):
        xs, ys = condense(curve)
        marker = "o" if len(xs) < 3 else ""
        axes.plot(xs, ys, color=colours[stage], label=str(stage), marker=marker)
    whole_axis(axes, "step")
    axes.set_ylabel("loss (mean per batch)")
    if num_stages > 1:
        side_legend(axes, title="stage")


def _loss_curves(run: RunRecord) -> tuple[dict[str, dict[int, Curve]], str]:
    """Collect term to stage to curve, from the steps if they were logged, else from the epochs."""
    found: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
    for row in run.steps:
        for stage, terms in enumerate(row.losses):
            for term, value in terms.items():
                xs, ys = found.setdefault((term, stage), ([], []))
                xs.append(row.step)
                ys.append(value)
    curves: dict[str, dict[int, Curve]] = {}
    for (term, stage), curve in found.items():
        if any(map(math.isfinite, curve[1])):
            curves.setdefault(term, {})[stage] = curve
    if curves:
        size = math.ceil(len(run.steps) / NUM_POINTS)
        every = f"a point is the mean of {size} logged steps" if size > 1 else "every logged step"
        return curves, every
    steps = run.column(STEP if run.has(STEP) else EPOCH)
    return {
        term: {stage: (steps, run.column(name)) for stage, name in by_stage.items()}
        for term, by_stage in run.stage_columns(TRAIN).items()
    }, "a point is the mean of an epoch"


def _score_panels(run: RunRecord) -> Iterator[Panel]:
    by_stage, column, metric = run.score_columns(), run.valid_column, run.metric
    if not run.has(column) and not by_stage:
        return
    if len(by_stage) == 1 and run.has(column):
        by_stage = {}  # the only stage that predicts is the prediction itself
    best = _last(run.column(column))
    words = f"{metric.write(best, 1)} after the last epoch" if math.isfinite(best) else "per stage"
    note = " A thin line is what a read-out of that stage alone predicts." if by_stage else ""
    yield Panel(
        name="accuracy-epochs",
        title=f"Validation {metric.title} per epoch",
        caption=f"Black: the prediction of the whole network.{note}{_kept(run)}",
        alternative=f"Line chart of validation {metric.title} against epochs: {words}.",
        draw=partial(_draw_scores, run, EPOCH, by_stage),
    )
    if run.has(SECONDS) and run.has(column):
        seconds = _last(run.column(SECONDS))
        yield Panel(
            name="accuracy-time",
            title=f"Validation {metric.title} against time",
            caption="Wall-clock time since training began, data loading and evaluation included.",
            alternative=f"Line chart of validation {metric.title} against wall-clock time: "
            f"{words}, at {duration(seconds)}.",
            draw=partial(_draw_scores, run, SECONDS, {}),
        )


def _kept(run: RunRecord) -> str:
    """Say where the best epoch is, if its weights were kept."""
    if "best_by" not in run.summary or not math.isfinite(run.number("weights_epoch")):
        return ""
    return " Dotted: the epoch whose weights were kept."


def _draw_scores(run: RunRecord, against: str, by_stage: Mapping[int, str], axes: Any) -> None:
    xs = run.column(against)
    if against == SECONDS:
        scale, unit = time_axis(xs)
        xs = [value / scale for value in xs]
        axes.set_xlabel(f"wall-clock time ({unit})")
    else:
        whole_axis(axes, "epoch")
        if _kept(run):
            axes.axvline(run.number("weights_epoch"), color=INK, linewidth=1.0, linestyle=":")
    marks, metric = small_marks(xs), run.metric
    colours = stage_colours(run.num_stages)
    for stage, name in by_stage.items():
        ys = [metric.scale * value for value in run.column(name)]
        axes.plot(xs, ys, color=colours[stage], linewidth=1.3, label=str(stage), **marks)
    if run.has(run.valid_column):
        ys = [metric.scale * value for value in run.column(run.valid_column)]
        axes.plot(xs, ys, color=INK, linewidth=2.2, label="whole network", zorder=5, **marks)
        _mark_last(axes, xs, ys, metric)
    score_axis(axes, metric)
    if against == SECONDS:
        axes.set_xlim(left=0)
    if by_stage:
        side_legend(axes, title="read-out of stage")


def _mark_last(axes: Any, xs: Sequence[float], ys: Sequence[float], metric: Metric) -> None:
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x + y)]
    if points:
        axes.annotate(
            metric.write(points[-1][1] / metric.scale, 1),
            points[-1],
            xytext=(0, 7),
            textcoords="offset points",
            ha="right" if len(points) > 1 else "center",
            color=MUTED,
            fontsize=9,
            annotation_clip=False,
        )


_DRAWN = {
    "above_chance": (
        "Contrast against chance",
        "Loss minus its chance level, that of the same projections with classes dealt out at "
        "random: at zero a stage has learned nothing.",
        "loss minus chance level",
    ),
    "spread": (
        "Spread of the projections",
        "1: unit projections point in all directions; 0: they have collapsed to one.",
        "spread",
    ),
}
"""Observations that tell whether stages learn: title, caption and label of their pictures."""
_WORDS = {
    "above_chance": "contrast, loss minus chance level",
    "positives": "positives per anchor",
    "without_positives": "share of anchors without positives",
    "spread": "spread of projections",
}


def observation_words(name: str) -> str:
    """Say in words what an observation is."""
    if name in METRICS:
        return f"training {METRICS[name].title} of its read-out"
    return _WORDS.get(name, name.replace("_", " "))


def _observation_panels(run: RunRecord) -> Iterator[Panel]:
    found = run.stage_columns(OBSERVED)
    for name, (title, caption, label) in _DRAWN.items():
        if name in found:
            last = ", ".join(f"stage {k} {run.column(c)[-1]:.3g}" for k, c in found[name].items())
            yield Panel(
                name=f"observed-{name.replace('_', '-')}",
                title=title,
                caption=caption,
                alternative=f"Line chart of {label} against epochs. Last: {last}.",
                draw=partial(_draw_observation, run, found[name], label),
            )


def _draw_observation(run: RunRecord, by_stage: Mapping[int, str], label: str, axes: Any) -> None:
    colours = stage_colours(run.num_stages)
    epochs = run.column(EPOCH)
    lowest = 0.0
    for stage, name in sorted(by_stage.items()):
        values = run.column(name)
        lowest = min([lowest, *filter(math.isfinite, values)])
        axes.plot(epochs, values, color=colours[stage], label=str(stage), **small_marks(epochs))
    axes.axhline(0, color=MUTED, linewidth=0.8)
    if lowest == 0:
        axes.set_ylim(bottom=0)
    whole_axis(axes, "epoch")
    axes.set_ylabel(label)
    if run.num_stages > 1:
        side_legend(axes, title="stage")


def _last(values: Sequence[float]) -> float:
    return next((value for value in reversed(values) if math.isfinite(value)), math.nan)


def _ranges(stages: Sequence[int]) -> str:
    consecutive = len(stages) > 2 and stages[-1] - stages[0] == len(stages) - 1
    return f"{stages[0]} to {stages[-1]}" if consecutive else ", ".join(map(str, stages))
