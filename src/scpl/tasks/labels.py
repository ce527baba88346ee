"""Any number of labels for each sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional

from scpl.errors import DataError
from scpl.measures import average_precision, bins_of, calibration
from scpl.tasks.base import WORST, Task
from scpl.tasks.counting import (
    add,
    add_worst,
    check_smoothing,
    constant,
    in_float32,
    macro_f1,
    only_one,
    precise,
    precision_table,
)

__all__ = ["MultiLabel"]

# Shape suffixes: N = samples, C = outputs of the network.


@final
@dataclass(frozen=True)
class MultiLabel(Task):
    """Any number of labels per sample; a target is 0 or 1 for each, ``[N, C]`` of any type.

    Values between are soft labels; metrics ask whether they are above 0.5. The contrastive loss
    takes two samples as positives as far as they share labels: with weight |A and B| / |A or B|
    (Jaccard), and 0 for samples without labels.

    Args:
        weights: What the loss of a label that is there is multiplied by; none for 1.
        label_smoothing: The loss takes labels that are there for 1 minus half of this share, and
            others for half of it. What is measured of predictions knows neither of the two.
    """

    kind: ClassVar[str] = "multi-label"
    loss_name: ClassVar[str] = "binary_cross_entropy"
    metrics: ClassVar[tuple[str, ...]] = (
        "macro_f1", "micro_f1", "mean_average_precision", "exact_match",
    )  # fmt: skip
    proportions: ClassVar[tuple[str, ...]] = ("exact_match",)
    keeps: ClassVar[bool] = True
    noun: ClassVar[str] = "label"
    plural: ClassVar[str] = "labels"

    weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing)

    def prepare(self, target: Tensor) -> Tensor:  # noqa: D102
        return target.to(torch.float32)

    def check_values(self, low: float, high: float, num_outputs: int, place: str) -> None:  # noqa: D102
        if not (low >= 0 and high <= 1):
            raise DataError(
                "Targets must say 1 of labels that are there and 0 of others",
                f"Got {high if low >= 0 else low:g} in {place}",
            )

    def as_vector(self, target: Tensor, num_outputs: int) -> Tensor:  # noqa: D102
        return target

    def draw(self, count: int, num_outputs: int, draws: torch.Generator) -> Tensor:  # noqa: D102
        return torch.randint(2, (count, num_outputs), generator=draws)

    @classmethod
    def strata(cls, targets: Tensor) -> Tensor:
        """Sort samples by the rarest of their labels; those without any come last."""
        there = targets > 0.5
        sizes = there.sum(0).double()
        rarest = torch.where(there, sizes, math.inf).argmin(1)
        return torch.where(there.any(1), rarest, targets.shape[1])

    @classmethod
    def fitted(
        cls,
        targets: Tensor,
        num_outputs: int,
        *,
        balanced: bool = False,
        label_smoothing: float = 0.0,
    ) -> MultiLabel:
        """See `Task.fitted`; balanced weights are (N - n) / n for a label of n of N samples."""
        if not balanced:
            return cls((), label_smoothing)
        sizes = (targets > 0.5).sum(0).double()
        constant = ((sizes == 0) | (sizes == len(targets))).nonzero().flatten().tolist()
        if constant:
            raise DataError(
                "To be balanced, every label must be on some training samples and not on others",
                f"Label number {constant[0]} is on {int(sizes[constant[0]]):,} of {len(targets):,}",
                "Leave the label out, or use more samples",
            )
        return cls(tuple(((len(targets) - sizes) / sizes).tolist()), label_smoothing)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:  # noqa: D102
        with in_float32(outputs):
            values, smoothing = precise(outputs), self.label_smoothing
            wanted = target.to(values.dtype) * (1 - smoothing) + smoothing / 2
            weights = constant(self.weights, values) if self.weights else None
            return functional.binary_cross_entropy_with_logits(values, wanted, pos_weight=weights)

    def pairs(self, target: Tensor) -> Tensor:  # noqa: D102
        with in_float32(target):
            shared = target @ target.T
            sizes = target.sum(1)
            either = sizes[:, None] + sizes - shared
            return shared / either.masked_fill(either == 0, 1)

    @torch.no_grad()
    def observe(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Observe ``micro_f1`` over the labels of the mini-batch."""
        found, there = outputs > 0, target > 0.5
        both = (found & there).sum()
        return {"micro_f1": 2 * both / (found.sum() + there.sum()).clamp(min=1)}

    def learns(self, observed: Mapping[str, float], num_outputs: int) -> bool | None:  # noqa: D102
        found = observed.get("micro_f1")
        return None if found is None else found > 0.01

    def tally(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: D102
        found, there = outputs > 0, target > 0.5
        loss_NC = functional.binary_cross_entropy_with_logits(
            outputs, target.to(outputs.dtype), reduction="none"
        )
        return {
            "loss": loss_NC.mean(1).sum().double(),
            "count": torch.full((), len(target), device=outputs.device),
            "exact": (found == there).all(1).sum(),
            "right": (found & there).sum(0),
            "found": found.sum(0),
            "there": there.sum(0),
            "outputs": outputs,
            "targets": target,
        }

    def measure(self, tally: Mapping[str, Tensor]) -> dict[str, float]:  # noqa: D102
        right = float(tally["right"].sum())
        either = float((tally["found"] + tally["there"]).sum())
        found = {
            "macro_f1": macro_f1(tally),
            "micro_f1": 2 * right / either if either else 0.0,
            "exact_match": float(tally["exact"]) / float(tally["count"]),
        }
        if "outputs" in tally:
            there, outputs = tally["targets"] > 0.5, tally["outputs"]
            known = [i for i in range(there.shape[1]) if there[:, i].any()]
            precise = [average_precision(outputs[:, i], there[:, i]) for i in known]
            found["mean_average_precision"] = sum(precise) / max(len(precise), 1)
        return found

    def add_details(
        self, details: dict[str, Tensor], outputs: Tensor, target: Tensor, first: int
    ) -> None:
        """Count how often labels are there that have some probability."""
        chances, there = outputs.sigmoid().nan_to_num(0.5), target > 0.5
        add(details, "bins", bins_of(chances.flatten(), there.flatten()))
        sure = torch.where(outputs > 0, chances, 1 - chances)
        add_worst(details, torch.where((outputs > 0) == there, -1, sure), first, there)

    def details(self, tally: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        """See `Task.details`; a mistake is of one label, and one that the network was sure of."""
        words = ("no", "yes")
        return {
            "table": precision_table(self.noun, tally, names),
            "calibration": calibration(tally["bins"]),
            "mistakes": [
                {"sample": int(place), "label": names[int(label)], "true": words[int(there)],
                 "predicted": words[not there], "probability": sure}
                for sure, place, label, there in tally[WORST].tolist()
                if sure >= 0
            ],
        }  # fmt: skip

    def confidence(self, outputs: Tensor) -> Tensor:
        """Say how sure the network is of the label that it doubts most."""
        return outputs.abs().sigmoid().amin(dim=1)

    def columns(self, names: Sequence[str], top: int) -> list[str]:  # noqa: D102
        only_one(top, "lists the labels above 0.5")
        return ["labels", "probabilities"]

    def written(self, outputs: Tensor, names: Sequence[str], top: int) -> Iterator[dict[str, Any]]:
        """Write the labels with a probability above 0.5, and these, as lists."""
        for row in outputs.sigmoid().tolist():
            there = [i for i, chance in enumerate(row) if chance > 0.5]
            labels, chances = [names[i] for i in there], [round(row[i], 6) for i in there]
            yield {"labels": labels, "probabilities": chances}
