"""The result of an evaluation, read when it is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scpl.engine.ranks import OneRank, Ranks
from scpl.errors import DataError, InputError
from scpl.measures import largest, wilson_interval
from scpl.tasks import KEPT, WORST, Classes, Task

__all__ = ["Counts", "Evaluation", "Scores", "joined"]


class Counts:
    """Running counts of an evaluation, for each stage of a rank.

    Args:
        num_stages: Stages of the rank.
        task: What their outputs mean.
        keep_logits: Whether to keep what the last of them predicts.
        predicts: Whether the last of them is the network's, whose predictions metrics need.

    Attributes:
        stages: For each stage what `Task.tally` sums up: sums and counts, never means, so that
            ragged batches weigh right; for the network also `Task.add_details`. Nothing where a
            stage cannot predict.
        logits: What the last stage predicted, if it is kept.
    """

    def __init__(
        self, num_stages: int, task: Task, *, keep_logits: bool = False, predicts: bool = True
    ) -> None:
        self.logits: list[Tensor] = []
        self.keep_logits = keep_logits
        self._task, self._predicts = task, predicts
        self._sums: list[dict[str, Tensor]] = [{} for _ in range(num_stages)]
        self._kept: dict[str, list[Tensor]] = {name: [] for name in KEPT}
        self._details: dict[str, Tensor] = {}

    def add(
        self, stage: int, logits: Tensor, target: Tensor | None, *, last: bool, first: int = 0
    ) -> None:
        """Count what a stage predicts of a batch.

        Args:
            stage: Its place on this rank.
            logits: ``[N, C]``.
            target: As `Task.prepare` made it, or None where only predictions are wanted.
            last: Whether it is the last one of this rank.
            first: Place of the first of these samples in the evaluation.
        """
        if last and self.keep_logits:
            self.logits.append(logits)
        if target is None:
            return
        counts = self._sums[stage]
        for name, value in self._task.tally(logits, target).items():
            if name not in KEPT:
                counts[name] = counts[name] + value if name in counts else value
            elif last and self._predicts:
                self._kept[name].append(value)
        if last and self._predicts:
            self._task.add_details(self._details, logits, target, first)

    @property
    def stages(self) -> list[dict[str, Tensor]]:
        """See the class."""
        kept = {name: torch.cat(values) for name, values in self._kept.items() if values}
        last = {**kept, **self._details}
        return [*self._sums[:-1], *({**sums, **last} for sums in self._sums[-1:])]


def joined(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put together what was counted of different samples by the same stage."""
    found = {**one, **other}
    for name in one.keys() & other.keys():
        both = one[name], other[name]
        if name == WORST:
            found[name] = largest(torch.cat(both))
        else:
            found[name] = torch.cat(both) if name in KEPT else both[0] + both[1]
    return found


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: How good the network's predictions are: `Task.metrics` by name, the main one first.
        loss: Mean loss of its predictions: cross-entropy, or that of another task.
        num_samples: How many samples were seen.
        stage_scores: The main metric of each stage's own predictions, None where it makes none.
        intervals: Between what bounds metrics lie with 95 % probability, by name: those that are
            shares of the samples, see `scpl.measures.wilson_interval`.
    """

    metrics: Mapping[str, float]
    loss: float
    num_samples: int
    stage_scores: tuple[float | None, ...]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The main metric; larger is better."""
        return next(iter(self.metrics.values()))

    @property
    def accuracy(self) -> float:
        """Share of samples that the network classifies right, 0 .. 1.

        Raises:
            InputError: for another task than classes.
        """
        self._check_classes()
        return self.score

    @property
    def stage_accuracy(self) -> tuple[float | None, ...]:
        """Accuracy of each stage's own predictions, None where it makes none; else as `accuracy`.

        Raises:
            InputError: for another task than classes.
        """
        self._check_classes()
        return self.stage_scores

    def _check_classes(self) -> None:
        if "accuracy" not in self.metrics:
            raise InputError(
                "Accuracy is a metric of classes",
                f"Got {', '.join(self.metrics)}",
                "Read `metrics`; `score` is the first of them",
            )


class Scores:
    """The result of an evaluation, read when it is needed.

    Args:
        counts: What was counted per stage; complete on the last rank, where the stream ends.
        num_stages: Stages of the whole network.
        ranks: The ranks.
        task: What was predicted.
    """

    def __init__(
        self,
        counts: Sequence[Mapping[str, Tensor]],
        num_stages: int,
        ranks: Ranks,
        task: Task | None = None,
    ) -> None:
        self._counts, self._num_stages, self._ranks = counts, num_stages, ranks
        self._task = task or Classes()

    def result(self) -> Evaluation:
        """Return the numbers, the same on every rank; with several ranks all must call it.

        Raises:
            DataError: if no sample was seen.
        """
        columns = ("count", "loss", *self._task.metrics)
        table = torch.full((self._num_stages, len(columns)), math.nan, dtype=torch.float64)
        if self._ranks.mesh.is_last:
            for stage, counted in _on_cpu(self._counts):
                found = {**self._task.measure(counted), "count": float(counted["count"])}
                found["loss"] = float(counted["loss"]) / found["count"]
                values = [found.get(name, math.nan) for name in columns]
                table[stage] = torch.tensor(values, dtype=torch.float64)
        self._ranks.broadcast(table, self._ranks.mesh.num_ranks - 1)
        return self._read(table)

    def peek(self) -> Evaluation | None:
        """Return the numbers on the last rank, which has them first; None elsewhere.

        Unlike `result` this waits for nobody.
        """
        if not self._ranks.mesh.is_last:
            return None
        return Scores(self._counts, self._num_stages, OneRank(), self._task).result()

    def details(self, names: Sequence[str]) -> dict[str, Any] | None:
        """Return a full account of the network's predictions on the last rank; None elsewhere.

        Like `peek` it waits for nobody.

        Args:
            names: Of the network's outputs: of the classes, labels or numbers.

        Returns:
            See `Task.details`.

        Raises:
            DataError: if no sample was seen.
        """
        if not self._ranks.mesh.is_last:
            return None
        if not self._counts or not self._counts[-1]:
            raise _no_sample()
        ((_, counted),) = _on_cpu(self._counts[-1:])
        return self._task.details(counted, names)

    def _read(self, table: Tensor) -> Evaluation:
        rows = table.tolist()
        count, loss, *metrics = rows[-1]
        if not count > 0:
            raise _no_sample()
        found = dict(zip(self._task.metrics, metrics, strict=True))
        return Evaluation(
            metrics=found,
            loss=loss,
            num_samples=int(count),
            stage_scores=tuple(None if math.isnan(row[0]) else row[2] for row in rows),
            intervals={
                name: wilson_interval(found[name], int(count)) for name in self._task.proportions
            },
        )


def _no_sample() -> DataError:
    return DataError("An evaluation needs at least one sample", "Got none")


def _on_cpu(counts: Sequence[Mapping[str, Tensor]]) -> list[tuple[int, dict[str, Tensor]]]:
    """Read what stages counted; in as few transfers as there are types."""
    known = [(stage, part) for stage, part in enumerate(counts) if part]
    places: dict[tuple[torch.device, torch.dtype], list[tuple[int, str]]] = {}
    for place, (_, part) in enumerate(known):
        for name, value in part.items():
            places.setdefault((value.device, value.dtype), []).append((place, name))
    found: list[dict[str, Tensor]] = [{} for _ in known]
    for alike in places.values():
        values = [known[place][1][name] for place, name in alike]
        read = torch.cat([value.flatten() for value in values]).cpu()
        pieces = torch.split(read, [value.numel() for value in values])
        for (place, name), piece, value in zip(alike, pieces, values, strict=True):
            found[place][name] = piece.view(value.shape)
    return [(stage, part) for (stage, _), part in zip(known, found, strict=True)]
