"""The columns of ``metrics.csv``, one row per epoch: their names for who writes and who reads.

What is known of every stage has columns ``<group>_<quantity>_stage<k>``: ``train_loss_stage0``,
``observed_above_chance_stage1``, ``valid_accuracy_stage2``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

__all__ = [
    "EPOCH",
    "LEARNING_RATE",
    "LOSS",
    "OBSERVED",
    "SAMPLES_PER_SECOND",
    "SECONDS",
    "STEP",
    "TRAIN",
    "VALID",
    "VALID_ACCURACY",
    "VALID_LOSS",
    "Validation",
    "epoch_row",
    "mean_values",
    "stage_accuracies",
    "stage_column",
    "stage_columns",
]

EPOCH = "epoch"
STEP = "step"
SECONDS = "seconds"
SAMPLES_PER_SECOND = "samples_per_second"
LEARNING_RATE = "lr"
VALID_LOSS = "valid_loss"
VALID_ACCURACY = "valid_accuracy"

TRAIN, OBSERVED, VALID = "train", "observed", "valid"
LOSS, ACCURACY = "loss", "accuracy"


class Validation(Protocol):
    """What a validation found: of the whole network, and of each stage that predicts."""

    @property
    def loss(self) -> float:
        """Mean loss."""

    @property
    def accuracy(self) -> float:
        """Accuracy of the whole network, 0 .. 1."""

    @property
    def stage_accuracy(self) -> Sequence[float | None]:
        """Accuracy of each stage alone, 0 .. 1; None of a stage that does not predict."""


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
    pattern = re.compile(rf"{group}_(?P<quantity>.+)_stage(?P<stage>\d+)")
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            found.setdefault(match["quantity"], {})[int(match["stage"])] = name
    return found


def stage_accuracies(row: Mapping[str, Any], num_stages: int) -> list[Any]:
    """Give the cells of a row that hold the validation accuracy of each stage; None for none."""
    return [row.get(stage_column(VALID, ACCURACY, stage)) for stage in range(num_stages)]


def epoch_row(
    *,
    losses: Sequence[Mapping[str, float]],
    observed: Sequence[Mapping[str, float]],
    validation: Validation | None,
    **numbers: float,
) -> dict[str, Any]:
    """Make the row of an epoch.

    Args:
        losses: The terms of each stage's loss, means over the epoch.
        observed: What each stage's objective noticed besides, means over the epoch.
        validation: Its validation; None leaves cells empty.
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
        return row | {VALID_LOSS: "", VALID_ACCURACY: ""}
    row |= {VALID_LOSS: validation.loss, VALID_ACCURACY: validation.accuracy}
    for stage, accuracy in enumerate(validation.stage_accuracy):
        row[stage_column(VALID, ACCURACY, stage)] = "" if accuracy is None else accuracy
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
