"""Time to a target accuracy: when a run was first as good as asked.

Accuracy is known at the end of each epoch, where the validation images were classified. Between
two such moments it is taken to move along a straight line; before the first of them nothing is
known, so a run that is good enough there counts as having needed all of its first epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from scpl.report.formats import percent
from scpl.report.groups import BASELINE
from scpl.report.reading import RunRecord

__all__ = ["SECONDS_TO_TARGET", "Target", "choose_target", "seconds_to", "with_target"]

SECONDS_TO_TARGET = "seconds_to_target"
SHARE = 0.99  # of the accuracy that every seed of the baseline reaches


@dataclass(frozen=True)
class Target:
    """A validation accuracy to reach.

    Attributes:
        accuracy: Share of images classified right, 0 .. 1.
        origin: Where the number comes from, in words.
    """

    accuracy: float
    origin: str

    @property
    def words(self) -> str:
        """The accuracy as people read it."""
        digits = 2 if round(self.accuracy * 1000) != self.accuracy * 1000 else 1
        return percent(self.accuracy, digits)


def choose_target(runs: Sequence[RunRecord], wanted: float | None = None) -> Target | None:
    """Take the accuracy that was asked for, or one that plain backpropagation surely reaches.

    Args:
        runs: All runs of a comparison.
        wanted: The accuracy that was asked for.

    Returns:
        The target; None if no run was validated.
    """
    last = [(run.summary.get("method"), _curve(run)[-1][1]) for run in runs if _curve(run)]
    if not last:
        return None
    if wanted is not None:
        return Target(wanted, "as asked for")
    rivals = [accuracy for method, accuracy in last if method == BASELINE]
    whose = BASELINE if rivals else "any method"
    lowest = min(rivals or [accuracy for _, accuracy in last])
    accuracy = math.floor(1e4 * SHARE * lowest) / 1e4
    return Target(
        accuracy,
        f"{percent(SHARE, 0)} of the lowest validation accuracy that a run of {whose} ended with",
    )


def with_target(runs: Sequence[RunRecord], target: Target | None) -> list[RunRecord]:
    """Add to each summary how many seconds the run needed, None if it never got there."""
    if target is None:
        return list(runs)
    return [
        replace(
            run,
            summary={**run.summary, SECONDS_TO_TARGET: seconds_to(run, target.accuracy)},
        )
        for run in runs
    ]


def seconds_to(run: RunRecord, accuracy: float) -> float | None:
    """Find when a run's validation accuracy first reached ``accuracy``.

    Returns:
        Wall-clock seconds since training began, validation included; None if it never did.
    """
    curve = _curve(run)
    if curve and curve[0][1] >= accuracy:
        return curve[0][0]
    for (begin, low), (end, high) in pairwise(curve):
        if low < accuracy <= high:
            return begin + (end - begin) * (accuracy - low) / (high - low)
    return None


def _curve(run: RunRecord) -> list[tuple[float, float]]:
    """Seconds and validation accuracy at the end of each epoch."""
    rows = zip(run.column("seconds"), run.column("valid_accuracy"), strict=True)
    return [(x, y) for x, y in rows if math.isfinite(x + y)]
