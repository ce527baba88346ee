"""The stream: every stage sends its output on at once, and learns from its own objective."""

from __future__ import annotations

from dataclasses import replace

from scpl.engine.messages import LocalLoss, Losses, TrainBatch
from scpl.engine.trainers.base import Trainer

__all__ = ["StreamTrainer"]


class StreamTrainer(Trainer):
    """Trains stages that learn from local objectives."""

    def train(self, batch: TrainBatch, earlier: Losses) -> Losses:
        """Forward, send on, learn: for each stage of this rank in turn.

        A stage learns before the next one of the same rank runs, so its activations are free by
        then: the peak memory of a rank is that of its largest stage, not of their sum.
        """
        features, carry = batch.features, batch.carry
        losses: list[LocalLoss] = []
        for stage in self.stages:
            features = stage.take(features)
            with stage.naming_errors(features, batch.step), stage.random.active():
                with self.timeline.during("forward", stage.index, batch.step):
                    output = stage.forward(features)
                    onward = stage.hand_on(batch.target, carry)
                if stage is self.stages[-1]:
                    self.bytes_sent += self.outbox.send(
                        replace(batch, features=output, carry=onward, losses=earlier)
                    )
                with self.timeline.during("learn", stage.index, batch.step):
                    losses.append(stage.learn(batch.target, carry, batch.step))
            features, carry = output, onward
        return tuple(losses)
