"""Which epoch was the best by its validation, and when training ends because none gets better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scpl.app.config import MAIN, TrainConfig
from scpl.app.inputs.base import DataSummary
from scpl.engine.checkpoint import BEST_STEP
from scpl.errors import InputError
from scpl.runs.metrics import WATCHED, Metric

__all__ = ["Best", "Watch", "watch_of"]


@dataclass(frozen=True)
class Best:
    """The best epoch so far.

    Attributes:
        epoch: It, counted from 1.
        step: Training steps done at its end, where its checkpoint is.
        value: What its validation found.
    """

    epoch: int
    step: int
    value: float


class Watch:
    """Follows one metric of the validation from epoch to epoch, the same on every rank.

    All that it knows goes into every checkpoint, so a resumed run decides as an undisturbed one.

    Args:
        metric: What is watched.
        patience: Epochs without a better value after which training ends; None: it goes on.
    """

    def __init__(self, metric: Metric, patience: int | None = None) -> None:
        self.metric, self.patience = metric, patience
        self.best: Best | None = None

    def restore(self, note: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint says of itself."""
        if BEST_STEP in note:
            self.best = Best(note["best_epoch"], note[BEST_STEP], note["best_value"])

    def note(self) -> dict[str, float]:
        """What to remember in a checkpoint, which thereby keeps that of the best epoch."""
        best = self.best
        if best is None:
            return {}
        return {"best_epoch": best.epoch, BEST_STEP: best.step, "best_value": best.value}

    def see(self, epoch: Best) -> bool:
        """Take the next epoch; returns whether it is the best so far. NaN never is."""
        if math.isnan(epoch.value):
            return False
        if self.best is None or self.metric.is_better(epoch.value, self.best.value):
            self.best = epoch
        return self.best is epoch

    def is_over(self, epoch: int) -> bool:
        """Whether no epoch has been better for too long, when so many are finished."""
        since = self.best.epoch if self.best else 0
        return self.patience is not None and epoch - since >= self.patience


def watch_of(config: TrainConfig, data: DataSummary) -> Watch | None:
    """Say what a run watches, if anything.

    Raises:
        InputError: if there is nothing to validate on, or that metric is not measured.
    """
    wanted, patience = config.optimizer.keep_best, config.optimizer.patience
    if wanted is None and patience is None:
        return None
    flags = "--patience" if wanted is None else "--keep-best"
    if not data.valid_samples:
        raise InputError(
            f"{flags} compares epochs by their validation, which needs samples held out",
            f"Got none of {data.train_samples:,} {data.noun}: --validation "
            f"{config.data.validation:g}",
            "Raise --validation, or leave it out",
        )
    measured = data.task.metrics
    name = measured[0] if wanted in (None, MAIN) else wanted
    if name not in (*measured, "loss"):
        raise InputError(
            f"--keep-best must name what is measured of {data.task.plural}: "
            f"{', '.join((*measured, 'loss'))}",
            f"Got {name}",
            "Choose one of these, or leave the name out for the first",
        )
    return Watch(WATCHED[name], patience)
