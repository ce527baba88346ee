"""Rows of the metrics table: what one epoch comes down to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scpl.scores import Evaluation

__all__ = ["loss_columns", "mean_values", "number", "observed_columns", "valid_columns"]


def mean_values(rows: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, float]]:
    """Mean of every loss or observation over the images of an epoch.

    Args:
        rows: The logged steps of the epoch.
        key: ``"losses"`` or ``"observed"``: a list with a mapping per stage in every row.
    """
    total = sum(row["samples"] for row in rows)
    return [
        {
            name: sum(row[key][stage][name] * row["samples"] for row in rows) / total
            for name in terms
        }
        for stage, terms in enumerate(rows[0].get(key, ()))
    ]


def loss_columns(losses: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Name the losses of all stages; terms are listed where a stage has several."""
    columns = {f"train_loss_stage{k}": sum(terms.values()) for k, terms in enumerate(losses)}
    for stage, terms in enumerate(losses):
        if len(terms) > 1:
            columns.update({f"train_{n}_stage{stage}": value for n, value in terms.items()})
    return columns


def observed_columns(observed: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Name what the objectives noticed beside their losses."""
    return {
        f"observed_{name}_stage{stage}": value
        for stage, part in enumerate(observed)
        for name, value in part.items()
    }


def valid_columns(scores: Evaluation | None) -> dict[str, Any]:
    """Name what a validation found; empty cells where there is nothing."""
    if scores is None:
        return {"valid_loss": "", "valid_accuracy": ""}
    columns: dict[str, Any] = {"valid_loss": scores.loss, "valid_accuracy": scores.accuracy}
    for stage, accuracy in enumerate(scores.stage_accuracy):
        columns[f"valid_accuracy_stage{stage}"] = "" if accuracy is None else accuracy
    return columns


def number(value: Any) -> float | None:
    """Read a cell of the table, which is text after a resume."""
    return None if value in (None, "") else float(value)
