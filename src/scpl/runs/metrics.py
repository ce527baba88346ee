"""The metrics that runs are judged by: how each is called and written for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["METRICS", "WATCHED", "Metric", "metric_of"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: In files: ``test_<name>``, ``valid_<name>``.
        title: For people.
        is_share: Whether it is a share of one, which people read in percent.
        falls: Whether smaller is better.
    """

    name: str
    title: str
    is_share: bool = True
    falls: bool = False

    def is_better(self, value: float, other: float) -> bool:
        """Whether a value is better than another one."""
        return value < other if self.falls else value > other

    @property
    def unit(self) -> str:
        """What follows the title on an axis."""
        return " (%)" if self.is_share else ""

    @property
    def scale(self) -> float:
        """What values are multiplied by to be read with the unit."""
        return 100.0 if self.is_share else 1.0

    def write(
        self, value: float, digits: int = 2, bounds: tuple[float, float] | None = None
    ) -> str:
        """Write a value: ``91.20 %``, or ``0.912`` with one digit more than asked for.

        With the bounds it probably has: ``91.20 % (95 %: 90.11 to 92.18 %)``.
        """
        if bounds is not None:
            low, high = (self.write(bound, digits) for bound in bounds)
            unit = " %" * self.is_share
            return f"{self.write(value, digits)} (95 %: {low.removesuffix(unit)} to {high})"
        if not math.isfinite(value):
            return "\N{EN DASH}"
        if self.is_share:
            return f"{100 * value:.{digits}f} %"
        return f"{value:.{digits + 1}f}" if abs(value) < 1000 else f"{value:.4g}"


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy"),
        Metric("macro_f1", "macro F1"),
        Metric("micro_f1", "micro F1"),
        Metric("mean_average_precision", "mean average precision"),
        Metric("exact_match", "exact match"),
        Metric("r2", "R\N{SUPERSCRIPT TWO}", is_share=False),
        Metric("mean_absolute_error", "mean absolute error", is_share=False, falls=True),
        Metric("precision", "precision"),
        Metric("recall", "recall"),
        Metric("f1", "F1"),
        Metric("root_mean_squared_error", "root mean squared error", is_share=False, falls=True),
        Metric("spearman", "Spearman's rank correlation", is_share=False),
    )
}
"""Every metric by its name."""

WATCHED: Mapping[str, Metric] = {
    **METRICS,
    "loss": Metric("loss", "loss", is_share=False, falls=True),
}
"""All by which epochs can be compared."""


def metric_of(name: object) -> Metric:
    """Find a metric; one of another version is written as a plain number."""
    words = str(name)
    return METRICS.get(words) or Metric(words, words.replace("_", " "), is_share=False)
