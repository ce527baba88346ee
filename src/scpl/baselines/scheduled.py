"""GPipe, 1F1B and naive model parallelism: gradients go back up through the ranks.

Batches, evaluations, checkpoints and the end of the run travel down the line as for every other
method; only what a rank does with a training batch differs. Its target goes on to the last rank at
once, and then a schedule of ``torch.distributed.pipelining`` moves activations down and gradients
up, micro-batch by micro-batch, in a process group of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class
from torch.nn import functional

from scpl.baselines.parts import Part, RecordedStage
from scpl.control import Control
from scpl.errors import InputError, LinkError
from scpl.link import Outbox
from scpl.message import Message, TensorSpec, tensors_of
from scpl.methods import MicroBatched
from scpl.stage import Stage
from scpl.timeline import Timeline
from scpl.worker import CheckpointHook, Losses, Worker

__all__ = ["ScheduledWorker", "fits", "micro_batches"]

KEPT_SCHEDULES = 16
"""Schedules of batch forms that are kept: each holds a buffer for every micro-batch."""


def micro_batches(rows: int, wanted: int) -> int:
    """The largest number of equal micro-batches of ``rows`` rows that is at most ``wanted``."""
    return next(n for n in range(min(wanted, rows), 0, -1) if rows % n == 0)


def fits(schedule: str, count: int, num_ranks: int) -> bool:
    """Whether a schedule can run this number of micro-batches on this number of ranks."""
    if schedule == "1F1B":
        return count >= num_ranks
    if schedule == "InterleavedZeroBubble":
        return count % max(1, count // num_ranks) == 0
    return True


class ScheduledWorker(Worker):
    """Trains this rank's stages with a schedule over all ranks.

    Args:
        stages: Consecutive stages, in order.
        outbox: Where targets, evaluations and marks go.
        on_checkpoint: Called for every stage when a checkpoint's barrier reaches it.
        timeline: Where the worker records what it does when.
        method: The schedule and the number of micro-batches.
        control: The ranks.
        clip_norm: Clip the norm of the whole network's gradient to this.
        precision: Type of the forward pass, and of what crosses a cut.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        outbox: Outbox,
        on_checkpoint: CheckpointHook,
        timeline: Timeline,
        *,
        method: MicroBatched,
        control: Control,
        clip_norm: float | None,
        precision: torch.dtype,
    ) -> None:
        super().__init__(stages, outbox, on_checkpoint, timeline)
        self._method, self._mesh = method, control.mesh
        if not fits(method.schedule, method.num_micro_batches, self._mesh.num_ranks):
            raise InputError(
                f"{method.name} on {self._mesh.num_ranks} processes needs a multiple of "
                f"{self._mesh.num_ranks} micro-batches",
                f"Got {method.num_micro_batches}",
                f"Pass for instance {2 * self._mesh.num_ranks}",
            )
        self._group = control.new_group()
        self._clip_norm = clip_norm
        self._module = Part(stages, precision)
        self._schedules: OrderedDict[Any, tuple[RecordedStage, Any, tuple[TensorSpec, ...]]]
        self._schedules = OrderedDict()  # the latest used last

    def _train(self, message: Message) -> Losses:
        """Send the target on, run the schedule, update."""
        inputs, target, step = tensors_of(message.features), message.target, message.step
        assert target is not None
        specs = map(TensorSpec.of, inputs) if self._mesh.is_first else _specs(message)
        part, schedule, onward = self._schedule_for(len(target), tuple(specs))
        note = {**message.note, "specs": [[str(s.dtype), *s.shape] for s in onward]}
        self.bytes_sent += self._outbox.send(
            replace(message, features=None, note=note, reports=self._losses)
        )
        for stage in self.stages:
            stage.set_mode(training=True)
        part.begin(step)
        losses: list[Tensor] = []
        first = self.stages[0]
        try:
            with first.random.active(), first.autocast():
                schedule.step(
                    *inputs,
                    **({"target": target, "losses": losses} if self._mesh.is_last else {}),
                    return_outputs=False,
                )
        except RuntimeError as error:  # not of the layers, which have been explained
            if part.failed is not None:
                raise part.failed from part.failed.__cause__
            raise LinkError(
                "The ranks of a schedule must stay connected",
                f"A micro-batch of step {step} got lost: {str(error).splitlines()[0]}",
            ) from error
        part.end()
        self.bytes_sent += part.take_bytes()
        with self.timeline.during("update", first.index, step):
            return self._update(losses, step)

    def _update(self, losses: list[Tensor], step: int) -> Losses:
        own: Losses = ()
        if self._mesh.is_last:
            loss = torch.stack(losses).mean().detach()
            self.stages[-1].guard.check(loss, None, step)
            own = ({"cross_entropy": loss},)
        if self._clip_norm is not None:
            self._clip(self._clip_norm)
        for stage in self.stages:
            stage.update()
        return own

    def _clip(self, limit: float) -> None:
        """Scale all gradients as if one process held them."""
        gradients = [p.grad for s in self.stages for p in s.parameters if p.grad is not None]
        square = nn.utils.get_total_norm(gradients) ** 2
        dist.all_reduce(square, group=self._group)
        scale = (limit / (square.sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)

    def _schedule_for(
        self, rows: int, specs: tuple[TensorSpec, ...]
    ) -> tuple[RecordedStage, Any, tuple[TensorSpec, ...]]:
        """The schedule for batches of this form, and the form of what this rank sends on.

        The last batch of an epoch may be smaller than others, and texts differ in length; if it
        has too few equal slices for the schedule, GPipe gives the same gradients. Torch would find
        the shapes by running layers in training mode, which changes their state.
        """
        key = (rows, specs)
        if key in self._schedules:
            self._schedules.move_to_end(key)
            return self._schedules[key]
        count = micro_batches(rows, self._method.num_micro_batches)
        slices = [TensorSpec((rows // count, *spec.shape[1:]), spec.dtype) for spec in specs]
        outputs = self._outputs(slices)
        part = RecordedStage(
            self._module,
            self._mesh.rank,
            self._mesh.num_ranks,
            self.stages[0].device,
            input_args=self._examples(slices, attached=not self._mesh.is_first),
            output_args=self._examples(outputs, attached=True),
            group=self._group,
            timeline=self.timeline,
            stage=self.stages[0],
        )
        wanted, num_ranks = self._method.schedule, self._mesh.num_ranks
        kind = get_schedule_class(wanted if fits(wanted, count, num_ranks) else "GPipe")
        several = issubclass(kind, PipelineScheduleMulti)
        schedule = kind([part] if several else part, count, loss_fn=_mean_cross_entropy)
        onward = tuple(TensorSpec((rows, *spec.shape[1:]), spec.dtype) for spec in outputs)
        self._schedules[key] = (part, schedule, onward)
        if len(self._schedules) > KEPT_SCHEDULES:
            self._schedules.popitem(last=False)
        return self._schedules[key]

    def _outputs(self, inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
        """Run this rank's layers on zeros, without a trace, to see what comes out."""
        first = self.stages[0]
        for stage in self.stages:
            stage.set_mode(training=False)
        with torch.no_grad(), first.random.active(), first.autocast():
            found = self._module(*(spec.empty(first.device).zero_() for spec in inputs))
        return [TensorSpec.of(tensor) for tensor in tensors_of(found)]

    def _examples(self, specs: Sequence[TensorSpec], *, attached: bool) -> tuple[Tensor, ...]:
        device = self.stages[0].device
        return tuple(
            spec.empty(device).requires_grad_(attached and spec.dtype.is_floating_point)
            for spec in specs
        )


def _mean_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return functional.cross_entropy(logits, target)


def _specs(message: Message) -> list[TensorSpec]:
    """What the rank before will send."""
    return [
        TensorSpec(tuple(shape), getattr(torch, name.removeprefix("torch.")))
        for name, *shape in message.note["specs"]
    ]
