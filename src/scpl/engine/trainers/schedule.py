"""GPipe, 1F1B and naive model parallelism: gradients go back up through the ranks.

Batches, evaluations, checkpoints and the end of the run travel from rank to rank as for every other
method; only what a rank does with a training batch differs. Its target goes on to the last rank at
once, and then a schedule of ``torch.distributed.pipelining`` moves activations down and gradients
up, micro-batch by micro-batch, in a process group of its own.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from scpl.engine.channel import Outbox
from scpl.engine.messages import LocalLoss, Losses, ScheduledBatch, TrainBatch
from scpl.engine.precision import Precision
from scpl.engine.ranks import ManyRanks
from scpl.engine.stage import Stage
from scpl.engine.timeline import Timeline
from scpl.engine.trainers.base import Trainer
from scpl.errors import InputError, LinkError, StageError
from scpl.methods import CutBackpropagation
from scpl.methods.base import CrossEntropy, precise
from scpl.partition.values import TensorSpec, Tree, tensors_of
from scpl.tasks import Task

__all__ = ["RankModule", "RecordedStage", "ScheduleTrainer", "fits", "micro_batches"]

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


@final
class ScheduleTrainer(Trainer):
    """Trains this rank's stages with a schedule over all ranks.

    Args:
        stages: Consecutive stages, in order.
        outbox: Where targets and evaluations go.
        timeline: Where it records what it does when.
        method: The schedule and the number of micro-batches.
        ranks: The ranks.
        clip_norm: Clip the norm of the whole network's gradient to this.
        precision: Types of the forward pass, under autocast also of what crosses a cut, and of what
            crosses it otherwise: values, and the gradients that come back.
        task: What the outputs mean.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        outbox: Outbox,
        timeline: Timeline,
        *,
        method: CutBackpropagation,
        ranks: ManyRanks,
        clip_norm: float | None,
        precision: Precision,
        task: Task,
    ) -> None:
        super().__init__(stages, outbox, timeline)
        self._task = task
        self._method, self._mesh = method, ranks.mesh
        if not fits(method.schedule, method.slices, self._mesh.num_ranks):
            raise InputError(
                f"{method.name} on {self._mesh.num_ranks} processes needs a multiple of "
                f"{self._mesh.num_ranks} micro-batches",
                f"Got {method.slices}",
                f"Pass for instance {2 * self._mesh.num_ranks}",
            )
        self._group = ranks.new_group()
        self._clip_norm = clip_norm
        narrow = precision.send_as
        if narrow is None and precision.compute != torch.float32:
            narrow = precision.compute
        self._module = RankModule(stages, narrow)
        self._schedules: OrderedDict[Any, tuple[RecordedStage, Any, tuple[TensorSpec, ...]]]
        self._schedules = OrderedDict()  # the latest used last

    def train(self, batch: TrainBatch, earlier: Losses) -> Losses:
        """Send the target on, run the schedule, update."""
        inputs, target, step = tensors_of(batch.features), batch.target, batch.step
        count = micro_batches(len(target), self._method.slices)
        if isinstance(batch, ScheduledBatch):
            specs = batch.specs
        else:  # it begins here
            specs = tuple(TensorSpec.of(tensor.chunk(count)[0]) for tensor in inputs)
        part, schedule, onward = self._schedule_for(count, specs)
        self.bytes_sent += self.outbox.send(
            ScheduledBatch(step, None, target, losses=earlier, specs=onward)
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
            own = (LocalLoss({self._task.loss_name: loss}),)
        if self._clip_norm is not None:
            self._clip(self._clip_norm)
        for stage in self.stages:
            stage.update(None)
        return own

    def _clip(self, limit: float) -> None:
        """Scale all gradients as if one process held them."""
        gradients = [p.grad for s in self.stages for p in s.parameters if p.grad is not None]
        square = nn.utils.get_total_norm(gradients).to(self.stages[0].device) ** 2
        dist.all_reduce(square, group=self._group)
        scale = (limit / (square.sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)

    def _schedule_for(
        self, count: int, specs: tuple[TensorSpec, ...]
    ) -> tuple[RecordedStage, Any, tuple[TensorSpec, ...]]:
        """The schedule for micro-batches of this form, and the form of what this rank sends on.

        The last batch of an epoch may be smaller than others, and texts differ in length; if it
        has too few equal slices for the schedule, GPipe gives the same gradients. Torch would find
        the shapes by running layers in training mode, which changes their state.
        """
        key = (count, specs)
        if key in self._schedules:
            self._schedules.move_to_end(key)
            return self._schedules[key]
        outputs = self._outputs(specs)
        part = RecordedStage(
            self._module,
            self._mesh.rank,
            self._mesh.num_ranks,
            self.stages[0].device,
            input_args=self._examples(specs, attached=not self._mesh.is_first),
            output_args=self._examples(outputs, attached=True),
            group=self._group,
            timeline=self.timeline,
            stage=self.stages[0],
        )
        wanted, num_ranks = self._method.schedule, self._mesh.num_ranks
        kind = get_schedule_class(wanted if fits(wanted, count, num_ranks) else "GPipe")
        several = issubclass(kind, PipelineScheduleMulti)
        schedule = kind([part] if several else part, count, loss_fn=self._task.loss)
        self._schedules[key] = (part, schedule, tuple(outputs))
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


class RankModule(nn.Module):
    """This rank's layers as one module, with the classifier at the end."""

    def __init__(self, stages: Sequence[Stage], narrow: torch.dtype | None) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(stage.body for stage in stages)
        objective = stages[-1].objective
        self.classifier = objective.classifier if isinstance(objective, CrossEntropy) else None
        self.narrow = narrow
        # Values that were rounded on their way are read in the type of the network again.
        self.wide = next((p.dtype for p in self.bodies.parameters()), torch.float32)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute logits in at least float32, or features in the type that crosses the cut.

        Raises:
            InputError: if the features are neither a tensor nor a tuple of tensors.
        """
        if self.narrow is not None:
            inputs = tuple(t.to(self.wide) if t.dtype == self.narrow else t for t in inputs)
        features: Tree = inputs[0] if len(inputs) == 1 else inputs
        for body in self.bodies:
            features = body(features)
        if self.classifier is not None:
            return precise(self.classifier(features))
        if isinstance(features, Tensor):
            return self._prepared(features)
        if not isinstance(features, tuple) or not all(isinstance(t, Tensor) for t in features):
            raise InputError(
                "With a schedule, what crosses a cut must be a tensor or a tuple of tensors",
                f"Got {type(features).__name__}",
                "Cut elsewhere, or use a method that cuts gradients",
            )
        return tuple(map(self._prepared, features))

    def _prepared(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.contiguous()
        if self.narrow is not None:
            # The lowest float32, of which masks are made, would become infinite.
            ends = torch.finfo(self.narrow)
            within = tensor.clamp(ends.min, ends.max).to(self.narrow)
            tensor = torch.where(tensor.isfinite(), within, tensor.to(self.narrow))
        # The next rank sends a gradient for every such value; one that frozen layers made has
        # nobody to use it.
        if torch.is_grad_enabled() and not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()
        return tensor.contiguous()


class RecordedStage(PipelineStage):
    """Records when it computes, and counts what it sends."""

    def __init__(self, *args: Any, timeline: Timeline, stage: Stage, **options: Any) -> None:
        super().__init__(*args, **options)
        self.failed: StageError | None = None
        self._timeline, self._stage = timeline, stage
        self._step, self._idle_since, self._bytes = 0, 0.0, 0
        self._held: list[Tensor] = []

    def begin(self, step: int) -> None:
        """A training step begins."""
        self._step, self._idle_since = step, time.perf_counter()

    def end(self) -> None:
        """It ends, and all is sent; what is left of it was waiting."""
        self._held.clear()
        self._wait_until(time.perf_counter())

    def take_bytes(self) -> int:
        """Bytes sent since the last call."""
        taken, self._bytes = self._bytes, 0
        return taken

    def forward_one_chunk(self, *args: Any, **options: Any) -> Any:
        """Compute one micro-batch."""
        return self._record("forward", super().forward_one_chunk, *args, **options)

    def backward_one_chunk(self, *args: Any, **options: Any) -> Any:
        """Compute one micro-batch's gradients."""
        return self._record("backward", super().backward_one_chunk, *args, **options)

    def backward_weight_one_chunk(self, *args: Any, **options: Any) -> Any:
        """Compute the half of the gradients that nobody waits for."""
        return self._record("backward", super().backward_weight_one_chunk, *args, **options)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """List what goes down."""
        return self._counted(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """List what goes up."""
        return self._counted(super().get_bwd_send_ops(bwd_chunk_id))

    def _counted(self, operations: list[dist.P2POp]) -> list[dist.P2POp]:
        for operation in operations:
            # Gradients of maps may lie in memory as the maps of a convolution do. gloo reads a
            # buffer until it is sent, and does not hold it.
            operation.tensor = operation.tensor.contiguous()
            self._held.append(operation.tensor)
            self._bytes += operation.tensor.nbytes
        return operations

    def _record(self, activity: str, work: Any, *args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        self._wait_until(begin)
        try:
            result = work(*args, **options)
        except Exception as error:
            # Torch says the same of every error of a layer; the cause is the error itself.
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            self.failed = self._stage.explain(cause, tensors_of(list(args[1:2])), self._step)
            self.failed.__cause__ = cause
            raise
        self._idle_since = time.perf_counter()
        self._timeline.add(activity, self._stage.index, self._step, begin, self._idle_since)
        return result

    def _wait_until(self, now: float) -> None:
        if now - self._idle_since > 1e-4:
            self._timeline.add("wait", self._stage.index, self._step, self._idle_since, now)
