"""What the pictures of a report share: how one is rendered, colours, axes and legends.

matplotlib is imported inside the functions (it is an extra, and takes a second to import), and only
its object interface is used: no pyplot, no backend, no setting that outlives a call.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from scpl.report.groups import BASELINE
from scpl.runs.metrics import Metric

__all__ = [
    "INK",
    "MUTED",
    "Panel",
    "Style",
    "Styles",
    "balanced",
    "band",
    "can_draw",
    "lane_axis",
    "method_styles",
    "moved_apart",
    "panel_svg",
    "panels_png",
    "score_axis",
    "short_label",
    "side_legend",
    "small_marks",
    "stage_colours",
    "whole_axis",
]

_STYLE_SHEET = Path(__file__).with_name("scpl.mplstyle")


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        name: Short name, unique on a page; letters, digits and dashes.
        title: Heading above the picture.
        caption: What is shown and how it was measured.
        alternative: The picture in words, for those who do not see it.
        draw: Draws on a matplotlib ``Axes``.
        height: Height in inches.
        wide: Whether the picture needs the width of the page.
    """

    name: str
    title: str
    caption: str
    alternative: str
    draw: Callable[[Any], None]
    height: float = 3.5
    wide: bool = False


def balanced(panels: Iterable[Panel]) -> list[Panel]:
    """Widen every panel that would stand alone in a row of two; two in a row get one height."""
    return [
        replace(panel, wide=len(row) == 1, height=max(neighbour.height for neighbour in row))
        for row in _rows(panels)
        for panel in row
    ]


def can_draw() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def panel_svg(panel: Panel) -> str:
    """Render a panel as one ``<svg>`` element whose ids are its own on any page."""
    from matplotlib.figure import Figure

    with _styled({"svg.hashsalt": panel.name}):
        figure = Figure(figsize=(10.8 if panel.wide else 5.2, panel.height), layout="constrained")
        panel.draw(figure.add_subplot())
        document = _rendered(figure, "svg").decode()
    return _inline(document, f"{panel.name}-", panel.alternative)


def panels_png(panels: Sequence[Panel], heading: str) -> bytes:
    """Render panels into one image, two in a row, wide ones alone."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = _rows(panels)
    heights = [max(panel.height for panel in row) for row in rows]
    with _styled({}):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(12.8, 0.5 + sum(heights)), dpi=110, layout=layout)
        figure.suptitle(
            short_label(heading, 100), x=0.012, ha="left", fontsize=13, fontweight="bold"
        )
        grid = figure.add_gridspec(len(rows), 2, height_ratios=heights)
        for index, row in enumerate(rows):
            for column, panel in enumerate(row):
                place = grid[index, :] if panel.wide else grid[index, column]
                axes = figure.add_subplot(place)
                panel.draw(axes)
                axes.set_title(panel.title)
        return _rendered(figure, "png")


def _rendered(figure: Any, form: str) -> bytes:
    """Draw once; ``figure.savefig`` would do so twice, to lay out and to save."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.BytesIO()
    if form == "png":
        FigureCanvasAgg(figure).print_png(file)
    else:
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    return file.getvalue()


@contextmanager
def _styled(extra: dict[str, str]) -> Iterator[None]:
    """Draw in the style of the reports, then leave every setting as it was."""
    import matplotlib.style

    # "default": a user's own matplotlibrc must not change what a report looks like.
    style_sheets = ["default", _STYLE_SHEET, extra]
    with matplotlib.style.context(style_sheets), warnings.catch_warnings():
        # A name in a script the font lacks is drawn as boxes; the page's text shows it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        # Twelve stages in a low picture: labels may touch, which is no reason to alarm anyone.
        warnings.filterwarnings("ignore", message="constrained_layout not", category=UserWarning)
        yield


def _rows(panels: Iterable[Panel]) -> list[list[Panel]]:
    rows: list[list[Panel]] = []
    for panel in panels:
        last = rows[-1] if rows else []
        if len(last) == 1 and not panel.wide and not last[0].wide:
            last.append(panel)
        else:
            rows.append([panel])
    return rows


def _inline(document: str, prefix: str, alternative: str) -> str:
    """Make a stand-alone SVG file part of a page."""
    svg = re.sub(r"<!--.*?-->\s*", "", document[document.index("<svg") :], flags=re.DOTALL)
    ids = re.compile(r'(\bid="|href="#|url\(#)')
    svg = re.sub(r"<[^>]+>", lambda tag: ids.sub(rf"\g<1>{prefix}", tag[0]), svg)
    opening, _, rest = svg.partition(">")
    opening = re.sub(r' (?:width|height)="[\d.]+pt"', "", opening)
    label = f'<svg role="img" aria-label="{escape(alternative)}"'
    return f"{opening.replace('<svg', label, 1)}>{rest}".strip()


# Colours, axes and legends


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
    """Give every label of a group of runs a style, in their order; ``methods`` one per label."""
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
        while clusters:
            before, centre = clusters[-1]
            total = len(before) + len(members)
            if middle - centre >= gap * total / 2:
                break
            middle = (centre * len(before) + middle * len(members)) / total
            members = clusters.pop()[0] + members
        clusters.append((members, middle))
    moved = list(places)
    for members, middle in clusters:
        for position, member in enumerate(members):
            moved[member] = middle + gap * (position - (len(members) - 1) / 2)
    return moved


def short_label(label: str, limit: int = 24) -> str:
    """Shorten a name for a legend; matplotlib hides names that begin with an underscore.

    It is cut in the middle: names of one set often differ only at their ends.
    """
    shown = f" {label}" if label.startswith("_") else label
    if len(shown) <= limit:
        return shown
    end = (limit - 1) // 2
    return f"{shown[: limit - 1 - end]}…{shown[-end:]}"


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


def score_axis(axes: Any, metric: Metric, floor: float | None = None) -> None:
    """Label the vertical axis as a metric; it begins at ``floor``, if there is one."""
    axes.set_ylabel(f"{metric.title}{metric.unit}")
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
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")


def band(axes: Any, xs: Sequence[float], runs: Sequence[Sequence[float]], colour: str) -> None:
    """Shade what lies between the lowest and the highest of several runs."""
    columns = list(zip(*runs, strict=True))
    low, high = list(map(min, columns)), list(map(max, columns))
    axes.fill_between(xs, low, high, color=colour, alpha=0.14, linewidth=0)
