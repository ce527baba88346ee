"""A comparison as JSON values: one result per method, every measured number with its spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scpl.report.groups import Group, Sample, group_runs, paired_ratio
from scpl.report.target import SECONDS_TO_TARGET

__all__ = ["comparison_results"]

_SETTINGS = ("method", "data", "model", "stages", "processes", "epochs", "micro_batches")
_NOT_MEASURED = frozenset({*_SETTINGS, "seed"})


def comparison_results(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put runs that differ only in their seed together, one result per method.

    Args:
        summaries: What the ``summary.json`` of each run holds.

    Returns:
        Per method the settings of its runs; every measured key of the summaries as ``{"mean",
        "sd", "median", "min", "max", "n"}`` over the seeds (a list of these where a summary has a
        list, per process or stage); ``ratio_to``, the same of samples/s against every other
        method, paired by seed; the notes; and the summaries themselves under ``runs``.
    """
    groups = group_runs(summaries)
    return [_result(group, groups) for group in groups]


def _result(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    first = group.summaries[0]
    keys = dict.fromkeys(key for summary in group.summaries for key in summary)
    measured = {
        key: found
        for key in keys
        if key not in _NOT_MEASURED and (found := _spread(group.summaries, key)) is not None
    }
    return {
        "label": group.label,
        **{key: first[key] for key in _SETTINGS if key in first},
        "seeds": [summary.get("seed") for summary in group.summaries],
        **measured,
        "ratio_to": {
            rival.label: ratio.statistics()
            for rival in groups
            if rival is not group and len(ratio := paired_ratio(group, [rival]))
        },
        "notes": group.notes(),
        "runs": [dict(summary) for summary in group.summaries],
    }


def _spread(summaries: Sequence[Mapping[str, Any]], key: str) -> Any:
    """Give the statistics of one key; None if it holds no numbers."""
    values = [summary[key] for summary in summaries if summary.get(key) is not None]
    if not values and key == SECONDS_TO_TARGET:
        return Sample.of([]).statistics()  # nobody got there, which is a result
    if values and all(map(_is_number, values)):
        return Sample.of(values).statistics()
    if values and all(isinstance(value, list) and value for value in values):
        same_length = len({len(value) for value in values}) == 1
        if same_length and all(_is_number(item) for value in values for item in value):
            return [Sample.of(place).statistics() for place in zip(*values, strict=True)]
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
