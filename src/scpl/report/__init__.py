"""Reports: pictures, a self-contained page and a table, from the folders that runs leave behind.

May import: errors, runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scpl.files import write_whole
from scpl.report.comparison import Absent, Comparison
from scpl.report.comparison_plots import comparison_panels
from scpl.report.exit_plots import exits_picture
from scpl.report.formats import text, throughput_table
from scpl.report.pages import comparison_page, run_page
from scpl.report.panels import Panel, can_draw, panels_png
from scpl.report.run_plots import run_panels
from scpl.report.tested import in_brief, tested_panels
from scpl.runs import RunRecord

__all__ = [
    "Absent",
    "Comparison",
    "can_draw",
    "exits_picture",
    "in_brief",
    "throughput_table",
    "write_comparison_report",
    "write_run_report",
]


def write_run_report(folder: Path) -> tuple[Path, ...]:
    """Write ``results.png`` and ``report.html`` into a run folder.

    Without matplotlib only the page is written, with all numbers and no pictures.

    Args:
        folder: A run folder; the run may be unfinished.

    Returns:
        The files written.

    Raises:
        CheckpointError: The folder is not a run folder, or one of its files is damaged.
        OSError: The files cannot be written.
    """
    run = RunRecord.read(folder)
    panels = run_panels(run)
    method, data, model = (text(run.summary.get(key)) for key in ("method", "data", "model"))
    page = run_page(run, panels, tested_panels(run.tested))
    return _write(run.folder, page, panels, f"{method} on {data}, {model}")


def write_comparison_report(folder: Path, comparison: Comparison) -> tuple[Path, ...]:
    """Write ``results.png`` and ``report.html`` about several runs into a folder.

    Args:
        folder: Where to write; made if it is not there.
        comparison: The runs.

    Returns:
        The files written.

    Raises:
        OSError: The files cannot be written.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    panels = comparison_panels(comparison.runs, comparison.target)
    page = comparison_page(comparison, panels)
    return _write(Path(folder), page, panels, comparison.title)


def _write(folder: Path, page: str, panels: Sequence[Panel], heading: str) -> tuple[Path, ...]:
    files = {}
    if panels and can_draw():
        files[folder / "results.png"] = panels_png(panels, heading)
    files[folder / "report.html"] = page.encode("utf-8", "replace")
    for path, content in files.items():
        write_whole(path, content)
    return tuple(files)
