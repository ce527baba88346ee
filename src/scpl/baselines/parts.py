"""What a schedule of ``torch.distributed.pipelining`` runs on one rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from scpl.errors import InputError, StageError
from scpl.message import Tree, tensors_of
from scpl.objectives import CrossEntropy
from scpl.stage import Stage
from scpl.timeline import Timeline

__all__ = ["Part", "RecordedStage"]


class Part(nn.Module):
    """This rank's layers as one module, with the classifier at the end of the line."""

    def __init__(self, stages: Sequence[Stage], precision: torch.dtype) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(stage.body for stage in stages)
        objective = stages[-1].objective
        self.classifier = objective.classifier if isinstance(objective, CrossEntropy) else None
        self.precision = precision

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute logits in float32, or features in the type that crosses the cut.

        Raises:
            InputError: if the features are neither a tensor nor a tuple of tensors.
        """
        features: Tree = inputs[0] if len(inputs) == 1 else inputs
        for body in self.bodies:
            features = body(features)
        if self.classifier is not None:
            logits: Tensor = self.classifier(features).float()
            return logits
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
        return (tensor.to(self.precision) if tensor.is_floating_point() else tensor).contiguous()


class RecordedStage(PipelineStage):
    """Records when it computes, and counts what it sends."""

    def __init__(self, *args: Any, timeline: Timeline, stage: Stage, **options: Any) -> None:
        super().__init__(*args, **options)
        self.failed: StageError | None = None
        self._timeline, self._stage = timeline, stage
        self._step, self._idle_since, self._bytes = 0, 0.0, 0

    def begin(self, step: int) -> None:
        """A training step begins."""
        self._step, self._idle_since = step, time.perf_counter()

    def end(self) -> None:
        """It ends; what is left of it was waiting."""
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
        self._bytes += sum(operation.tensor.nbytes for operation in operations)
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
