"""Numbers to predict, one or several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional

from scpl.errors import DataError, InputError
from scpl.measures import spearman
from scpl.tasks.base import NUM_BINS, WORST, Task
from scpl.tasks.counting import add_worst, constant, in_float32, only_one, precise

__all__ = ["Regression"]

# Shape suffixes: N = samples, C = outputs of the network.

_NUM_POINTS = 1000
"""So many samples, evenly spread, stand for all in a picture of numbers."""


@final
@dataclass(frozen=True)
class Regression(Task):
    """One or several numbers per sample; a target is ``[N, C]`` (or ``[N]`` for one), of any type.

    The network learns numbers of mean 0 and deviation 1 over the training samples; its loss is the
    squared error of these. The contrastive loss takes two samples as positives as far as they are
    near: with weight exp(-d^2 / 2 s^2), where d^2 is the mean over the numbers of their squared
    distance.

    Args:
        mean: Of each number over the training samples; none for 0.
        std: Their deviations; none for 1.
        nearness: s, in deviations.
    """

    kind: ClassVar[str] = "regression"
    loss_name: ClassVar[str] = "squared_error"
    metrics: ClassVar[tuple[str, ...]] = ("r2", "mean_absolute_error", "spearman")
    keeps: ClassVar[bool] = True
    exits_early: ClassVar[bool] = False
    noun: ClassVar[str] = "number"
    plural: ClassVar[str] = "numbers"

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    nearness: float = 0.5

    def __post_init__(self) -> None:
        if not all(0 < each < math.inf for each in (*self.std, self.nearness)):
            raise InputError(
                "`std` and `nearness` must be more than 0", f"Got {self.std} and {self.nearness}"
            )

    def check_target(self, target: Tensor, rows: int, num_outputs: int, place: str) -> None:  # noqa: D102
        if num_outputs == 1 and target.ndim == 1:
            target = target[:, None]
        super().check_target(target, rows, num_outputs, place)

    def prepare(self, target: Tensor) -> Tensor:
        """Standardise, in float64: numbers may be large and differ by little."""
        values = (target if target.ndim == 2 else target[:, None]).double()
        if self.mean:
            values = values - constant(self.mean, values)
        if self.std:
            values = values / constant(self.std, values)
        return values.float()

    def values(self, outputs: Tensor) -> Tensor:
        """Turn outputs of the network into numbers as targets are, ``float64 [N, C]``."""
        values = self.scaled(outputs)
        return values + constant(self.mean, values) if self.mean else values

    def scaled(self, differences: Tensor) -> Tensor:
        """Turn differences of outputs into those of numbers, ``float64 [N, C]``."""
        values = differences.double()
        return values * constant(self.std, values) if self.std else values

    def check_values(self, low: float, high: float, num_outputs: int, place: str) -> None:  # noqa: D102
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(
                "Targets must be finite numbers",
                f"Got one that is not in {place}",
                "Leave out samples without a number",
            )

    def as_vector(self, target: Tensor, num_outputs: int) -> Tensor:  # noqa: D102
        return target

    def draw(self, count: int, num_outputs: int, draws: torch.Generator) -> Tensor:  # noqa: D102
        return self.values(torch.randn(count, num_outputs, generator=draws))

    @classmethod
    def strata(cls, targets: Tensor) -> Tensor:
        """Sort samples by their first number into parts of equal size."""
        first = targets if targets.ndim == 1 else targets[:, 0]
        places = torch.argsort(torch.argsort(first, stable=True), stable=True)
        return places * NUM_BINS // len(first)

    @classmethod
    def fitted(
        cls,
        targets: Tensor,
        num_outputs: int,
        *,
        balanced: bool = False,
        label_smoothing: float = 0.0,
    ) -> Regression:
        """See `Task.fitted`; takes mean and deviation."""
        if balanced or label_smoothing:
            raise InputError(
                "What is balanced or smoothed must be classes or labels",
                "Got numbers (regression)",
                "Leave it out",
            )
        std, mean = torch.std_mean(targets.double().view(len(targets), -1), dim=0, correction=0)
        constant = (~(std > 0)).nonzero().flatten().tolist()
        if constant:
            raise DataError(
                "Numbers to learn must vary over the training samples",
                f"Got {float(mean[constant[0]]):g} for all, in target number {constant[0]}",
            )
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        with in_float32(outputs):
            values = precise(outputs)
            return functional.mse_loss(values, target.to(values.dtype))

    def pairs(self, target: Tensor) -> Tensor:  # noqa: D102
        squares_NN = (target[:, None] - target).square().mean(2)
        return (squares_NN / (-2 * self.nearness**2)).exp()

    @torch.no_grad()
    def observe(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Observe ``r2``: 1 minus the squared error as a share of the targets' variance.

        That is the variance over all training samples, 1: over a mini-batch it may be next to none.
        """
        return {"r2": 1 - (outputs.float() - target).square().mean()}

    def learns(self, observed: Mapping[str, float], num_outputs: int) -> bool | None:  # noqa: D102
        found = observed.get("r2")
        return None if found is None else found > 0.01

    def tally(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: D102
        wanted = target.double()
        wrong = outputs.double() - wanted
        return {
            "loss": wrong.square().mean(1).sum(),
            "count": torch.full((), len(target), device=outputs.device),
            "squares": wrong.square().sum(0),
            "distances": wrong.abs().sum(0),
            "sum": wanted.sum(0),
            "sum_of_squares": wanted.square().sum(0),
            "outputs": outputs,
            "targets": target,
        }

    def measure(self, tally: Mapping[str, Tensor]) -> dict[str, float]:
        """Turn sums into metrics, each the mean over the numbers; distances in their own units."""
        each = self._measured(tally)
        found = {
            name: sum(measured[name] for measured in each) / len(each)
            for name in ("r2", "mean_absolute_error")
        }
        if "outputs" in tally:
            pairs = zip(tally["outputs"].T, tally["targets"].T, strict=True)
            ranks = [spearman(one, other) for one, other in pairs]
            found["spearman"] = sum(ranks) / len(ranks)
        return found

    def add_details(
        self, details: dict[str, Tensor], outputs: Tensor, target: Tensor, first: int
    ) -> None:
        """Keep the predictions that are farthest off, in deviations."""
        wrong = (outputs - target).abs()
        add_worst(details, wrong, first, self.values(target), self.values(outputs))

    def details(self, tally: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        """See `Task.details`; all numbers are in their own units."""
        found = {
            "table": [
                {self.noun: name, "samples": int(tally["count"]), **measured}
                for name, measured in zip(names, self._measured(tally), strict=True)
            ],
            "mistakes": [
                {"sample": int(place), "number": names[int(number)], "true": true,
                 "predicted": predicted, "error": predicted - true}
                for _, place, number, true, predicted in tally[WORST].tolist()
            ],
        }  # fmt: skip
        if "outputs" in tally:
            every = slice(None, None, -(-len(tally["outputs"]) // _NUM_POINTS))
            pairs = (self.values(tally[name][every]).T.tolist() for name in ("targets", "outputs"))
            found["points"] = [
                {self.noun: name, "true": true, "predicted": predicted}
                for name, true, predicted in zip(names, *pairs, strict=True)
            ]
        return found

    def _measured(self, tally: Mapping[str, Tensor]) -> list[dict[str, float]]:
        """Measure each number by itself, distances in its own units."""
        count, left = tally["count"], tally["squares"]
        spread = tally["sum_of_squares"] - tally["sum"].square() / count
        # As others define it where all targets are equal.
        equal = torch.where(left > 0, 0.0, 1.0).double()
        columns = {
            "r2": torch.where(spread > 0, 1 - left / spread.masked_fill(spread <= 0, 1), equal),
            "mean_absolute_error": self.scaled(tally["distances"] / count),
            "root_mean_squared_error": self.scaled((left / count).sqrt()),
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def columns(self, names: Sequence[str], top: int) -> list[str]:  # noqa: D102
        only_one(top, "predicts numbers")
        return list(names)

    def written(self, outputs: Tensor, names: Sequence[str], top: int) -> Iterator[dict[str, Any]]:
        """Write each number in the units of the targets, with six digits."""
        for row in self.values(outputs).tolist():
            yield {n: float(f"{value:.6g}") for n, value in zip(names, row, strict=True)}
