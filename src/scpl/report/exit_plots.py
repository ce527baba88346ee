"""The picture of early exits: accuracy against the stages that a sample goes through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scpl.report.panels import MUTED, Panel, panels_png, score_axis, stage_colours
from scpl.runs.metrics import METRICS

__all__ = ["exits_picture"]


def exits_picture(result: Mapping[str, Any], heading: str) -> bytes:
    """Draw a curve over thresholds, and each exit by itself, as PNG.

    Args:
        result: ``exits``, a row for each threshold, with ``threshold``, ``accuracy`` and
            ``stages_per_sample``; and ``exit_accuracy``, that of each exit on all samples.
        heading: Of the picture.
    """

    def draw(axes: Any) -> None:
        rows, alone = result["exits"], result["exit_accuracy"]
        depths = [row["stages_per_sample"] for row in rows]
        heights = [100 * row["accuracy"] for row in rows]
        order = sorted(range(len(rows)), key=lambda index: depths[index])
        axes.plot([depths[i] for i in order], [heights[i] for i in order], color=MUTED, marker="o")
        for index in order:
            place = (depths[index], heights[index])
            axes.annotate(
                f"{rows[index]['threshold']:g}", place, xytext=(4, -11), textcoords="offset points"
            )
        for stage, colour in enumerate(stage_colours(len(alone))):
            label = f"all after stage {stage}"
            axes.plot([stage + 1], [100 * alone[stage]], "s", color=colour, label=label)
        axes.set_xlabel("stages per sample")
        score_axis(axes, METRICS["accuracy"])
        axes.legend()

    panel = Panel(
        "exits", "Early exits: a point for each threshold", "", "Accuracy against depth.", draw,
        height=4.0, wide=True,
    )  # fmt: skip
    return panels_png([panel], heading)
