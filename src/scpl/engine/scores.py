"""The result of an evaluation, read when it is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scpl.engine.ranks import Control, LocalControl
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
    """The result of an evaluation, read when it is needed.

    Args:
        counts: Sums and counts per stage; complete on the last rank, where the stream ends.
        num_stages: Stages of the whole line.
        control: The tie between the ranks.
    """

    def __init__(
        self, counts: tuple[dict[str, Tensor], ...], num_stages: int, control: Control
    ) -> None:
        self._counts, self._num_stages, self._control = counts, num_stages, control

    def result(self) -> Evaluation:
        """Return the numbers, the same on every rank; with several ranks all must call it.

        Raises:
            DataError: if no sample was seen.
        """
        table = torch.full((self._num_stages, len(COLUMNS)), math.nan, dtype=torch.float64)
        if self._control.mesh.is_last:
            for stage, part in enumerate(self._counts):
                for column, name in enumerate(COLUMNS):
                    if part:
                        table[stage, column] = part[name].double()
        self._control.broadcast(table, self._control.mesh.num_ranks - 1)
        return _evaluate(table)

    def peek(self) -> Evaluation | None:
        """Return the numbers on the last rank, which has them first; None elsewhere.

        Unlike `result` this waits for nobody.
        """
        if not self._control.mesh.is_last:
            return None
        return Scores(self._counts, self._num_stages, LocalControl()).result()


COLUMNS = ("correct", "loss", "count")


def _evaluate(table: Tensor) -> Evaluation:
    rows = table.tolist()
    correct, loss, count = rows[-1]
    if not count > 0:
        raise DataError("An evaluation needs at least one sample", "Got none")
    return Evaluation(
        accuracy=correct / count,
        loss=loss / count,
        num_samples=int(count),
        stage_accuracy=tuple(None if math.isnan(row[2]) else row[0] / row[2] for row in rows),
    )
