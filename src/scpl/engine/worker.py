"""The worker of a rank: receive, act, pass on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from scpl.engine.channel import Outbox, Receiver
from scpl.engine.checkpoint import CheckpointWriter
from scpl.engine.messages import (
    CheckpointMark,
    EpochEnds,
    EvalBatch,
    EvaluationBegins,
    EvaluationEnds,
    Losses,
    Message,
    Stop,
    TrainBatch,
)
from scpl.engine.scores import Counts
from scpl.engine.trainers.base import StageCounts, Trainer
from scpl.engine.transfer import numbers
from scpl.errors import Interrupted
from scpl.partition.values import Tree
from scpl.tasks import Classes, Task

__all__ = ["Position", "Report", "Worker", "read_reports"]


@dataclass(frozen=True)
class Report:
    """What is known of one training step, without a device sync.

    Attributes:
        step: The step, from 1.
        num_samples: Samples of the mini-batch.
        stages: What the objectives of stage 0, 1, ... came to. A rank knows those of its own
            stages and of all stages before; the last rank knows all.
    """

    step: int
    num_samples: int
    stages: Losses

    @property
    def losses(self) -> list[Mapping[str, Tensor]]:
        """The detached terms of every stage's loss by name."""
        return [one.terms for one in self.stages]

    def values(self) -> list[dict[str, float]]:
        """Read the terms of every stage's loss as numbers (one device sync)."""
        return self.read()[0]

    def read(self) -> ReadStep:
        """Read losses and observations as numbers (one device sync)."""
        return read_reports([self])[0]


ReadStep: TypeAlias = tuple[list[dict[str, float]], list[dict[str, float]]]
"""Losses and observations of every stage in one step, as numbers by name."""


def read_reports(reports: Sequence[Report]) -> list[ReadStep]:
    """Read losses and observations of many steps as numbers (one device sync for all)."""
    parts = [
        [*(one.terms for one in report.stages), *(one.observed for one in report.stages)]
        for report in reports
    ]
    values = iter(numbers([v for step in parts for part in step for v in part.values()]))
    found = [[{name: next(values) for name in part} for part in step] for step in parts]
    return [(step[: len(step) // 2], step[len(step) // 2 :]) for step in found]


@dataclass
class Position:
    """Where in the data a run stands.

    Attributes:
        step: Training steps done.
        epoch: Epochs finished.
        batch: Mini-batches of the current epoch done.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0


class Worker:
    """Acts on every message where it meets it, and passes it on.

    Args:
        trainer: What turns a batch into an update of this rank's stages.
        inbox: Where messages come from; None on the first rank, where they begin.
        outbox: Where they go on.
        writer: Writes this rank's parts of checkpoints, if any are wanted.
        task: What the network's outputs mean.
        predicts: Whether the last of the stages here is the network's.

    Attributes:
        on_report: Called with the report of a step as soon as it is known, before anything later
            is done.
        position: How far this rank is.
        counts: Of the evaluation under way.
        evaluation: What the last evaluation counted, for each stage up to this rank's last one.
        stopped: Whether the stream has ended.
    """

    def __init__(
        self,
        trainer: Trainer,
        inbox: Receiver | None,
        outbox: Outbox,
        writer: CheckpointWriter | None,
        task: Task | None = None,
        *,
        predicts: bool = True,
    ) -> None:
        self._task, self._predicts = task or Classes(), predicts
        self._trainer, self._inbox, self._outbox, self._writer = trainer, inbox, outbox, writer
        self._unreported: Report | None = None
        self._losses: Losses = ()  # of the last step that was reported
        self.on_report: Callable[[Report], object] = _ignore
        self.position = Position()
        self.counts = Counts(0, self._task)
        self.evaluation: StageCounts = ()
        self.stopped = False
        self.num_trained = 0

    def follow(self, until: type[Message]) -> Iterator[None]:
        """Receive, act, pass on, until a message of this kind is done.

        Yields:
            After each message.

        Raises:
            Interrupted: if the stream ends.
        """
        assert self._inbox is not None, "the first rank has nobody to follow"
        done: Message | None = None
        while not isinstance(done, until):
            done = self._inbox.receive()
            self.process(done)
            if isinstance(done, Stop):
                error = Interrupted("The first rank ended the run", done.reason)
                error.signal = done.signal or error.signal
                raise error
            yield

    def process(self, message: Message) -> None:
        """Report the step before, act on this message, and pass it on."""
        match message:
            case TrainBatch():
                self._report(message.losses)
                own = self._trainer.train(message, self._losses)
                self._unreported = Report(message.step, message.rows, own)
                self.num_trained += 1
                self.position.step = message.step
                self.position.batch += 1
                if self._inbox is None:
                    self._report(())  # there are no earlier ranks whose losses could come
            case EvalBatch():
                self._trainer.evaluate(message, self.counts)
            case EvaluationBegins():
                self._report(message.losses)
                self.counts = Counts(
                    len(self._trainer.stages),
                    self._task,
                    keep_logits=message.keep_logits,
                    predicts=self._predicts,
                )
                shared = self._share(message)
                self._outbox.send(replace(message, shared=shared, losses=self._losses))
                self._trainer.prepare_evaluation()
            case EvaluationEnds():
                own_counts = tuple(self.counts.stages)
                self.evaluation = self._trainer.join_counts(message.counts, own_counts)
                self._outbox.send(replace(message, counts=self.evaluation))
            case EpochEnds():
                self._report(message.losses)
                self._outbox.send(replace(message, losses=self._losses))
                self._trainer.end_epoch()
                for stage in self._trainer.stages:
                    stage.guard.look()
                self.position.epoch += 1
                self.position.batch = 0
            case CheckpointMark():
                self._report(message.losses)
                self._outbox.send(replace(message, losses=self._losses))
                self._save(message)
            case Stop():
                self._outbox.send(message)
                self.stopped = True

    def stop(self, reason: str = "", signal: int = 0) -> None:
        """End the stream: the last message of all."""
        self.process(Stop(self.position.step, reason, signal))

    def close(self) -> None:
        """End the stream, or wait for its end; then wait until everything has left."""
        if self._inbox is None and not self.stopped:
            self.stop()
        while not self.stopped:
            try:
                for _ in self.follow(Stop):
                    pass
            except Interrupted:
                break
        self._outbox.close()

    @property
    def bytes_per_step(self) -> float:
        """Bytes sent to other ranks per mini-batch of training, on average."""
        return self._trainer.bytes_sent / max(self.num_trained, 1)

    def _report(self, earlier: Losses) -> None:
        """Report the last step, if that is not done: its earlier stages' losses are here."""
        if self._unreported is None:
            return
        report, self._unreported = self._unreported, None
        self._losses = self._trainer.join_losses(earlier, report.stages)
        self.on_report(replace(report, stages=self._losses))

    def _share(self, message: EvaluationBegins) -> Tree:
        """Let each stage's objective tell the next one what it needs for its predictions."""
        shared = message.shared
        for stage in self._trainer.stages:
            with stage.naming_errors(shared, message.step):
                shared = stage.share(shared)
        return shared

    def _save(self, mark: CheckpointMark) -> None:
        if self._writer is None:
            return
        self._writer.announce()
        # What was computed since the last update is lost, so a run goes on from there.
        pending = self._trainer.pending
        mark = replace(mark, step=mark.step - pending, batch=mark.batch - pending)
        for stage in self._trainer.stages if self._trainer.saves else ():
            with self._trainer.timeline.during("snapshot", stage.index, mark.step):
                state = self._trainer.snapshot(stage, mark.step)
                self._writer.write(stage.index, mark, state)


def _ignore(report: Report) -> None:
    """For a caller who asked for no reports."""
