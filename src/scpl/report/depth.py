"""Picture of what linear read-outs find after every stage, one line per method."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scpl.report.formats import percent
from scpl.report.groups import Group
from scpl.report.panels import Panel
from scpl.report.style import Styles, percent_axis, short_label, side_legend, whole_axis

__all__ = ["depth_panels"]


def depth_panels(groups: Sequence[Group], styles: Styles) -> Iterator[Panel]:
    """Draw the accuracy of read-outs by stage, if runs were probed."""
    found = {group.label: group.lists("readout_accuracy") for group in groups}
    known = {label: runs for label, runs in found.items() if runs}
    if not known:
        return
    several = any(len(runs) > 1 for runs in known.values())
    words = "; ".join(
        f"{label} {', '.join(percent(value) for value in _means(runs))}"
        for label, runs in known.items()
    )
    yield Panel(
        name="readout-depth",
        title="What a linear read-out finds after every stage",
        caption="Ridge regression on the features, fitted to the training images and judged on the "
        "validation images (on the test images, where none were held out)."
        + (" Line: mean over the seeds; band: lowest to highest." if several else ""),
        alternative=f"Line chart of the accuracy of read-outs by stage. {words}.",
        draw=_Depth(known, styles),
        height=3.7,
    )


def _means(runs: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*runs, strict=False)]


class _Depth:
    def __init__(self, found: Mapping[str, Sequence[Sequence[float]]], styles: Styles) -> None:
        self.found, self.styles = found, styles

    def __call__(self, axes: Any) -> None:
        for label, runs in self.found.items():
            colour, line, mark = self.styles[label]
            means = [100 * value for value in _means(runs)]
            stages = range(len(means))
            if len(runs) > 1:
                columns = [[100 * run[stage] for run in runs] for stage in stages]
                low, high = list(map(min, columns)), list(map(max, columns))
                axes.fill_between(stages, low, high, color=colour, alpha=0.14, linewidth=0)
            axes.plot(
                stages, means, color=colour, linestyle=line, marker=mark, label=short_label(label)
            )
        percent_axis(axes)
        whole_axis(axes, "after stage")
        side_legend(axes)
