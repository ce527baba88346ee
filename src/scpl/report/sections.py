"""Sections that pages share: pictures, configurations, commands, versions and hardware."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

from scpl.report.formats import DASH
from scpl.report.groups import group_runs
from scpl.report.html import Html, definitions, flatten, fold, join, picture, table, tag
from scpl.report.panels import Panel, can_draw, panel_svg
from scpl.report.reading import RunRecord

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "command",
    "config",
    "differences",
    "environment",
    "environments",
    "figures",
    "footer",
    "recipe",
]

_NO_PLOTS = "The pictures need matplotlib: pip install 'scpl[plots]'. Everything else is here."


def figures(panels: Sequence[Panel]) -> Html:
    """Draw the pictures into the page."""
    if not panels:
        return tag("p", "There is nothing to draw yet.", class_="note")
    if not can_draw():
        return tag("p", _NO_PLOTS, class_="note")
    figures = (picture(panel_svg(p), p.title, p.caption, p.wide) for p in panels)
    return tag("div", *figures, class_="figures")


def config(run: RunRecord) -> Html:
    """Show the resolved configuration, as it can be used again."""
    return tag("pre", run.config.strip()) if run.config.strip() else Html("")


def command(run: RunRecord) -> Html:
    """Show the command that started a run."""
    return tag("pre", run.command, class_="wrap") if run.command else Html("")


def recipe(run: RunRecord) -> Html:
    """Show what it takes to repeat a run; opens on a click."""
    blocks = [block for block in (command(run), config(run)) if block]
    return fold(run.folder.name, *blocks) if blocks else Html("")


def differences(runs: Sequence[RunRecord]) -> Html:
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


def environment(run: RunRecord) -> dict[str, str]:
    """List versions and hardware."""
    return flatten({key: value for key, value in run.environment.items() if key != "command"})


def environments(runs: Sequence[RunRecord]) -> Iterable[Html]:
    """Show the environment once if it is the same for all runs, else what differs as well."""
    every = [environment(run) for run in runs]
    changing = _changing(every)
    if changing:
        yield tag("p", "The runs did not all have the same environment:", class_="note")
        yield _by_group(runs, every, changing)
    yield definitions({key: value for key, value in every[0].items() if key not in changing})


def footer() -> Html:
    """Close the page."""
    return tag("footer", "Written by scpl. This file holds everything it shows and opens offline.")
