"""The result of an evaluation, read when it is needed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scpl.errors import DataError

__all__ = ["Evaluation", "Scores"]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        accuracy: Share of samples that the network classifies right, 0 .. 1.
        loss: Mean cross-entropy of its predictions.
        num_samples: How many samples were seen.
        stage_accuracy: For each stage the accuracy of its own read-out, None where it has none.
    """

    accuracy: float
    loss: float
    num_samples: int
    stage_accuracy: tuple[float | None, ...]


class Scores:
    """The result of an evaluation, read when it is needed."""

    def __init__(self, counts: tuple[dict[str, Tensor], ...]) -> None:
        self._counts = counts

    def result(self) -> Evaluation:
        """Return the numbers (one device sync)."""
        stages = [{name: float(value) for name, value in part.items()} for part in self._counts]
        if not stages or not stages[-1].get("count"):
            raise DataError("An evaluation needs at least one sample", "Got none")
        last = stages[-1]
        return Evaluation(
            accuracy=last["correct"] / last["count"],
            loss=last["loss"] / last["count"],
            num_samples=int(last["count"]),
            stage_accuracy=tuple(s["correct"] / s["count"] if s else None for s in stages),
        )
