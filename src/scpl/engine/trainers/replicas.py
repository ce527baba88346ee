"""Data parallelism: every rank holds the whole network and learns from a share of each batch.

Batches travel from rank to rank as for every other method: the first rank reads them, each takes
its share and sends the rest on. ``DistributedDataParallel`` averages the gradients, those of one
mini-batch or of several together.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import reduce
from typing import Any, TypeAlias, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from scpl.engine.channel import Outbox
from scpl.engine.messages import EvalBatch, LocalLoss, Losses, TrainBatch
from scpl.engine.ranks import ManyRanks
from scpl.engine.scores import Counts, joined
from scpl.engine.shares import connected, shares
from scpl.engine.stage import Stage
from scpl.engine.timeline import Timeline
from scpl.engine.trainers.base import StageCounts, Trainer
from scpl.methods import DataParallel
from scpl.methods.base import CrossEntropy, precise
from scpl.partition.values import tree_map
from scpl.seeding import derive_seed

__all__ = ["ReplicaTrainer"]

Batch = TypeVar("Batch", TrainBatch, EvalBatch)
Average: TypeAlias = Callable[[GradBucket], torch.futures.Future[Tensor]]


@final
class ReplicaTrainer(Trainer):
    """Trains a whole network on a share of each mini-batch.

    What a replica draws (dropout) depends on the seed, its rank and the step, so that a run can be
    continued from the checkpoint that the first rank writes.

    Args:
        stages: The network as one stage.
        outbox: Where the samples of later ranks go.
        timeline: Where it records what it does when.
        method: In which type gradients are averaged, and of how many mini-batches.
        ranks: The ranks.
        seed: Seed of what is drawn.
        clip_norm: Clip the norm of the averaged gradient to this.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        outbox: Outbox,
        timeline: Timeline,
        *,
        method: DataParallel,
        ranks: ManyRanks,
        seed: int,
        clip_norm: float | None,
    ) -> None:
        super().__init__(stages, outbox, timeline)
        (self._stage,) = stages
        objective = self._stage.objective
        assert isinstance(objective, CrossEntropy)
        self._method, self._mesh, self._seed, self._clip_norm = method, ranks.mesh, seed, clip_norm
        self._task = objective.task
        self.saves = ranks.mesh.is_first  # all replicas are the same
        self._group = ranks.new_group()
        self._network = nn.Sequential(self._stage.body, objective.classifier)
        device = self._stage.device
        self._replica = DistributedDataParallel(
            self._network,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=self._group,
            gradient_as_bucket_view=True,
        )
        # Torch holds the hook where the garbage collector does not look: with a hook that holds the
        # replica, it and its network would never be freed. Torch reads annotations of a hook, but
        # not those that are strings; a lambda has none.
        average = weakref.WeakMethod(self._average)
        self._replica.register_comm_hook(None, lambda state, bucket: _alive(average)(bucket))
        self._gradients_ready = 0.0
        self._averages: list[tuple[dist.Work, Tensor, Tensor]] = []
        self._step = self._pending = 0
        self._num_loads = self._stage.num_loads
        self._buffers: list[Tensor] = []

    def train(self, batch: TrainBatch, earlier: Losses) -> Losses:
        """Take this rank's share, send the others on, and learn together with all ranks."""
        stage, step = self._stage, batch.step
        self._step = step
        own, weight, rest = self._take_share(batch)
        if rest is not None:
            self.bytes_sent += self.outbox.send(replace(rest, losses=earlier))
        stage.set_mode(training=True)
        self._begin_batch()
        averaging = self._pending == self._method.accumulation
        with (
            stage.naming_errors(own.features, step),
            connected("Gradients"),
            stage.random.active(),
        ):
            torch.manual_seed(derive_seed(self._seed, "replica", self._mesh.rank, step))
            with nullcontext() if averaging else self._replica.no_sync():
                with self.timeline.during("forward", 0, step):
                    with stage.autocast():
                        logits = precise(self._replica(own.features))
                    loss = self._task.loss(logits, own.target) * weight
                stage.guard.check(loss, logits, step)
                begin = time.perf_counter()
                stage.backward(loss)
            if averaging:
                self._finish_averages()
                self._record_backward(begin, time.perf_counter(), step)
            else:
                self.timeline.add("backward", 0, step, begin, time.perf_counter())
        if averaging:
            self._update(step)
        return (LocalLoss({self._task.loss_name: loss.detach() / self._mesh.num_ranks}),)

    def end_epoch(self) -> None:
        """Learn from the mini-batches that are left, too few for an update of the usual kind."""
        if not self._pending:
            return
        step, begin = self._step, time.perf_counter()
        with self._stage.naming_errors(None, step), connected("Gradients"):
            gradients = [p.grad for p in self._stage.parameters if p.grad is not None]
            together = torch.cat([gradient.reshape(-1) for gradient in gradients])
            self._begin_average(together)
            self._finish_averages()
            parts = torch.split(together, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        self.timeline.add("wait", 0, step, begin, time.perf_counter())
        self._update(step)

    @property
    def pending(self) -> int:
        """Mini-batches whose gradients wait to be averaged."""
        return self._pending

    def snapshot(self, stage: Stage, step: int) -> dict[str, Any]:
        """Copy the state after the last update: only buffers (BatchNorm) have changed since."""
        if not self._pending:
            return stage.snapshot(step)
        now = [buffer.clone() for buffer in self._network.buffers()]
        self._set_buffers(self._buffers)
        try:
            return stage.snapshot(step)
        finally:
            self._set_buffers(now)

    def join_losses(self, earlier: Losses, own: Losses) -> Losses:
        """Add up what the ranks know of their shares."""
        if not earlier:
            return own
        return (LocalLoss(_sums(earlier[0].terms, own[0].terms)),)

    def prepare_evaluation(self) -> None:
        """Evaluate with the buffers (BatchNorm) that are saved: those of the first rank."""
        for buffer in self._network.buffers():
            dist.broadcast(buffer, 0, group=self._group)

    def evaluate(self, batch: EvalBatch, counts: Counts) -> None:
        """Evaluate this rank's share; to keep all predictions the last rank makes them."""
        if counts.keep_logits:
            if self._mesh.is_last:
                self.infer(batch, counts)
            else:
                self.outbox.send(batch)
            return
        own, weight, rest = self._take_share(batch)
        if rest is not None and rest.target is not None and batch.target is not None:
            first = batch.first + len(batch.target) - len(rest.target)
            self.outbox.send(replace(rest, first=first))
        if weight > 0:
            self.infer(own, counts, pass_on=False)

    def join_counts(self, earlier: StageCounts, own: StageCounts) -> StageCounts:
        """Add up what the ranks counted of their shares."""
        return (joined(earlier[0], own[0]),) if earlier else own

    def _take_share(self, batch: Batch) -> tuple[Batch, float, Batch | None]:
        """Split a batch between this rank and the later ones.

        Returns:
            This rank's samples; what to multiply their mean loss with, so that the average over
            the ranks is the mean over the batch; the samples of later ranks, if there are any.
        """
        assert batch.target is not None
        rank, num_ranks = self._mesh.rank, self._mesh.num_ranks
        whole = batch.rows
        per_rank = shares(whole, num_ranks)
        rest = None
        if not self._mesh.is_last:
            # Every rank takes part in the averaging; one without a sample repeats one, with
            # weight zero.
            left = max(sum(per_rank[rank + 1 :]), 1)
            rest = replace(
                batch,
                features=tree_map(lambda tensor: tensor[-left:], batch.features),
                target=batch.target[-left:],
                whole_size=whole,
            )
        taken = max(per_rank[rank], 1)
        own = replace(
            batch,
            features=tree_map(lambda tensor: tensor[:taken], batch.features),
            target=batch.target[:taken],
        )
        return own, per_rank[rank] * num_ranks / whole, rest

    def _begin_batch(self) -> None:
        """Count a mini-batch; what a checkpoint has replaced meanwhile is no longer waited for."""
        if self._num_loads != self._stage.num_loads:
            self._num_loads, self._pending = self._stage.num_loads, 0
            self._network.zero_grad(set_to_none=True)
        if not self._pending and self._method.accumulation > 1:
            self._buffers = [buffer.clone() for buffer in self._network.buffers()]
        self._pending += 1

    def _set_buffers(self, values: Sequence[Tensor]) -> None:
        for buffer, value in zip(self._network.buffers(), values, strict=True):
            buffer.copy_(value)

    def _average(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Begin to average a bucket of gradients; it holds their average after the last one."""
        self._gradients_ready = time.perf_counter()
        buffer = bucket.buffer()
        averaged: torch.futures.Future[Tensor] = (
            self._begin_average(buffer).get_future().then(lambda done: buffer)
        )
        return averaged

    def _begin_average(self, gradients: Tensor) -> dist.Work:
        """Begin to average gradients, and count what a ring of ranks sends for them."""
        ranks, shared = self._mesh.num_ranks, gradients
        if self._method.compress_gradients == "bfloat16":
            shared = gradients.to(torch.bfloat16)
        shared.div_(ranks * self._pending)  # before they are added, which may overflow
        self.bytes_sent += 2 * (ranks - 1) * shared.nbytes // ranks
        work: dist.Work | None = dist.all_reduce(shared, group=self._group, async_op=True)
        assert work is not None, "this rank is in the group"
        self._averages.append((work, shared, gradients))
        return work

    def _finish_averages(self) -> None:
        """Wait until all averages are where the gradients were.

        The replica waits for its futures, which in older versions of torch know nothing of the
        streams on which gloo brings averages back (pytorch/pytorch#155714).
        """
        for work, shared, gradients in self._averages:
            work.wait()
            if shared is not gradients:
                gradients.copy_(shared)
        self._averages.clear()

    def _update(self, step: int) -> None:
        with self.timeline.during("update", 0, step):
            self._stage.update(self._clip_norm, self._pending)
        self._pending = 0

    def _record_backward(self, begin: float, end: float, step: int) -> None:
        """Once the last bucket is full, a rank only waits for the average."""
        self.timeline.add("backward", 0, step, begin, self._gradients_ready)
        self.timeline.add("wait", 0, step, self._gradients_ready, end)


def _alive(method: weakref.WeakMethod[Any]) -> Average:
    found: Average | None = method()
    assert found is not None, "the replica calls its hook, so it is there"
    return found


def _sums(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add scalars by name."""
    return {
        name: reduce(torch.add, [part[name] for part in (one, other) if name in part])
        for name in {**one, **other}
    }
