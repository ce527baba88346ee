"""The columns of ``metrics.csv``, one row per epoch: their names for who writes and who reads.

At the end those of ``test.csv`` and of the mistakes in ``test.json`` that readers know by name.

What is known of every stage has columns ``<group>_<quantity>_stage<k>``: ``train_loss_stage0``,
``observed_above_chance_stage1``, ``valid_accuracy_stage2``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

__all__ = [
    "EPOCH",
    "F1",
    "LEARNING_RATE",
    "LOSS",
    "OBSERVED",
    "PICTURE",
    "R2",
    "SAMPLE",
    "SAMPLES_PER_SECOND",
    "SECONDS",
    "STEP",
    "TEXT",
    "TRAIN",
    "VALID",
    "VALID_LOSS",
    "Validation",
    "epoch_row",
    "mean_values",
    "stage_column",
    "stage_columns",
    "stage_scores",
    "valid_column",
]

EPOCH = "epoch"
STEP = "step"
SECONDS = "seconds"
SAMPLES_PER_SECOND = "samples_per_second"
LEARNING_RATE = "lr"
VALID_LOSS = "valid_loss"

F1, R2 = "f1", "r2"
SAMPLE, TEXT, PICTURE = "sample", "text", "picture"

TRAIN, OBSERVED, VALID = "train", "observed", "valid"
LOSS = "loss"


class Validation(Protocol):
    """What a validation found: of the whole network, and of each stage that predicts."""

    @property
    def loss(self) -> float:
        """Mean loss."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics of the whole network by name, the main one first."""

    @property
    def stage_scores(self) -> Sequence[float | None]:
        """The main metric of each stage alone; None of a stage that does not predict."""


def stage_column(group: str, quantity: str, stage: int) -> str:
    """Name the column of a quantity of one stage.

    Example:
        >>> stage_column("train", "loss", 0)
        'train_loss_stage0'
    """
    return f"{group}_{quantity}_stage{stage}"


def stage_columns(names: Iterable[str], group: str) -> dict[str, dict[int, str]]:
    """Find the columns of a group again, by quantity and stage.

    Example:
        >>> stage_columns(["epoch", "train_loss_stage0", "train_loss_stage1"], "train")
        {'loss': {0: 'train_loss_stage0', 1: 'train_loss_stage1'}}
    """
    pattern = re.compile(rf"{group}_(?P<quantity>.+)_stage(?P<stage>[0-9]{{1,9}})")
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            found.setdefault(match["quantity"], {})[int(match["stage"])] = name
    return found


def valid_column(metric: str) -> str:
    """Name the column of a metric of the validation.

    Example:
        >>> valid_column("accuracy")
        'valid_accuracy'
    """
    return f"{VALID}_{metric}"


def stage_scores(row: Mapping[str, Any], metric: str, num_stages: int) -> list[Any]:
    """Give the cells of a row that hold the main metric of each stage; None for none."""
    return [row.get(stage_column(VALID, metric, stage)) for stage in range(num_stages)]


def epoch_row(
    *,
    losses: Sequence[Mapping[str, float]],
    observed: Sequence[Mapping[str, float]],
    validation: Validation | None,
    metrics: Sequence[str],
    **numbers: float,
) -> dict[str, Any]:
    """Make the row of an epoch.

    Args:
        losses: The terms of each stage's loss, means over the epoch.
        observed: What each stage's objective noticed besides, means over the epoch.
        validation: Its validation; None leaves cells empty.
        metrics: What a validation measures, the main metric first.
        **numbers: The first columns: ``epoch`` (from 1), ``step`` (steps since the run began),
            ``seconds`` (since then), ``train_seconds`` (the part of them spent on training),
            ``samples_per_second`` (of the epoch) and ``lr`` (at its end).

    Returns:
        Cells by column. The losses of a stage are summed up; its terms are listed as well where it
        has several.
    """
    row: dict[str, Any] = dict(numbers)
    for stage, terms in enumerate(losses):
        row[stage_column(TRAIN, LOSS, stage)] = sum(terms.values())
    for stage, terms in enumerate(losses):
        if len(terms) > 1:
            row |= {stage_column(TRAIN, term, stage): value for term, value in terms.items()}
    for stage, quantities in enumerate(observed):
        row |= {stage_column(OBSERVED, name, stage): value for name, value in quantities.items()}
    if validation is None:
        return row | {VALID_LOSS: ""} | {valid_column(name): "" for name in metrics}
    row |= {VALID_LOSS: validation.loss}
    row |= {valid_column(name): validation.metrics[name] for name in metrics}
    for stage, score in enumerate(validation.stage_scores):
        row[stage_column(VALID, metrics[0], stage)] = "" if score is None else score
    return row


def mean_values(steps: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, float]]:
    """Take the mean of every loss or observation over the samples of an epoch.

    Args:
        steps: The logged steps of the epoch.
        key: ``"losses"`` or ``"observed"``: a list with a mapping per stage in every step.
    """
    total = sum(step["samples"] for step in steps)
    return [
        {
            name: sum(step[key][stage][name] * step["samples"] for step in steps) / total
            for name in values
        }
        for stage, values in enumerate(steps[0].get(key, ()))
    ]
