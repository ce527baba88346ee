"""The loop of one rank: receive, forward, send on, learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from scpl.link import Outbox
from scpl.message import Kind, Mark, Message
from scpl.stage import Stage

__all__ = ["Counts", "Report", "Worker"]

CheckpointHook = Callable[[Stage, Message], None]


@dataclass(frozen=True)
class Report:
    """What is known of one training step, without a device sync.

    Attributes:
        step: The step, from 1.
        num_samples: Rows of the mini-batch.
        losses: Detached terms of the local loss of stage 0, 1, ... by name. A rank knows those
            of its own stages and of all stages before; the last rank knows all.
    """

    step: int
    num_samples: int
    losses: tuple[dict[str, Tensor], ...]

    def values(self) -> list[dict[str, float]]:
        """Read the losses as numbers (one device sync)."""
        terms = [
            (i, name, term) for i, part in enumerate(self.losses) for name, term in part.items()
        ]
        numbers = torch.stack([term.float().cpu() for *_, term in terms]).tolist() if terms else []
        found: list[dict[str, float]] = [{} for _ in self.losses]
        for (index, name, _), number in zip(terms, numbers, strict=True):
            found[index][name] = number
        return found


@dataclass
class Counts:
    """Running counts of an evaluation, for each stage of this rank.

    Attributes:
        stages: For each stage ``{"correct", "loss", "count"}`` as tensors, or nothing where a
            stage cannot predict.
        logits: What the last stage predicted, if it was asked to keep it.
        keep: Whether to keep logits.
    """

    stages: list[dict[str, Tensor]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    keep: bool = False


class Worker:
    """Runs the stages that one rank hosts.

    Args:
        stages: Consecutive stages, in order.
        outbox: Where the output of the last of them goes.
        on_checkpoint: Called for every stage when a checkpoint's barrier reaches it.
    """

    def __init__(
        self, stages: Sequence[Stage], outbox: Outbox, on_checkpoint: CheckpointHook
    ) -> None:
        self.stages = stages
        self._outbox = outbox
        self._on_checkpoint = on_checkpoint
        self._is_first = stages[0].index == 0
        self._own_losses: tuple[dict[str, Tensor], ...] = ()
        self._own_step = 0
        self._own_samples = 0
        self.counts = Counts()
        self.evaluation: tuple[dict[str, Tensor], ...] = ()

    def handle(self, message: Message) -> Report | None:
        """Do what a message asks, and pass it on.

        Returns:
            The report of a step, once the losses of all earlier stages are known: on the first
            rank at once, elsewhere with the message after.
        """
        if message.kind is Kind.TRAIN:
            report = self._complete(message)
            self._train(message, () if report is None else report.losses)
            return self._own_report() if self._is_first else report
        if message.kind is Kind.EVAL:
            self._evaluate(message)
            return None
        if message.kind is Kind.BARRIER:
            return self._pass_barrier(message)
        self._outbox.send(message)
        return None

    def _train(self, message: Message, losses: tuple[dict[str, Tensor], ...]) -> None:
        """Forward, send on, learn: for each stage of this rank in turn.

        A stage learns before the next one of the same rank runs, so its activations are free by
        then: the peak memory of a rank is that of its largest stage, not of their sum.
        """
        features, target, carry, step = (
            message.features,
            message.target,
            message.carry,
            message.step,
        )
        assert target is not None
        own = []
        for stage in self.stages:
            try:
                output = stage.forward(features)
                onward = stage.hand_on(target, carry)
                if stage is self.stages[-1]:
                    self._outbox.send(
                        replace(message, features=output, carry=onward, reports=losses)
                    )
                own.append(stage.learn(target, carry, step))
            except Exception as error:
                failure = stage.explain(error, features, step)
                raise failure from (None if failure is error else error)
            features, carry = output, onward
        self._own_losses, self._own_step = tuple(own), step
        self._own_samples = target.shape[0]

    def _complete(self, message: Message) -> Report | None:
        """Join the losses of earlier stages, one message late, to this rank's own."""
        if not self._own_losses:
            return None
        report = self._own_report(message.reports)
        self._own_losses = ()
        return report

    def _own_report(self, earlier: tuple[dict[str, Tensor], ...] = ()) -> Report:
        return Report(self._own_step, self._own_samples, (*earlier, *self._own_losses))

    def _evaluate(self, message: Message) -> None:
        features = message.features
        for index, stage in enumerate(self.stages):
            try:
                output = stage.infer(features)
                if stage is self.stages[-1]:
                    self._outbox.send(replace(message, features=output))
                logits = stage.predict(output)
            except Exception as error:
                failure = stage.explain(error, features, message.step)
                raise failure from (None if failure is error else error)
            if logits is not None:
                if message.target is not None:
                    _count(self.counts.stages[index], logits, message.target)
                if self.counts.keep and stage is self.stages[-1]:
                    self.counts.logits.append(logits)
            features = output

    def _pass_barrier(self, message: Message) -> Report | None:
        """Act on this rank's state at exactly this point of the stream, and pass the mark on."""
        report = None
        if message.mark is Mark.EVALUATION_END:
            message = replace(message, reports=(*message.reports, *self.counts.stages))
            self.evaluation = message.reports
        else:
            report = self._complete(message)
            message = replace(message, reports=() if report is None else report.losses)
        if message.mark is Mark.EVALUATION_BEGIN:
            self.counts = Counts([{} for _ in self.stages], keep=bool(message.note.get("keep")))
        self._outbox.send(message)
        if message.mark is Mark.CHECKPOINT:
            for stage in self.stages:
                self._on_checkpoint(stage, message)
        elif message.mark is Mark.EPOCH_END:
            for stage in self.stages:
                stage.check_losses()
        return None if self._is_first else report


def _count(counts: dict[str, Tensor], logits: Tensor, target: Tensor) -> None:
    """Add a batch: sums and counts, never means, so that ragged batches weigh right."""
    new = {
        "correct": (logits.argmax(1) == target).sum(),
        "loss": functional.cross_entropy(logits, target, reduction="sum").double(),
        "count": torch.tensor(target.shape[0]),
    }
    for name, value in new.items():
        counts[name] = counts[name] + value if name in counts else value
