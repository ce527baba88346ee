"""What pictures share beside the style file: colours of stages and methods, axes and legends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any, NamedTuple

from scpl.report.groups import BASELINE

__all__ = [
    "INK",
    "MUTED",
    "Style",
    "Styles",
    "band",
    "lane_axis",
    "method_styles",
    "moved_apart",
    "percent_axis",
    "short_label",
    "side_legend",
    "small_marks",
    "stage_colours",
    "whole_axis",
]

INK, MUTED = "#1b1f24", "#57606a"
# Light to dark with rising contrast on white; told apart with every kind of colour blindness.
_STAGE_COLOURS = ("#74c05a", "#1f9e89", "#2c728e", "#414487", "#2b0b45")


class Style(NamedTuple):
    """How a method looks in every picture of a page: colour, kind of line, mark."""

    colour: str
    line: str
    mark: str


Styles = dict[str, Style]
"""By label of a group."""

# The baseline and its variants (`bp-...`) are dark and not solid. The others have Okabe and Ito's
# colours first, then Tol's; line and mark help who sees no colours.
_BASELINE_STYLES = (
    Style(INK, "--", "o"),
    Style("#6e7781", "--", "s"),
    Style("#8a6d3b", ":", "D"),
)
_STYLES = (
    Style("#0072b2", "-", "o"),
    Style("#d55e00", "-", "s"),
    Style("#009e73", "-", "D"),
    Style("#cc79a7", "-.", "^"),
    Style("#56b4e9", "-.", "v"),
    Style("#e69f00", "--", "X"),
    Style("#882255", "-.", "P"),
    Style("#332288", "-", "^"),
    Style("#117733", "-", "v"),
    Style("#aa4499", "-", "P"),
    Style("#44aa99", "-", "X"),
    Style("#999933", "-", "<"),
    Style("#cc6677", "-", ">"),
    Style("#88ccee", "-", "*"),
    Style("#661100", "-", "h"),
)


def stage_colours(num_stages: int) -> list[str]:
    """Colours of stages, from light (the first) to dark (the last)."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    if num_stages == 1:
        return [_STAGE_COLOURS[2]]
    blend = LinearSegmentedColormap.from_list("stages", _STAGE_COLOURS, N=1024)
    return [to_hex(blend(stage / (num_stages - 1))) for stage in range(num_stages)]


def method_styles(labels: Sequence[str], methods: Sequence[str]) -> Styles:
    """Give every label a style, in the order of the labels.

    Args:
        labels: Labels of groups of runs.
        methods: The method of each group.
    """
    of_baseline, others = iter(_BASELINE_STYLES), cycle(_STYLES)
    chosen: Styles = {}
    for label, method in zip(labels, methods, strict=True):
        is_baseline = method == BASELINE or method.startswith(f"{BASELINE}-")
        own = next(of_baseline, None) if is_baseline else None
        chosen[label] = own or next(others)
    return chosen


def moved_apart(places: Sequence[float], gap: float) -> list[float]:
    """Move places as little as needed so that neighbours are ``gap`` apart, for labels.

    Example:
        >>> moved_apart([1.0, 1.0, 9.0], 2.0)
        [0.0, 2.0, 9.0]
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    clusters: list[tuple[list[int], float]] = []  # members, and the middle of their places
    for member in order:
        members, middle = [member], places[member]
        while (
            clusters and middle - clusters[-1][1] < gap * (len(members) + len(clusters[-1][0])) / 2
        ):
            before, centre = clusters.pop()
            total = len(before) + len(members)
            middle = (centre * len(before) + middle * len(members)) / total
            members = before + members
        clusters.append((members, middle))
    moved = list(places)
    for members, middle in clusters:
        for position, member in enumerate(members):
            moved[member] = middle + gap * (position - (len(members) - 1) / 2)
    return moved


def short_label(label: str, limit: int = 24) -> str:
    """Shorten a name for a legend; matplotlib hides names that begin with an underscore."""
    shown = f" {label}" if label.startswith("_") else label
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def small_marks(points: Sequence[float], size: float = 3.2) -> dict[str, Any]:
    """Mark the points of a line while there are few."""
    return {"marker": "o", "markersize": size if len(points) <= 40 else 0}


def side_legend(axes: Any, handles: Sequence[Any] = (), title: str | None = None) -> None:
    """Put a legend beside the axes, where it hides nothing."""
    axes.legend(
        handles=list(handles) or axes.get_legend_handles_labels()[0],
        title=title,
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        handlelength=1.9,
        labelspacing=0.4,
        borderaxespad=0,
    )


def percent_axis(axes: Any, floor: float | None = None) -> None:
    """Label the vertical axis as accuracy in percent; it begins at ``floor``, if there is one."""
    axes.set_ylabel("accuracy (%)")
    if floor is None:
        axes.margins(y=0.08)
        return
    top = axes.dataLim.y1
    axes.set_ylim(floor, top + 0.05 * (top - floor))


def whole_axis(axes: Any, name: str) -> None:
    """Label the horizontal axis with whole numbers of steps or epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def lane_axis(axes: Any, places: Sequence[float], names: Sequence[str]) -> None:
    """Name horizontal lanes or bars on the vertical axis."""
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def band(axes: Any, xs: Sequence[float], runs: Sequence[Sequence[float]], colour: str) -> None:
    """Shade what lies between the lowest and the highest of several runs."""
    columns = list(zip(*runs, strict=True))
    low, high = list(map(min, columns)), list(map(max, columns))
    axes.fill_between(xs, low, high, color=colour, alpha=0.14, linewidth=0)
