"""What the final test found, as tables and pictures: confusions, probabilities, numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from scpl.report.formats import count, one_line, percent, short, text
from scpl.report.panels import INK, MUTED, Panel, balanced, short_label
from scpl.runs.columns import F1, PICTURE, R2, SAMPLE, TEXT
from scpl.runs.metrics import METRICS
from scpl.runs.tested import Bin, Points, Row, Tested

__all__ = [
    "NUMBERED",
    "Table",
    "confusion_table",
    "in_brief",
    "mistake_rows",
    "output_table",
    "tested_panels",
]

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Names of the columns, and rows of cells."""

MOST_ROWS = 20
"""Rows of a table on a page; the files have the others."""
NUMBERED, _NAMED = 20, 40
"""Up to so many classes a picture of confusions has numbers in its cells; and names beside them."""
_MOST_NUMBERS = 4
"""Pictures of true and predicted numbers."""
_BLUE = "#0072b2"


# Tables


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """Sort classes or labels by F1, numbers by R2; what was not measured comes last."""
    by = F1 if rows and F1 in rows[0] else R2

    def key(row: Row) -> float:
        value = row.get(by, math.nan)
        return value if isinstance(value, float) and math.isfinite(value) else math.inf

    return sorted(rows, key=key)


def output_table(tested: Tested) -> Table:
    """Show the classes, labels or numbers that are predicted worst."""
    rows = worst_first(tested.table)[:MOST_ROWS]
    header = [_title(name) for name in rows[0]] if rows else []
    return header, [[_written(name, cell) for name, cell in row.items()] for row in rows]


def confusion_table(tested: Tested, most: int = MOST_ROWS) -> Table:
    """Show the most frequent confusions."""
    found = [
        (number, true, taken)
        for true, row in enumerate(tested.confusion)
        for taken, number in enumerate(row)
        if number and taken != true
    ]
    found.sort(key=lambda each: (-each[0], *each[1:]))
    names, sizes = tested.names, [sum(row) for row in tested.confusion]
    rows = [
        [names[true], names[taken], count(number), percent(number / sizes[true])]
        for number, true, taken in found[:most]
    ]
    return ["true", "taken for", "samples", "of the true ones"], rows


def mistake_rows(tested: Tested) -> tuple[Sequence[str], list[dict[str, Any]]]:
    """Give the columns of the mistakes; and of each its sample, text, picture and cells."""
    apart = (SAMPLE, TEXT, PICTURE)
    rows = [
        {
            "sample": str(row.get(SAMPLE, "")),
            "text": row.get(TEXT),
            "picture": row.get(PICTURE),
            "cells": [_written(name, cell) for name, cell in row.items() if name not in apart],
        }
        for row in tested.mistakes
    ]
    names = tested.mistakes[0] if tested.mistakes else ()
    return [_title(name) for name in names if name not in apart], rows


def in_brief(result: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten the account of predictions (``test.json``) in a result for a terminal.

    There remain the worst rows of its table, the most frequent confusions, and the mistakes
    without texts.
    """
    tested = Tested.of(result)
    header, confusions = confusion_table(tested, most=10)
    long = ("table", "mistakes", "confusion", "calibration", "points")
    brief = {name: value for name, value in result.items() if name not in long}
    if not math.isnan(tested.calibration_error):
        brief["expected_calibration_error"] = tested.calibration_error
    left = len(tested.table) - MOST_ROWS
    rows = worst_first(tested.table)[:MOST_ROWS]
    brief["table"] = [
        {name: one_line(_written(name, cell)) for name, cell in row.items()} for row in rows
    ]
    if left > 0:
        brief["not_shown"] = f"{left:,} better rows; --json has all"
    if confusions:
        brief["confusion"] = [
            dict(zip(header, map(one_line, row), strict=True)) for row in confusions
        ]
    if tested.mistakes:
        brief["mistakes"] = [
            {name: one_line(_written(name, cell)) for name, cell in row.items() if name != TEXT}
            for row in tested.mistakes
        ]
    return brief


def _title(name: str) -> str:
    return METRICS[name].title if name in METRICS else name.replace("_", " ")


def _written(name: str, cell: str | float) -> str:
    if isinstance(cell, str):
        return cell
    if name in METRICS:
        return METRICS[name].write(cell, 1)
    if name == "probability":
        return percent(cell)
    return count(cell) if cell == math.floor(cell) else short(cell)


# Pictures


def tested_panels(tested: Tested) -> list[Panel]:
    """List the pictures that a test has data for."""
    return balanced([*_confusion_panels(tested), *_bin_panels(tested), *_point_panels(tested)])


def _confusion_panels(tested: Tested) -> Iterator[Panel]:
    size = len(tested.confusion)
    if not size:
        return
    right = sum(tested.confusion[place][place] for place in range(size))
    whole = sum(map(sum, tested.confusion))
    note = "" if size <= NUMBERED else " The most frequent confusions are in the table below."
    yield Panel(
        name="confusion",
        title="Which class is taken for which",
        caption="Colour: share of the samples of the true class (row) that were taken for the "
        f"class of the column; numbers are samples.{note}"
        if size <= NUMBERED
        else f"Colour: share of the samples of the true class (row).{note}",
        alternative=f"Table of confusions of {size} classes: {right:,} of {whole:,} samples are on "
        "the diagonal.",
        draw=partial(_draw_confusion, tested.confusion, tested.names),
        height=4.4 if size <= 12 else 5.6 if size <= NUMBERED else 8.0,
        wide=size > 12,
    )


def _draw_confusion(confusion: Sequence[Sequence[int]], names: Sequence[str], axes: Any) -> None:
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    size = len(confusion)
    shares = [[number / max(sum(row), 1) for number in row] for row in confusion]
    # Rare confusions must be seen beside a diagonal that is nearly 1.
    norm = PowerNorm(0.5, 0, 1)
    colours = LinearSegmentedColormap.from_list("share", ["#ffffff", "#9ecae1", _BLUE, "#08306b"])
    image = axes.imshow(shares, cmap=colours, norm=norm, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, shrink=0.85, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1],
                         format=lambda share, _: f"{100 * share:g} %")  # fmt: skip
    axes.grid(visible=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if size <= _NAMED:
        labels = [short_label(name, 16) for name in names]
        upright = sum(map(len, labels)) <= 40
        axes.set_xticks(range(size), labels, rotation=0 if upright else 90)
        axes.set_yticks(range(size), labels)
    if size <= NUMBERED:
        for true, row in enumerate(confusion):
            for taken, number in enumerate(row):
                if number:
                    dark = norm(shares[true][taken]) > 0.55
                    axes.text(taken, true, f"{number:,}", ha="center", va="center",
                              color="white" if dark else INK,
                              fontsize=9 if size <= 4 else 7 if size <= 12 else 6)  # fmt: skip


def _bin_panels(tested: Tested) -> Iterator[Panel]:
    bins = [each for each in tested.bins if math.isfinite(sum(each)) and each.size > 0]
    if not bins:
        return
    error = percent(tested.calibration_error)
    yield Panel(
        name="calibration",
        title=f"Are probabilities what they say? Off by {error} on average",
        caption="Blue: how often predictions of about one probability were so; on the dashed line "
        "they are what they say, below it the network is too sure. Grey: share of the predictions. "
        f"Expected calibration error over {len(tested.bins)} bins: {error}.",
        alternative=f"Reliability diagram; expected calibration error {error}.",
        draw=partial(_draw_bins, bins),
        height=4.4,
    )


def _draw_bins(bins: Sequence[Bin], axes: Any) -> None:
    whole = sum(each.size for each in bins)
    middles = [(each.begin + each.end) / 2 for each in bins]
    widths = [each.end - each.begin for each in bins]
    axes.bar(
        middles, [100 * each.size / whole for each in bins], widths,
        color="#d0d7de",
    )  # fmt: skip
    axes.plot([0, 1], [0, 100], color=MUTED, linestyle="--", linewidth=1)
    axes.plot(
        [each.probability for each in bins], [100 * each.share for each in bins],
        color=_BLUE, marker="o", markersize=4,
    )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 104)
    axes.set_xlabel("predicted probability")
    axes.set_ylabel("how often it was so (%)")


def _point_panels(tested: Tested) -> Iterator[Panel]:
    for place, points in enumerate(tested.points[:_MOST_NUMBERS]):
        yield Panel(
            name=f"points-{place}",
            title=f"{short_label(points.name, 40)}: true and predicted",
            caption=f"{len(points.true):,} test samples; on the dashed line the prediction is "
            "true.",
            alternative=f"Predicted against true values of {text(points.name)}.",
            draw=partial(_draw_points, points),
            height=4.0,
        )


def _draw_points(points: Points, axes: Any) -> None:
    pairs = [
        pair
        for pair in zip(points.true, points.predicted, strict=True)
        if all(map(math.isfinite, pair))
    ]
    if pairs:
        low, high = min(map(min, pairs)), max(map(max, pairs))
        axes.plot([low, high], [low, high], color=MUTED, linestyle="--", linewidth=1)
        axes.scatter(*zip(*pairs, strict=True), s=9, color=_BLUE, alpha=0.45, linewidths=0)
    axes.set_xlabel("true")
    axes.set_ylabel("predicted")
