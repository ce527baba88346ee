"""The loop of one rank: receive, forward, send on, learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from scpl.engine.channel import Outbox, Receiver
from scpl.engine.messages import OBSERVED, Kind, Mark, Message
from scpl.engine.stage import Stage
from scpl.engine.timeline import Timeline
from scpl.errors import Interrupted, ScplError
from scpl.partition.values import Tree

__all__ = ["CheckpointHook", "Counts", "Line", "Losses", "Position", "Report", "Worker"]

CheckpointHook = Callable[[Stage, Message], None]
Losses: TypeAlias = tuple[dict[str, Tensor], ...]
"""For each stage, scalars by name: terms of its loss, or counts of an evaluation."""


@dataclass(frozen=True)
class Report:
    """What is known of one training step, without a device sync.

    Attributes:
        step: The step, from 1.
        num_samples: Rows of the mini-batch.
        losses: Detached terms of the local loss of stage 0, 1, ... by name. A rank knows those
            of its own stages and of all stages before; the last rank knows all.
        observed: What the objectives of the same stages noticed beside their losses.
    """

    step: int
    num_samples: int
    losses: Losses
    observed: Losses = ()

    @classmethod
    def of(cls, step: int, num_samples: int, parts: Losses) -> Report:
        """Make a report of what the stages said, telling losses and observations apart."""
        losses = tuple({k: v for k, v in p.items() if not k.startswith(OBSERVED)} for p in parts)
        observed = tuple(
            {k.removeprefix(OBSERVED): v for k, v in p.items() if k.startswith(OBSERVED)}
            for p in parts
        )
        return cls(step, num_samples, losses, observed)

    def values(self) -> list[dict[str, float]]:
        """Read the losses as numbers (one device sync)."""
        return _numbers(self.losses)

    def read(self) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """Read losses and observations as numbers (one device sync)."""
        numbers = _numbers((*self.losses, *self.observed))
        return numbers[: len(self.losses)], numbers[len(self.losses) :]


def _marked(observed: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{OBSERVED}{name}": value.detach() for name, value in observed.items()}


def _numbers(parts: Sequence[dict[str, Tensor]]) -> list[dict[str, float]]:
    terms = [(i, name, term) for i, part in enumerate(parts) for name, term in part.items()]
    numbers = torch.stack([term.float().cpu() for *_, term in terms]).tolist() if terms else []
    found: list[dict[str, float]] = [{} for _ in parts]
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
        timeline: Where the worker records what it does when.

    Attributes:
        counts: Of the evaluation under way.
        evaluation: What the last evaluation counted, for each stage up to this rank's last one.
        bytes_sent: Sent to other ranks for training so far.
        num_trained: Mini-batches trained on so far.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        outbox: Outbox,
        on_checkpoint: CheckpointHook,
        timeline: Timeline,
    ) -> None:
        self.stages = stages
        self._outbox = outbox
        self._on_checkpoint = on_checkpoint
        self.timeline = timeline
        self._unreported: Report | None = None
        self._losses: Losses = ()  # of the last completed step
        self.counts = Counts()
        self.evaluation: Losses = ()
        self.bytes_sent = self.num_trained = 0

    def complete(self, message: Message) -> Report | None:
        """Report on the step before ``message``: its earlier stages' losses come with it.

        To be called with every message, before `handle`.

        Returns:
            The report, or None if it was made before or there is nothing to report.
        """
        if self._unreported is None or message.mark is Mark.EVALUATION_END:
            return None
        self._losses = self._join(message.reports, self._unreported.losses)
        step, num_samples = self._unreported.step, self._unreported.num_samples
        self._unreported = None
        return Report.of(step, num_samples, self._losses)

    def handle(self, message: Message) -> None:
        """Do what a message asks, and pass it on."""
        if message.kind is Kind.TRAIN:
            assert message.target is not None
            self._unreported = Report(message.step, len(message.target), self._train(message))
            self.num_trained += 1
        elif message.kind is Kind.EVAL:
            self._evaluate(message)
        elif message.kind is Kind.BARRIER:
            self._pass_barrier(message)
        else:
            self._outbox.send(message)

    def _train(self, message: Message) -> Losses:
        """Forward, send on, learn: for each stage of this rank in turn.

        A stage learns before the next one of the same rank runs, so its activations are free by
        then: the peak memory of a rank is that of its largest stage, not of their sum.
        """
        features, target, carry = message.features, message.target, message.carry
        assert target is not None
        losses: list[dict[str, Tensor]] = []
        for stage in self.stages:
            try:
                with stage.random.active():
                    with self.timeline.during("forward", stage.index, message.step):
                        output = stage.forward(features)
                        onward = stage.hand_on(target, carry)
                    if stage is self.stages[-1]:
                        self.bytes_sent += self._outbox.send(
                            replace(message, features=output, carry=onward, reports=self._losses)
                        )
                    with self.timeline.during("learn", stage.index, message.step):
                        terms = stage.learn(target, carry, message.step)
                    losses.append({**terms, **_marked(stage.objective.observed)})
            except ScplError:
                raise  # it says enough by itself
            except Exception as error:
                raise stage.explain(error, features, message.step) from error
            features, carry = output, onward
        return tuple(losses)

    def _join(self, earlier: Losses, own: Losses) -> Losses:
        """Put together what earlier ranks and this one know of the same step."""
        return (*earlier, *own)

    def _evaluate(self, message: Message, *, pass_on: bool = True) -> None:
        features = message.features
        for index, stage in enumerate(self.stages):
            try:
                with self.timeline.during("evaluate", stage.index, message.step):
                    output = stage.infer(features)
                if pass_on and stage is self.stages[-1]:
                    self._outbox.send(replace(message, features=output))
                with self.timeline.during("evaluate", stage.index, message.step):
                    logits = stage.predict(output)
            except ScplError:
                raise  # it says enough by itself
            except Exception as error:
                raise stage.explain(error, features, message.step) from error
            if logits is not None:
                if message.target is not None:
                    _count(self.counts.stages[index], logits, message.target)
                if self.counts.keep and stage is self.stages[-1]:
                    self.counts.logits.append(logits)
            features = output

    def _pass_barrier(self, message: Message) -> None:
        """Act on this rank's state at exactly this point of the stream, and pass the mark on."""
        if message.mark is Mark.EVALUATION_END:
            counts = self._join(message.reports, tuple(self.counts.stages))
            message = replace(message, reports=counts)
            self.evaluation = message.reports
        else:
            message = replace(message, reports=self._losses)
        if message.mark is Mark.EVALUATION_BEGIN:
            self.counts = Counts([{} for _ in self.stages], keep=bool(message.note.get("keep")))
            message = replace(message, carry=self._share(message))
        self._outbox.send(message)
        if message.mark is Mark.CHECKPOINT:
            self._save(message)
        elif message.mark is Mark.EPOCH_END:
            for stage in self.stages:
                stage.guard.look()

    def _save(self, message: Message) -> None:
        for stage in self.stages:
            with self.timeline.during("snapshot", stage.index, message.step):
                self._on_checkpoint(stage, message)

    def _share(self, message: Message) -> Tree:
        """Let each stage's objective tell the next one what it needs for its predictions."""
        shared = message.carry
        for stage in self.stages:
            try:
                shared = stage.share(shared)
            except ScplError:
                raise
            except Exception as error:
                raise stage.explain(error, shared, message.step) from error
        return shared


def _count(counts: dict[str, Tensor], logits: Tensor, target: Tensor) -> None:
    """Add a batch: sums and counts, never means, so that ragged batches weigh right."""
    new = {
        "correct": (logits.argmax(1) == target).sum(),
        "loss": functional.cross_entropy(logits, target, reduction="sum").double(),
        "count": torch.full((), target.shape[0], device=logits.device),
    }
    for name, value in new.items():
        counts[name] = counts[name] + value if name in counts else value


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


class Line:
    """Hands messages to the worker, and follows the stream where this rank is not its source.

    Args:
        worker: Runs this rank's stages.
        inbox: Where messages come from; None on the first rank.
        outbox: Where they leave.

    Attributes:
        before_checkpoint: Called when a checkpoint's mark arrives, before the state is saved.
        stopped: Whether the stream has ended.
    """

    def __init__(self, worker: Worker, inbox: Receiver | None, outbox: Outbox) -> None:
        self.worker = worker
        self.position = Position()
        self.before_checkpoint: Callable[[], None] = lambda: None
        self.stopped = False
        self._inbox, self._outbox = inbox, outbox

    def process(self, message: Message) -> None:
        """Do what a message asks, pass it on, and count it."""
        if message.mark is Mark.CHECKPOINT:
            self.before_checkpoint()
        self.worker.handle(message)
        position = self.position
        if message.kind is Kind.TRAIN:
            position.step, position.batch = message.step, position.batch + 1
        elif message.mark is Mark.EPOCH_END:
            position.epoch, position.batch = position.epoch + 1, 0

    def feed(self, message: Message) -> Report | None:
        """Process a message that begins here: the first rank waits for nobody's losses."""
        self.process(message)
        return self.worker.complete(message)

    def follow_epoch(self) -> Iterator[Report]:
        """Work on what is received until an epoch's end mark.

        Raises:
            Interrupted: if the first rank ends the run.
        """
        mark = None
        listening = True
        while mark is not Mark.EPOCH_END:
            message, report = self._next()
            if report is not None and listening:
                try:
                    yield report
                except GeneratorExit:
                    # The caller has seen enough, but what is on its way must be learned.
                    listening = False
            self.process(message)
            mark = message.mark

    def follow_evaluation(self) -> None:
        """Work on what is received until the end mark of an evaluation."""
        mark = None
        while mark is not Mark.EVALUATION_END:
            message, _ = self._next()
            self.process(message)
            mark = message.mark

    def end_epoch(self) -> None:
        """Send the end mark of an epoch down the line."""
        if not self.stopped:
            self.process(Message(Kind.BARRIER, self.position.step, mark=Mark.EPOCH_END))

    def stop(self, reason: str) -> None:
        """End the stream: the last message of all."""
        note = {"last": True, "reason": reason}
        self.stopped = True
        self.worker.handle(Message(Kind.STOP, self.position.step, note=note))

    def close(self) -> None:
        """End the stream, or wait for its end; then wait until everything has left."""
        if self._inbox is None and not self.stopped:
            self.stop("")
        while not self.stopped:
            try:
                message, _ = self._next()
                self.process(message)
            except Interrupted:
                break
        self._outbox.close()

    def _next(self) -> tuple[Message, Report | None]:
        """Receive a message, and the report that it completes.

        Raises:
            Interrupted: at the end of the stream, which ends this rank's part, too.
        """
        assert self._inbox is not None
        message = self._inbox.receive()
        if message.kind is Kind.STOP:
            self.stopped = True
            self.worker.handle(message)
            raise Interrupted("The first rank ended the run", str(message.note.get("reason", "")))
        return message, self.worker.complete(message)
