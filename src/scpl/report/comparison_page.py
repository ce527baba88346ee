"""The page of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scpl.report.comparison import Comparison
from scpl.report.comparisons import comparison_panels
from scpl.report.formats import count, duration, memory, percent
from scpl.report.groups import group_runs
from scpl.report.html import Html, definitions, join, page, section, table, tag
from scpl.report.reading import RunRecord, as_numbers
from scpl.report.sections import differences, environments, figures, footer, recipe

__all__ = ["comparison_page"]

_FAIRNESS = (
    "Read accuracy and time together: a method that is faster and less accurate is not better, nor "
    "is one that is more accurate in more time. Ratios hold for this hardware and these settings."
)


def comparison_page(comparison: Comparison) -> str:
    """Write the page of a comparison."""
    runs, title = comparison.runs, comparison.title
    return page(
        f"{title} - scpl report",
        tag("h1", title),
        tag("p", _overview(runs), class_="lead"),
        section("Results", *_results(comparison)),
        section("Pictures", figures(comparison_panels(runs, comparison.target))),
        section("What must be known of single methods", _notes(runs)),
        section("Every run", _run_table(runs)),
        section("What differs in the configurations", differences(runs)),
        section("Command", _command(comparison)),
        section("Exact configurations and commands of the runs", *map(recipe, runs)),
        section("Versions and hardware", *environments(runs)),
        footer(),
    )


def _results(comparison: Comparison) -> list[Html]:
    found = comparison.table()
    missing = [(absent.run, absent.words) for absent in found.absent]
    notes = (found.footnote, _FAIRNESS)
    rows = [[name, *map(_unbroken, cells)] for name, *cells in found.rows]
    return [
        table(found.header, rows, missing, class_="results"),
        *(tag("p", note, class_="note") for note in notes if note),
    ]


def _unbroken(cell: str) -> Html:
    """Let a cell break before what stands in parentheses, and nowhere else."""
    value, parenthesis, rest = cell.partition(" (")
    parts = [tag("span", value)]
    if parenthesis:
        parts += [Html(" "), tag("span", f"({rest}")]
    return join(parts)


def _notes(runs: Sequence[RunRecord]) -> Html:
    groups = group_runs([run.summary for run in runs])
    return definitions({g.label: " ".join(map(_sentence, g.notes())) for g in groups if g.notes()})


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _command(comparison: Comparison) -> Html:
    return tag("pre", comparison.command, class_="wrap") if comparison.command else Html("")


def _run_table(runs: Sequence[RunRecord]) -> Html:
    header = ["run", "method", "seed", "test accuracy", "validation accuracy", "wall clock"]
    rows = [
        [
            run.folder.name,
            run.text("method"),
            run.text("seed"),
            percent(run.number("test_accuracy"), 2),
            percent(run.number("valid_accuracy"), 2),
            duration(run.number("wall_seconds")),
            count(run.number("samples_per_second")),
            memory(max(as_numbers(run.summary.get("peak_memory_bytes")), default=math.nan)),
        ]
        for run in runs
    ]
    return table([*header, "samples/s", "peak memory"], rows)


def _overview(runs: Sequence[RunRecord]) -> str:
    parts = [f"{len(runs)} run{'s' * (len(runs) != 1)}"]
    for key, word in (("data", ""), ("model", ""), ("epochs", "epochs "), ("seed", "seeds ")):
        values = dict.fromkeys(run.text(key) for run in runs)
        parts.append(f"{word}{', '.join(values)}")
    return " \N{MIDDLE DOT} ".join(parts)
