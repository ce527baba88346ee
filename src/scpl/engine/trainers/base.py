"""What every trainer can do, and what each does in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor

from scpl.engine.channel import Outbox
from scpl.engine.messages import EvalBatch, Losses, TrainBatch
from scpl.engine.scores import Counts
from scpl.engine.stage import Stage
from scpl.engine.timeline import Timeline
from scpl.errors import StageError

__all__ = ["StageCounts", "Trainer"]

StageCounts: TypeAlias = tuple[Mapping[str, Tensor], ...]


class Trainer(ABC):
    """Turns a batch into an update of the stages that one rank hosts.

    Args:
        stages: Consecutive stages, in order.
        outbox: Where messages go on.
        timeline: Where it records what it does when.

    Attributes:
        bytes_sent: Sent to other ranks for training so far.
        saves: Whether this rank writes its stages when a checkpoint is due.
    """

    def __init__(self, stages: Sequence[Stage], outbox: Outbox, timeline: Timeline) -> None:
        self.stages, self.outbox, self.timeline = stages, outbox, timeline
        self.bytes_sent = 0
        self.saves = True

    @abstractmethod
    def train(self, batch: TrainBatch, earlier: Losses) -> Losses:
        """Send on what later ranks need, and learn.

        Args:
            batch: The batch of this step.
            earlier: What is known of the step before; it goes on with the batch.

        Returns:
            The losses of this rank's stages in this step.
        """

    def end_epoch(self) -> None:
        """Act where an epoch ends, after its mark has been passed on."""
        return

    @property
    def pending(self) -> int:
        """Mini-batches since the last update, which a checkpoint must not count as done."""
        return 0

    def snapshot(self, stage: Stage, step: int) -> dict[str, Any]:
        """Copy the state of a stage as it was after its last update (see `Stage.snapshot`)."""
        return stage.snapshot(step)

    def join_losses(self, earlier: Losses, own: Losses) -> Losses:
        """Put together what earlier ranks and this one know of the same step."""
        return (*earlier, *own)

    def prepare_evaluation(self) -> None:
        """Act where an evaluation begins, after its mark has been passed on."""
        return

    def evaluate(self, batch: EvalBatch, counts: Counts) -> None:
        """Predict, pass on, and count what each stage predicts."""
        self.infer(batch, counts)

    def join_counts(self, earlier: StageCounts, own: StageCounts) -> StageCounts:
        """Put together what earlier ranks and this one counted."""
        return (*earlier, *own)

    def infer(self, batch: EvalBatch, counts: Counts, *, pass_on: bool = True) -> None:
        """Run all stages of this rank in evaluation mode, and count what each predicts.

        Args:
            batch: Features and target.
            counts: What was counted so far.
            pass_on: Send the features on.

        Raises:
            StageError: if an objective does not predict for all samples.
        """
        features = batch.features
        for index, stage in enumerate(self.stages):
            with stage.naming_errors(features, batch.step):
                with self.timeline.during("evaluate", stage.index, batch.step):
                    output = stage.infer(features)
                if pass_on and stage is self.stages[-1]:
                    self.outbox.send(replace(batch, features=output))
                with self.timeline.during("evaluate", stage.index, batch.step):
                    logits = stage.predict(output)
            if logits is not None:
                # Without a target, what crosses a cut need not have its rows first.
                rows = batch.whole_size if batch.target is None else len(batch.target)
                if rows is not None and len(logits) != rows:
                    raise StageError(
                        "An objective must predict a row for each sample of the mini-batch, where "
                        "stages have replicas by `self.whole(...)`",
                        f"That of stage {stage.index} predicted {len(logits)} for {rows}",
                        "Change its `predict`",
                    )
                last = stage is self.stages[-1]
                counts.add(index, logits, batch.target, last=last, first=batch.first)
            features = output
