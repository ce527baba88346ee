"""One class for each sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional

from scpl.errors import DataError, InputError
from scpl.measures import bins_of, calibration
from scpl.tasks.base import WORST, Task
from scpl.tasks.counting import (
    add,
    add_worst,
    check_smoothing,
    constant,
    in_float32,
    macro_f1,
    precise,
    precision_table,
)

__all__ = ["MOST_CONFUSED", "Classes"]

# Shape suffixes: N = samples, C = outputs of the network.

MOST_CONFUSED = 1000
"""Up to so many classes it is counted which is taken for which: a million counts, 8 MB."""


@final
@dataclass(frozen=True)
class Classes(Task):
    """One class per sample; a target is class indices, an integer type ``[N]``.

    Positives of the contrastive loss are the samples of the same class.

    Args:
        weights: What the loss of a sample of each class is multiplied by; none for 1.
        label_smoothing: Share of the target that the loss spreads over all classes. What is
            measured of predictions, their loss among it, knows neither of the two.
    """

    kind: ClassVar[str] = "classes"
    loss_name: ClassVar[str] = "cross_entropy"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")
    proportions: ClassVar[tuple[str, ...]] = ("accuracy",)
    least_outputs: ClassVar[int] = 2
    noun: ClassVar[str] = "class"
    plural: ClassVar[str] = "classes"

    weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing)

    def check_target(self, target: Tensor, rows: int, num_outputs: int, place: str) -> None:  # noqa: D102
        if target.ndim != 1 or len(target) != rows or target.is_floating_point():
            raise DataError(
                "A target must hold one class index per row",
                f"Got {tuple(target.shape)} {target.dtype} for {rows} rows in {place}",
            )

    def prepare(self, target: Tensor) -> Tensor:  # noqa: D102
        return target.to(torch.int64)

    def check_values(self, low: float, high: float, num_outputs: int, place: str) -> None:  # noqa: D102
        if low < 0 or high >= num_outputs:
            raise DataError(
                f"Targets must lie in 0 .. {num_outputs - 1}",
                f"Got {int(low if low < 0 else high)} in {place}",
                "Check the labels, or the number of classes",
            )

    def mend(self, target: Tensor, num_outputs: int) -> Tensor:  # noqa: D102
        # With classes that do not exist, layers would break the device for the whole process.
        return target.clamp(0, num_outputs - 1)

    def as_vector(self, target: Tensor, num_outputs: int) -> Tensor:  # noqa: D102
        # Unlike `one_hot` this looks at no value, which would wait for the device.
        classes = torch.arange(num_outputs, device=target.device)
        return (target[:, None] == classes).float()

    def draw(self, count: int, num_outputs: int, draws: torch.Generator) -> Tensor:  # noqa: D102
        return torch.randint(num_outputs, (count,), generator=draws)

    @classmethod
    def strata(cls, targets: Tensor) -> Tensor:  # noqa: D102
        return targets.to(torch.int64)

    @classmethod
    def fitted(
        cls,
        targets: Tensor,
        num_outputs: int,
        *,
        balanced: bool = False,
        label_smoothing: float = 0.0,
    ) -> Classes:
        """See `Task.fitted`; balanced weights are N / (C n) for a class of n of N samples."""
        if not balanced:
            return cls((), label_smoothing)
        sizes = torch.bincount(targets, minlength=num_outputs).clamp(min=1).double()
        weights = (len(targets) / (num_outputs * sizes)).tolist()
        return cls(tuple(weights), label_smoothing)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        with in_float32(outputs):
            values, smoothing = precise(outputs), self.label_smoothing
            if not self.weights:
                return functional.cross_entropy(values, target, label_smoothing=smoothing)
            loss_N = functional.cross_entropy(
                values, target, label_smoothing=smoothing, reduction="none"
            )
            return (loss_N * constant(self.weights, loss_N)[target]).mean()

    def pairs(self, target: Tensor) -> Tensor:  # noqa: D102
        return target

    @torch.no_grad()
    def observe(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Observe ``accuracy``, the share of the samples that are classified right."""
        return {"accuracy": (outputs.argmax(dim=1) == target).float().mean()}

    def learns(self, observed: Mapping[str, float], num_outputs: int) -> bool | None:  # noqa: D102
        accuracy = observed.get("accuracy")
        return None if accuracy is None else accuracy > 1.1 / num_outputs

    def tally(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: D102
        found = outputs.argmax(1)
        right = found == target
        ones = torch.ones_like(target, dtype=torch.float64)
        none = ones.new_zeros(outputs.shape[1])
        return {
            "correct": right.sum(),
            "loss": functional.cross_entropy(outputs, target, reduction="sum").double(),
            "count": torch.full((), len(target), device=outputs.device),
            "right": none.index_add(0, target, right.double()),
            "found": none.index_add(0, found, ones),
            "there": none.index_add(0, target, ones),
        }

    def measure(self, tally: Mapping[str, Tensor]) -> dict[str, float]:  # noqa: D102
        accuracy = float(tally["correct"]) / float(tally["count"])
        return {"accuracy": accuracy, "macro_f1": macro_f1(tally)}

    def add_details(
        self, details: dict[str, Tensor], outputs: Tensor, target: Tensor, first: int
    ) -> None:
        """Count which class is taken for which, and how sure predictions are that are right."""
        found, count = outputs.argmax(1), outputs.shape[1]
        right = found == target
        sure = outputs.softmax(1).gather(1, found[:, None])[:, 0].nan_to_num(0)
        if count <= MOST_CONFUSED:
            confusion = details.setdefault("confusion", target.new_zeros(count, count))
            confusion.view(-1).index_add_(0, target * count + found, torch.ones_like(target))
        add(details, "bins", bins_of(sure, right))
        add_worst(details, torch.where(right, -1, sure), first, found, target)

    def details(self, tally: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        """See `Task.details`; a mistake is one that the network was sure of."""
        found: dict[str, Any] = {"table": precision_table(self.noun, tally, names)}
        if "confusion" in tally:
            found["confusion"] = tally["confusion"].tolist()
        found["calibration"] = calibration(tally["bins"])
        found["mistakes"] = [
            {"sample": int(place), "true": names[int(true)], "predicted": names[int(taken)],
             "probability": sure}
            for sure, place, taken, true in tally[WORST].tolist()
            if sure >= 0
        ]  # fmt: skip
        return found

    def confidence(self, outputs: Tensor) -> Tensor:  # noqa: D102
        return outputs.softmax(dim=1).amax(dim=1)

    def columns(self, names: Sequence[str], top: int) -> list[str]:  # noqa: D102
        if not 1 <= top <= len(names):
            raise InputError(f"--top must lie in 1 .. {len(names)}", f"Got {top}")
        numbers = ["", *range(2, top + 1)]
        return [f"{word}{number}" for number in numbers for word in ("label", "probability")]

    def written(self, outputs: Tensor, names: Sequence[str], top: int) -> Iterator[dict[str, Any]]:
        """Write label, probability, label2, probability2, ..., the surest first."""
        best, columns = outputs.softmax(1).topk(top), self.columns(names, top)
        for chances, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            pairs = zip((names[index] for index in indices), chances, strict=True)
            values = [v for name, chance in pairs for v in (name, round(chance, 6))]
            yield dict(zip(columns, values, strict=True))
