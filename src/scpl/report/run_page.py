"""The page of one run."""

from __future__ import annotations

import math

from scpl.report.formats import DASH, count, duration, memory, percent, traffic
from scpl.report.html import Html, definitions, fold, page, section, table, tag
from scpl.report.observations import observation_words
from scpl.report.plots import run_panels
from scpl.report.reading import RunRecord, as_numbers
from scpl.report.sections import command, config, environment, figures, footer

__all__ = ["run_page"]


def run_page(run: RunRecord) -> str:
    """Write the page of one run."""
    title = f"{run.text('method')} on {run.text('data')}"
    return page(
        f"{title} - scpl report",
        tag("h1", title),
        tag("p", _description(run), class_="lead"),
        "" if run.finished else tag("p", "This run has not finished; it holds no summary yet."),
        _tiles(run),
        section("Curves", figures(run_panels(run))),
        section("Stages", _stage_table(run)),
        section("Processes", _process_table(run)),
        section("Epochs", _epoch_table(run)),
        section("Configuration", config(run)),
        section("Command", command(run)),
        section("Versions and hardware", definitions(environment(run))),
        footer(),
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
    sent = as_numbers(run.summary.get("bytes_per_step"))
    if sent[1:]:
        tiles.append(("Traffic", traffic(math.fsum(sent)), "sent per training step, all processes"))
    known = [tile for tile in tiles if tile[1] != DASH]
    blocks = (
        tag("div", tag("dt", name), tag("dd", value), tag("dd", note), class_="tile")
        for name, value, note in known
    )
    return tag("dl", *blocks, class_="tiles") if known else Html("")


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


def _process_table(run: RunRecord) -> Html:
    """Show what each process held and sent; one process alone is told by the tiles."""
    peaks = as_numbers(run.summary.get("peak_memory_bytes"))
    sent = as_numbers(run.summary.get("bytes_per_step"))
    if len(peaks) < 2 and len(sent) < 2:
        return Html("")
    columns = [("peak memory", peaks, memory), ("sent per training step", sent, traffic)]
    shown = [(name, values, write) for name, values, write in columns if values]
    rows = [
        [str(rank), *(write(v[rank]) if rank < len(v) else DASH for _, v, write in shown)]
        for rank in range(max(len(values) for _, values, _ in shown))
    ]
    return table(["process", *(name for name, _, _ in shown)], rows)


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
