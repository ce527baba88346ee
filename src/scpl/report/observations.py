"""Pictures of what the objectives observed beside their losses: does a stage learn, and why not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from scpl.report.panels import Panel
from scpl.report.reading import RunRecord
from scpl.report.style import MUTED, side_legend, stage_colours, whole_axis

__all__ = ["observation_panels", "observation_words"]

_SHOWN = {
    "above_chance": (
        "Contrast against chance",
        "Loss minus its chance level, the loss of projections that are all equal: at zero a stage "
        "has learned nothing.",
        "loss minus chance level",
    ),
    "spread": (
        "Spread of the projections",
        "1: unit projections point in all directions; 0: they have collapsed to one.",
        "spread",
    ),
}
_WORDS = {
    "above_chance": "contrast, loss minus chance level",
    "positives": "positives per anchor",
    "without_positives": "share of anchors without positives",
    "spread": "spread of projections",
    "accuracy": "training accuracy of its read-out",
}


def observation_words(name: str) -> str:
    """Say in words what an observation is."""
    return _WORDS.get(name, name.replace("_", " "))


def observation_panels(run: RunRecord) -> Iterator[Panel]:
    """Draw the observations that tell whether stages learn, per epoch."""
    found = run.train_columns("observed")
    for name, (title, caption, label) in _SHOWN.items():
        if name in found:
            last = ", ".join(f"stage {k} {run.column(c)[-1]:.3g}" for k, c in found[name].items())
            yield Panel(
                name=f"observed-{name.replace('_', '-')}",
                title=title,
                caption=caption,
                alternative=f"Line chart of {label} against epochs. Last: {last}.",
                draw=_Observation(run, found[name], label),
            )


class _Observation:
    def __init__(self, run: RunRecord, by_stage: Mapping[int, str], label: str) -> None:
        self.run, self.by_stage, self.label = run, by_stage, label

    def __call__(self, axes: Any) -> None:
        colours = stage_colours(self.run.num_stages)
        epochs = self.run.column("epoch")
        lowest = 0.0
        for stage, name in sorted(self.by_stage.items()):
            values = self.run.column(name)
            lowest = min([lowest, *filter(math.isfinite, values)])
            marker = {"marker": "o", "markersize": 3.2 if len(epochs) <= 40 else 0}
            axes.plot(epochs, values, color=colours[stage], label=str(stage), **marker)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        if lowest == 0:
            axes.set_ylim(bottom=0)
        whole_axis(axes, "epoch")
        axes.set_ylabel(self.label)
        if self.run.num_stages > 1:
            side_legend(axes, title="stage")
