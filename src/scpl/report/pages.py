"""The two pages: one run, and a comparison of runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence

from scpl.report.comparisons import comparison_panels
from scpl.report.formats import DASH, count, duration, memory, percent
from scpl.report.groups import group_runs
from scpl.report.html import (
    Html,
    definitions,
    flatten,
    fold,
    join,
    page,
    picture,
    section,
    table,
    tag,
)
from scpl.report.observations import observation_words
from scpl.report.panels import Panel, can_draw, panel_svg
from scpl.report.plots import run_panels
from scpl.report.reading import RunRecord, as_numbers
from scpl.report.tables import FOOTNOTE, comparison_rows

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["comparison_page", "run_page"]

_NO_PLOTS = "The pictures need matplotlib: pip install 'scpl[plots]'. Everything else is here."
_FAIRNESS = (
    "Read accuracy and time together: a method that is faster and less accurate is not better, nor "
    "is one that is more accurate in more time. Ratios hold for this hardware and these settings."
)


def run_page(run: RunRecord) -> str:
    """Write the page of one run."""
    title = f"{run.text('method')} on {run.text('data')}"
    return page(
        f"{title} - scpl report",
        tag("h1", title),
        tag("p", _description(run), class_="lead"),
        "" if run.finished else tag("p", "This run has not finished; it holds no summary yet."),
        _tiles(run),
        section("Curves", _figures(run_panels(run))),
        section("Stages", _stage_table(run)),
        section("Epochs", _epoch_table(run)),
        section("Configuration", _config(run)),
        section("Command", _command(run)),
        section("Versions and hardware", definitions(_environment(run))),
        _footer(),
    )


def comparison_page(runs: Sequence[RunRecord], title: str) -> str:
    """Write the page of a comparison."""
    header, rows = comparison_rows([run.summary for run in runs])
    return page(
        f"{title} - scpl report",
        tag("h1", title),
        tag("p", _overview(runs), class_="lead"),
        section(
            "Results",
            table(header, rows),
            *(tag("p", note, class_="note") for note in (FOOTNOTE, _FAIRNESS)),
        ),
        section("Pictures", _figures(comparison_panels(runs))),
        section("Every run", _run_table(runs)),
        section("What differs in the configurations", _differences(runs)),
        section("Exact configurations and commands", *map(_recipe, runs)),
        section("Versions and hardware", *_environments(runs)),
        _footer(),
    )


def _description(run: RunRecord) -> str:
    parts = [run.text("model")]
    for key, one, many in (
        ("stages", "stage", "stages"),
        ("processes", "process", "processes"),
        ("epochs", "epoch", "epochs"),
    ):
        number = run.number(key)
        if math.isfinite(number):
            parts.append(f"{number:.0f} {one if number == 1 else many}")
    return " · ".join([*parts, f"seed {run.text('seed')}", f"folder {run.folder.name}"])


def _tiles(run: RunRecord) -> Html:
    peaks = [value for value in as_numbers(run.summary.get("peak_memory_bytes")) if value == value]
    waits = [value for value in as_numbers(run.summary.get("wait_share")) if value == value]
    wall = duration(run.number("wall_seconds"))
    tiles = [
        ("Test accuracy", percent(run.number("test_accuracy"), 2), f"in {wall}"),
        ("Validation accuracy", percent(run.number("valid_accuracy"), 2), f"in {wall}"),
        ("Wall-clock time", wall, f"{percent(run.number('test_accuracy'))} test accuracy"),
        ("Throughput", count(run.number("samples_per_second")), "samples per second"),
        (
            "Peak memory",
            memory(max(peaks, default=math.nan)),
            f"largest process; {memory(math.fsum(peaks))} in all" if peaks[1:] else "one process",
        ),
    ]
    if waits:
        worst = max(range(len(waits)), key=waits.__getitem__)
        mean = math.fsum(waits) / len(waits)
        most = f"mean; most {percent(waits[worst])}" if waits[1:] else "of the time"
        tiles.append(("Waiting", percent(mean), most))
    known = [tile for tile in tiles if tile[1] != DASH]
    blocks = (
        tag("div", tag("dt", name), tag("dd", value), tag("dd", note), class_="tile")
        for name, value, note in known
    )
    return tag("dl", *blocks, class_="tiles") if known else Html("")


def _figures(panels: Sequence[Panel]) -> Html:
    if not panels:
        return tag("p", "There is nothing to draw yet.", class_="note")
    if not can_draw():
        return tag("p", _NO_PLOTS, class_="note")
    figures = (picture(panel_svg(p), p.title, p.caption, p.wide) for p in panels)
    return tag("div", *figures, class_="figures")


def _stage_table(run: RunRecord) -> Html:
    waits = as_numbers(run.summary.get("wait_share"))
    terms, readouts = run.train_columns(), run.readout_columns()
    seen = run.train_columns("observed")
    header = ["stage", *(f"train {term.replace('_', ' ')}" for term in terms)]
    header += ["validation accuracy of its read-out"] if readouts else []
    header += map(observation_words, seen)
    header += ["time waited"] if waits else []
    if len(header) == 1:
        return Html("")
    rows = []
    for stage in range(run.num_stages):
        row = [str(stage), *(_last(run, by_stage.get(stage)) for by_stage in terms.values())]
        row += [_last(run, readouts.get(stage), share=True)] if readouts else []
        row += [_last(run, by_stage.get(stage)) for by_stage in seen.values()]
        row += [percent(waits[stage]) if stage < len(waits) else DASH] if waits else []
        rows.append(row)
    return table(header, rows)


def _last(run: RunRecord, column: str | None, share: bool = False) -> str:
    value = run.column(column)[-1] if column and run.epochs else math.nan
    return percent(value, 2) if share else _short(value)


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else DASH


def _epoch_table(run: RunRecord) -> Html:
    if not run.epochs:
        return Html("")
    rows = [
        [
            _short(row["epoch"]),
            percent(row.get("valid_accuracy", math.nan), 2),
            duration(row.get("seconds", math.nan)),
            count(row.get("samples_per_second", math.nan)),
            _short(row.get("valid_loss", math.nan)),
            _short(row.get("lr", math.nan)),
        ]
        for row in run.epochs
    ]
    header = ["epoch", "validation accuracy", "wall clock", "samples/s", "validation loss"]
    whole = table([*header, "learning rate"], rows)
    return whole if len(rows) <= 12 else fold(f"All {len(rows)} epochs", whole)


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


def _differences(runs: Sequence[RunRecord]) -> Html:
    """Show the keys of the configuration that are not the same in all runs."""
    configs = [_parsed(run.config) for run in runs]
    if not any(configs):
        return Html("")
    changing = _changing(configs)
    if not changing:
        return tag("p", "Nothing: all runs have the same configuration.", class_="note")
    num_same = len({key for config in configs for key in config}) - len(changing)
    rest = f"Keys that are the same in all runs: {num_same}."
    return join([_by_group(runs, configs, changing), tag("p", rest, class_="note")])


def _changing(trees: Sequence[Mapping[str, str]]) -> list[str]:
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return [key for key in keys if len({tree.get(key) for tree in trees}) > 1]


def _by_group(
    runs: Sequence[RunRecord], trees: Sequence[Mapping[str, str]], keys: Sequence[str]
) -> Html:
    """Make a table of keys against groups; a cell lists the values within the group."""
    groups = group_runs([run.summary for run in runs])
    rows = []
    for key in keys:
        cells = (dict.fromkeys(trees[i].get(key, DASH) for i in g.members) for g in groups)
        rows.append([key, *(", ".join(values) for values in cells)])
    return table(["", *(group.label for group in groups)], rows)


def _parsed(config: str) -> dict[str, str]:
    try:
        return flatten(tomllib.loads(config))
    except tomllib.TOMLDecodeError:
        return {}


def _config(run: RunRecord) -> Html:
    return tag("pre", run.config.strip()) if run.config.strip() else Html("")


def _command(run: RunRecord) -> Html:
    return tag("pre", run.command, class_="wrap") if run.command else Html("")


def _recipe(run: RunRecord) -> Html:
    blocks = [block for block in (_command(run), _config(run)) if block]
    return fold(run.folder.name, *blocks) if blocks else Html("")


def _environment(run: RunRecord) -> dict[str, str]:
    return flatten({key: value for key, value in run.environment.items() if key != "command"})


def _environments(runs: Sequence[RunRecord]) -> Iterable[Html]:
    """Show the environment once if it is the same for all runs, else what differs as well."""
    every = [_environment(run) for run in runs]
    changing = _changing(every)
    if changing:
        yield tag("p", "The runs did not all have the same environment:", class_="note")
        yield _by_group(runs, every, changing)
    yield definitions({key: value for key, value in every[0].items() if key not in changing})


def _footer() -> Html:
    return tag("footer", "Written by scpl. This file holds everything it shows and opens offline.")
