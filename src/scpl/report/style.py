"""What every picture shares: colours of stages and methods, axes and legends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = [
    "INK",
    "MUTED",
    "Style",
    "Styles",
    "method_styles",
    "percent_axis",
    "short_label",
    "side_legend",
    "spread",
    "stage_colours",
    "whole_axis",
]

INK, MUTED, GRID = "#1b1f24", "#57606a", "#e3e7ec"
# Light to dark with rising contrast on white; told apart with every kind of colour blindness.
_STAGE_ANCHORS = ("#74c05a", "#1f9e89", "#2c728e", "#414487", "#2b0b45")


class Style(NamedTuple):
    """How a method looks in every picture of a page: colour, kind of line, mark."""

    colour: str
    line: str
    mark: str


Styles = dict[str, Style]
"""By label of a group."""

# Okabe and Ito's colours and shades of grey. Solid lines learn locally, others end to end: who
# sees no colours still tells the families apart, and the marks tell apart the members.
_METHODS = {
    "scpl": Style("#0072b2", "-", "o"),
    "early-exit": Style("#d55e00", "-", "s"),
    "al": Style("#009e73", "-", "D"),
    "bp": Style("#1b1f24", "--", "o"),
    "bp-wide": Style("#6e7781", "--", "s"),
    "bp-cut": Style("#8a6d3b", ":", "D"),
    "gpipe": Style("#cc79a7", "-.", "^"),
    "1f1b": Style("#56b4e9", "-.", "v"),
    "zero-bubble": Style("#882255", "-.", "P"),
    "ddp": Style("#e69f00", "--", "X"),
}
_SPARE = tuple(
    Style(colour, "-", mark)
    for colour, mark in zip(
        ("#332288", "#117733", "#aa4499", "#44aa99", "#999933", "#cc6677", "#88ccee", "#661100"),
        "^vPX<>*h",
        strict=True,
    )
)


def stage_colours(num_stages: int) -> list[str]:
    """Colours of stages, from light (the first) to dark (the last)."""
    if num_stages == 1:
        return [_STAGE_ANCHORS[2]]
    last = len(_STAGE_ANCHORS) - 1
    positions = [last * stage / (num_stages - 1) for stage in range(num_stages)]
    return [
        _blend(_STAGE_ANCHORS[int(p)], _STAGE_ANCHORS[min(int(p) + 1, last)], p % 1)
        for p in positions
    ]


def method_styles(labels: Sequence[str], methods: Sequence[str]) -> Styles:
    """Give every label a style; the first of a known method gets its own."""
    spare = iter(_SPARE * len(labels))
    chosen: Styles = {}
    for label, method in zip(labels, methods, strict=True):
        own = _METHODS.get(method)
        chosen[label] = own if own and own not in chosen.values() else next(spare)
    return chosen


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move places as little as needed so that neighbours are ``gap`` apart, for labels.

    Example:
        >>> spread([1.0, 1.0, 9.0], 2.0)
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


def short_label(label: str, limit: int = 24) -> str:
    """Shorten a name for a legend; matplotlib hides names that begin with an underscore."""
    shown = f" {label}" if label.startswith("_") else label
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def _blend(first: str, second: str, share: float) -> str:
    pairs = [(int(first[i : i + 2], 16), int(second[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)
