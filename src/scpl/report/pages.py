"""The pages: what stands on them is put together here, how it looks is in the templates.

Everything the templates are given is escaped, so a name that a user chose can not become markup;
only the pictures are markup already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scpl.outside import parse_toml
from scpl.report.comparison import Comparison
from scpl.report.formats import DASH, count, duration, memory, percent, short, text, traffic
from scpl.report.groups import Group
from scpl.report.panels import Panel, can_draw, panel_svg
from scpl.report.run_plots import observation_words
from scpl.report.tested import NUMBERED, Table, confusion_table, mistake_rows, output_table
from scpl.runs import RunRecord
from scpl.runs.columns import (
    EPOCH,
    LEARNING_RATE,
    OBSERVED,
    SAMPLES_PER_SECOND,
    SECONDS,
    TRAIN,
    VALID_LOSS,
)
from scpl.runs.metrics import METRICS, metric_of

__all__ = ["comparison_page", "flatten", "run_page"]


def run_page(run: RunRecord, panels: Sequence[Panel], tested_panels: Sequence[Panel] = ()) -> str:
    """Write the page of one run, with its pictures: of training, and of the test."""
    tested = run.tested
    # Of few classes the picture has all numbers.
    listed = len(tested.table) > NUMBERED or not can_draw()
    return _render(
        "run.html",
        panels,
        title=f"{text(run.summary.get('method'))} on {text(run.summary.get('data'))}",
        lead=_description(run),
        run=run,
        tiles=_tiles(run),
        tested_panels=tested_panels,
        outputs=output_table(tested),
        num_outputs=len(tested.table),
        noun=tested.noun,
        confusions=confusion_table(tested) if listed else ((), ()),
        mistakes=mistake_rows(tested),
        stages=_stage_table(run),
        processes=_process_table(run),
        epochs=_epoch_table(run),
        environment=_environment(run),
    )


def comparison_page(comparison: Comparison, panels: Sequence[Panel]) -> str:
    """Write the page of a comparison, with its pictures."""
    runs, groups = comparison.runs, comparison.groups
    settings = [_parsed(run.config) for run in runs]
    environments = [_environment(run) for run in runs]
    different = _different(environments)
    results = comparison.table()
    return _render(
        "comparison.html",
        panels,
        title=comparison.title,
        lead=_overview(runs),
        comparison=comparison,
        results=results,
        missing=[(absent.run, absent.words) for absent in results.absent],
        notes={g.label: " ".join(map(_sentence, g.notes())) for g in groups if g.notes()},
        every_run=_run_table(runs),
        groups=("", *(group.label for group in groups)),
        num_settings=len({key for setting in settings for key in setting}),
        different_settings=_by_group(groups, settings, _different(settings)),
        different_environments=_by_group(groups, environments, different),
        same_environment={k: v for k, v in environments[0].items() if k not in different},
    )


def _render(template: str, panels: Sequence[Panel], **content: Any) -> str:
    # Here, for jinja2 takes a while to import and most commands write no page.
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader(__package__ or "scpl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = lambda panel: Markup(panel_svg(panel))
    page = environment.get_template(template)
    return page.render(panels=panels, can_draw=can_draw(), **content)


# One run


def _description(run: RunRecord) -> str:
    words = [text(run.summary.get("model"))]
    for many, one in (("stages", "stage"), ("processes", "process"), ("epochs", "epoch")):
        number = run.number(many)
        if math.isfinite(number):
            words.append(f"{number:.0f} {one if number == 1 else many}")
    words += [f"seed {text(run.summary.get('seed'))}", f"folder {run.folder.name}"]
    return " · ".join(words)


def _tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """Choose the numbers that stand on top: name, value, and what it must be read with."""
    peaks = list(filter(math.isfinite, run.numbers("peak_memory_bytes")))
    waits = list(filter(math.isfinite, run.numbers("wait_share")))
    sent = run.numbers("bytes_per_step")
    wall = duration(run.number("wall_seconds"))
    metric = run.metric
    score = run.number(f"test_{metric.name}")
    words = ""
    interval = run.numbers(f"test_{metric.name}_interval")
    if len(interval) == 2:
        low, high = (metric.write(bound, 1) for bound in interval)
        words = f"95 %: {low.removesuffix(' %')} to {high}; "
    others = [
        (f"Test {other.title}", other.write(run.number(f"test_{other.name}")), f"in {wall}")
        for other in METRICS.values()
        if other is not metric
    ]
    valid = metric.write(run.number(run.valid_column))
    tiles = [
        (f"Test {metric.title}", metric.write(score), f"{words}in {wall}"),
        *others,
        (f"Validation {metric.title}", valid, f"in {wall}"),
        ("Wall-clock time", wall, f"{metric.write(score, 1)} test {metric.title}"),
        ("Throughput", count(run.number("samples_per_second")), "samples per second"),
        (
            "Peak memory",
            memory(max(peaks, default=math.nan)),
            f"largest process; {memory(math.fsum(peaks))} in all" if peaks[1:] else "one process",
        ),
    ]
    epoch, trained = run.number("weights_epoch"), run.number("trained_epochs")
    if "best_by" in run.summary and math.isfinite(epoch):
        stopped = trained < run.number("epochs")
        title = metric_of(run.summary["best_by"]).title
        told = f"the best of {trained:.0f} by {title}; {'' if stopped else 'not '}stopped early"
        tiles.append(("Weights of epoch", f"{epoch:.0f}", told))
    if waits:
        most = f"mean; most {percent(max(waits))}" if waits[1:] else "of the time"
        tiles.append(("Waiting", percent(math.fsum(waits) / len(waits)), most))
    if sent[1:]:
        tiles.append(("Traffic", traffic(math.fsum(sent)), "sent per training step, all processes"))
    return [tile for tile in tiles if tile[1] != DASH]


def _stage_table(run: RunRecord) -> Table:
    waits = run.numbers("wait_share")
    losses, observed = run.stage_columns(TRAIN), run.stage_columns(OBSERVED)
    scores, metric = run.score_columns(), run.metric

    def last(by_stage: Mapping[int, str], stage: int) -> float:
        return run.column(by_stage[stage])[-1] if stage in by_stage else math.nan

    header = ["stage", *(f"train {term.replace('_', ' ')}" for term in losses)]
    header += [f"validation {metric.title} of its read-out"] if scores else []
    header += [*map(observation_words, observed), *(["time waited"] if waits else [])]
    if len(header) == 1:
        return header, []
    rows = []
    for stage in range(run.num_stages):
        row = [str(stage), *(short(last(by_stage, stage)) for by_stage in losses.values())]
        row += [metric.write(last(scores, stage))] if scores else []
        row += [short(last(by_stage, stage)) for by_stage in observed.values()]
        row += [percent(waits[stage]) if stage < len(waits) else DASH] if waits else []
        rows.append(row)
    return header, rows


def _process_table(run: RunRecord) -> Table:
    """Show what each process held and sent; one process alone is told by the tiles."""
    columns = [
        ("peak memory", run.numbers("peak_memory_bytes"), memory),
        ("sent per training step", run.numbers("bytes_per_step"), traffic),
    ]
    num_processes = max(len(values) for _, values, _ in columns)
    shown = [column for column in columns if column[1]]
    rows = [
        [str(rank), *(write(v[rank]) if rank < len(v) else DASH for _, v, write in shown)]
        for rank in range(num_processes)
    ]
    return ["process", *(name for name, _, _ in shown)], rows if num_processes > 1 else []


def _epoch_table(run: RunRecord) -> Table:
    columns = {
        "epoch": (EPOCH, short),
        f"validation {run.metric.title}": (run.valid_column, run.metric.write),
        "wall clock": (SECONDS, duration),
        "samples/s": (SAMPLES_PER_SECOND, count),
        "validation loss": (VALID_LOSS, short),
        "learning rate": (LEARNING_RATE, short),
    }
    cells = [list(map(write, run.column(name))) for name, write in columns.values()]
    return list(columns), list(zip(*cells, strict=True))


def _environment(run: RunRecord) -> dict[str, str]:
    """List versions and hardware; what only scpl knows a run by says nothing to readers."""
    left_out = ("command", "run", "launchers")
    return flatten({key: value for key, value in run.environment.items() if key not in left_out})


# Several runs


def _overview(runs: Sequence[RunRecord]) -> str:
    words = [f"{len(runs)} run{'s' * (len(runs) != 1)}"]
    for key, name in (("data", ""), ("model", ""), ("epochs", "epochs "), ("seed", "seeds ")):
        values = dict.fromkeys(text(run.summary.get(key)) for run in runs)
        words.append(f"{name}{', '.join(values)}")
    return " · ".join(words)


def _sentence(note: str) -> str:
    return note if note.endswith((".", "!", "?")) else f"{note}."


def _run_table(runs: Sequence[RunRecord]) -> Table:
    metric = runs[0].metric
    columns: dict[str, Callable[[RunRecord], str]] = {
        "run": lambda run: run.folder.name,
        "method": lambda run: text(run.summary.get("method")),
        "seed": lambda run: text(run.summary.get("seed")),
        f"test {metric.title}": lambda run: metric.write(run.number(f"test_{metric.name}")),
        f"validation {metric.title}": lambda run: metric.write(run.number(run.valid_column)),
        "wall clock": lambda run: duration(run.number("wall_seconds")),
        "samples/s": lambda run: count(run.number("samples_per_second")),
        "peak memory": lambda run: memory(max(run.numbers("peak_memory_bytes"), default=math.nan)),
    }
    return list(columns), [[cell(run) for cell in columns.values()] for run in runs]


def _different(trees: Sequence[Mapping[str, str]]) -> list[str]:
    """List the keys that are not the same in all runs."""
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return [key for key in keys if len({tree.get(key) for tree in trees}) > 1]


def _by_group(
    groups: Sequence[Group], trees: Sequence[Mapping[str, str]], keys: Sequence[str]
) -> list[list[str]]:
    """Make a row per key, with a cell per group that lists the values of its runs."""
    rows = []
    for key in keys:
        cells = (dict.fromkeys(trees[i].get(key, DASH) for i in g.members) for g in groups)
        rows.append([key, *(", ".join(values) for values in cells)])
    return rows


def _parsed(config: str) -> dict[str, str]:
    try:
        return flatten(parse_toml(config))
    except ValueError:
        return {}


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Turn nested mappings into one, with dotted names.

    Example:
        >>> flatten({"versions": {"torch": "2.6"}, "cpus": [0, 1]})
        {'versions.torch': '2.6', 'cpus': '0, 1'}
    """
    flat: dict[str, str] = {}
    for key, value in tree.items():
        is_list = isinstance(value, list | tuple)
        if is_list and any(isinstance(v, Mapping) for v in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif is_list:
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) or DASH
        else:
            flat[f"{prefix}{key}"] = text(value)
    return flat
