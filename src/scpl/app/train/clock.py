"""Wall-clock of a run, over interruptions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

__all__ = ["Clock"]


class Clock:
    """Counts seconds since training began, seconds of training, and seconds of this epoch.

    Args:
        note: What an interrupted run had counted.
    """

    def __init__(self, note: Mapping[str, Any] | None = None) -> None:
        before = note or {}
        self._offset = float(before.get("seconds", 0.0))
        self._train = float(before.get("train_seconds", 0.0))
        self._epoch = float(before.get("epoch_seconds", 0.0))
        self._started = self._epoch_started = time.perf_counter()

    def now(self) -> float:
        """Seconds since training began, validation included."""
        return self._offset + time.perf_counter() - self._started

    def begin_epoch(self) -> None:
        """An epoch begins or goes on."""
        self._epoch_started = time.perf_counter()

    def epoch_seconds(self) -> float:
        """Seconds of this epoch's training so far."""
        return self._epoch + time.perf_counter() - self._epoch_started

    def end_epoch(self) -> float:
        """Close the epoch; returns its seconds."""
        seconds = self.epoch_seconds()
        self._train += seconds
        self._epoch = 0.0
        return seconds

    def train_seconds(self) -> float:
        """Seconds of training in finished epochs, without validation."""
        return self._train

    def note(self, *, in_epoch: bool) -> dict[str, float]:
        """What to remember in a checkpoint."""
        return {
            "seconds": self.now(),
            "train_seconds": self._train,
            "epoch_seconds": self.epoch_seconds() if in_epoch else 0.0,
        }
