"""One picture of a report, and how it is rendered: as SVG for the page, as PNG for the folder.

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
from pathlib import Path
from typing import Any

from scpl.report.style import short_label

__all__ = ["Panel", "balanced", "can_draw", "panel_svg", "panels_png"]

_STYLE = Path(__file__).with_name("scpl.mplstyle")


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
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    return _inline(text.getvalue(), f"{panel.name}-", panel.alternative)


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
        image = io.BytesIO()
        figure.savefig(image, format="png")
    return image.getvalue()


@contextmanager
def _styled(extra: dict[str, str]) -> Iterator[None]:
    """Draw in the style of the reports, then leave every setting as it was."""
    import matplotlib.style

    # "default": a user's own matplotlibrc must not change what a report looks like.
    style = matplotlib.style.context(["default", _STYLE, extra])
    with style, warnings.catch_warnings():
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
    svg = re.sub(r"<[^>]+>", lambda tag: _prefix_ids(tag[0], prefix), svg)
    opening, _, rest = svg.partition(">")
    opening = re.sub(r' (?:width|height)="[\d.]+pt"', "", opening)
    label = f'<svg role="img" aria-label="{escape(alternative)}"'
    return f"{opening.replace('<svg', label, 1)}>{rest}".strip()


def _prefix_ids(tag: str, prefix: str) -> str:
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", tag)
