"""What a person sees while a network trains: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

__all__ = ["Progress", "format_losses"]

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Prints to stderr, and hands every full line to `log` as well.

    Args:
        epochs: Epochs of the whole run.
        steps: Steps per epoch.
        log: Takes every line.
        quiet: Print nothing (lines still go to `log`).
        noun: What is learnt from, in the plural.
    """

    def __init__(
        self,
        epochs: int,
        steps: int,
        log: Callable[[str], None],
        *,
        quiet: bool,
        noun: str = "images",
    ) -> None:
        self._epochs, self._steps = epochs, steps
        self._log, self._quiet, self._noun = log, quiet, noun
        self._bar: tqdm[Any] | None = None
        self._epoch = 0
        self._valid = ""
        self._first = self._since = self._printed = time.perf_counter()
        self._done_at_start = 0

    def say(self, line: str) -> None:
        """Print a line above whatever is live."""
        self._log(line)
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def begin_epoch(self, epoch: int, batch: int) -> None:
        """Start epoch ``epoch`` (from 1) at mini-batch ``batch``."""
        self._epoch, self._since = epoch, time.perf_counter()
        if epoch == 1 or self._done_at_start == 0:
            self._done_at_start = (epoch - 1) * self._steps + batch
            self._first = self._since
        if not self._quiet and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._steps,
                initial=batch,
                desc=f"epoch {epoch}/{self._epochs}",
                unit="batch",
                leave=False,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def update(self, batch: int, losses: Sequence[Mapping[str, float]]) -> None:
        """Show the state after mini-batch ``batch`` of the epoch."""
        if self._bar is not None:
            self._bar.n = batch
            self._bar.set_postfix_str(f"loss {format_losses(losses)}{self._valid}")
            return
        now = time.perf_counter()
        if now - self._printed >= SECONDS_BETWEEN_LINES and batch < self._steps:
            self.say(
                f"epoch {self._epoch}/{self._epochs}  step {batch}/{self._steps}  "
                f"loss {format_losses(losses)}"
            )
            self._printed = now

    def end_epoch(self, row: Mapping[str, Any], losses: Sequence[Mapping[str, float]]) -> None:
        """Print the line of a finished epoch."""
        self._close_bar()
        now = self._printed = time.perf_counter()
        done = self._epoch * self._steps - self._done_at_start
        left = (self._epochs - self._epoch) * self._steps
        accuracy = row.get("valid_accuracy")
        valid = "" if accuracy in (None, "") else f"  valid {100 * accuracy:5.2f} %"
        self._valid = valid  # stays in sight while the next epoch runs
        self.say(
            f"epoch {self._epoch}/{self._epochs}  loss {format_losses(losses)}{valid}  "
            f"{row['samples_per_second']:,.0f} {self._noun}/s  "
            f"{format_seconds(row['seconds'])} so far, "
            f"{format_seconds((now - self._first) / max(done, 1) * left)} to go"
        )

    def close(self) -> None:
        """Leave the terminal clean."""
        self._close_bar()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def format_losses(losses: Sequence[Mapping[str, float]]) -> str:
    """Write every stage's loss; several terms of one stage are joined by a plus sign."""
    return " | ".join("+".join(f"{value:.3f}" for value in part.values()) for part in losses)


def format_seconds(seconds: float) -> str:
    """Write a duration for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
