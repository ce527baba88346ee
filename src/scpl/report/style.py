"""What every picture shares: colours of stages and methods, axes and legends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = [
    "INK",
    "MUTED",
    "Styles",
    "method_styles",
    "percent_axis",
    "short_label",
    "side_legend",
    "stage_colours",
    "whole_axis",
]

Styles = dict[str, tuple[str, str]]  # label to colour and line style
INK, MUTED, GRID = "#1b1f24", "#57606a", "#e3e7ec"
# Light to dark with rising contrast on white; told apart with every kind of colour blindness.
_STAGE_ANCHORS = ("#74c05a", "#1f9e89", "#2c728e", "#414487", "#2b0b45")
# Okabe and Ito's colours; a method keeps its colour and dashes in every picture.
_METHODS = {
    "scpl": ("#0072b2", "-"),
    "bp": ("#1b1f24", "--"),
    "early-exit": ("#d55e00", "-"),
    "al": ("#009e73", "-"),
    "bp-wide": ("#6e7781", "--"),
    "bp-cut": ("#6e7781", ":"),
    "gpipe": ("#cc79a7", "-."),
    "1f1b": ("#56b4e9", "-."),
    "ddp": ("#e69f00", "--"),
}
_SPARE = ("#332288", "#88ccee", "#117733", "#999933", "#cc6677", "#882255", "#44aa99", "#aa4499")


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
    """Give every label a colour and a line style; the first of a known method gets its own."""
    spare = iter(_SPARE * len(labels))
    chosen: Styles = {}
    for label, method in zip(labels, methods, strict=True):
        own = _METHODS.get(method)
        chosen[label] = own if own and own not in chosen.values() else (next(spare), "-")
    return chosen


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


def percent_axis(axes: Any) -> None:
    """Label the vertical axis as accuracy in percent."""
    axes.set_ylabel("accuracy (%)")
    axes.margins(y=0.08)


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
