"""The result of an evaluation, read when it is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from scpl.engine.ranks import OneRank, Ranks
from scpl.engine.transfer import numbers
from scpl.errors import DataError

__all__ = ["Counts", "Evaluation", "Scores"]


COLUMNS = ("correct", "loss", "count")


class Counts:
    """Running counts of an evaluation, for each stage of a rank.

    Args:
        num_stages: Stages of the rank.
        keep_logits: Whether to keep what the last of them predicts.

    Attributes:
        stages: For each stage ``{"correct", "loss", "count"}`` as tensors: sums and counts, never
            means, so that ragged batches weigh right. Nothing where a stage cannot predict.
        logits: What the last stage predicted, if it is kept.
    """

    def __init__(self, num_stages: int, *, keep_logits: bool = False) -> None:
        self.stages: list[dict[str, Tensor]] = [{} for _ in range(num_stages)]
        self.logits: list[Tensor] = []
        self.keep_logits = keep_logits

    def add(self, stage: int, logits: Tensor, target: Tensor | None, *, last: bool) -> None:
        """Count what a stage predicts of a batch.

        Args:
            stage: Its place on this rank.
            logits: ``[N, C]``.
            target: Class indices ``[N]``, or None where only predictions are wanted.
            last: Whether it is the last one of this rank.
        """
        if last and self.keep_logits:
            self.logits.append(logits)
        if target is None:
            return
        new = {
            "correct": (logits.argmax(1) == target).sum(),
            "loss": functional.cross_entropy(logits, target, reduction="sum").double(),
            "count": torch.full((), target.shape[0], device=logits.device),
        }
        counts = self.stages[stage]
        for name, value in new.items():
            counts[name] = counts[name] + value if name in counts else value


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        accuracy: Share of samples that the network classifies right, 0 .. 1.
        loss: Mean cross-entropy of its predictions.
        num_samples: How many samples were seen.
        stage_accuracy: Of each stage's own predictions, None where it makes none.
    """

    accuracy: float
    loss: float
    num_samples: int
    stage_accuracy: tuple[float | None, ...]


class Scores:
    """The result of an evaluation, read when it is needed.

    Args:
        counts: Sums and counts per stage; complete on the last rank, where the stream ends.
        num_stages: Stages of the whole network.
        ranks: The ranks.
    """

    def __init__(
        self, counts: Sequence[Mapping[str, Tensor]], num_stages: int, ranks: Ranks
    ) -> None:
        self._counts, self._num_stages, self._ranks = counts, num_stages, ranks

    def result(self) -> Evaluation:
        """Return the numbers, the same on every rank; with several ranks all must call it.

        Raises:
            DataError: if no sample was seen.
        """
        table = torch.full((self._num_stages, len(COLUMNS)), math.nan, dtype=torch.float64)
        if self._ranks.mesh.is_last:
            known = [(stage, part) for stage, part in enumerate(self._counts) if part]
            values = numbers([part[name] for _, part in known for name in COLUMNS])
            rows = torch.tensor(values, dtype=torch.float64).view(-1, len(COLUMNS))
            table[[stage for stage, _ in known]] = rows
        self._ranks.broadcast(table, self._ranks.mesh.num_ranks - 1)
        return _evaluate(table)

    def peek(self) -> Evaluation | None:
        """Return the numbers on the last rank, which has them first; None elsewhere.

        Unlike `result` this waits for nobody.
        """
        if not self._ranks.mesh.is_last:
            return None
        return Scores(self._counts, self._num_stages, OneRank()).result()


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
