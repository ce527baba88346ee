"""Reports: pictures, a self-contained page and a table, from the folders that runs leave behind.

May import: errors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from scpl.report.comparison import Comparison
from scpl.report.comparison_page import comparison_page
from scpl.report.comparisons import comparison_panels
from scpl.report.panels import Panel, can_draw, panels_png
from scpl.report.plots import run_panels
from scpl.report.reading import RunRecord
from scpl.report.run_page import run_page
from scpl.report.tables import Absent, comparison_table
from scpl.report.throughput import throughput_table

__all__ = [
    "Absent",
    "Comparison",
    "RunRecord",
    "comparison_table",
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
    """
    run = RunRecord.read(folder)
    heading = f"{run.text('method')} on {run.text('data')}, {run.text('model')}"
    return _write(run.folder, run_page(run), run_panels(run), heading)


def write_comparison_report(folder: Path, comparison: Comparison) -> tuple[Path, ...]:
    """Write ``results.png`` and ``report.html`` about several runs into a folder.

    Args:
        folder: Where to write; made if it is not there.
        comparison: The runs.

    Returns:
        The files written.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    panels = comparison_panels(comparison.runs, comparison.target)
    return _write(Path(folder), comparison_page(comparison), panels, comparison.title)


def _write(folder: Path, page: str, panels: Sequence[Panel], heading: str) -> tuple[Path, ...]:
    files = {}
    if panels and can_draw():
        files["results.png"] = panels_png(panels, heading)
    files["report.html"] = page.encode("utf-8", "replace")
    return tuple(_replace(folder / name, content) for name, content in files.items())


def _replace(path: Path, content: bytes) -> Path:
    """Write a file so that a reader sees the old one or the new one, never a half."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path
