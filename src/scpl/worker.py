"""The loop of one rank: receive, forward, send on, learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from scpl.errors import ScplError
from scpl.link import Outbox
from scpl.message import OBSERVED, Kind, Mark, Message, Tree
from scpl.stage import Stage
from scpl.timeline import Timeline

__all__ = ["CheckpointHook", "Counts", "Losses", "Report", "Worker"]

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
