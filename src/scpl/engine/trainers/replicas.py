"""Data parallelism: every rank holds the whole network and learns from a share of each batch.

Batches travel down the line as for every other method: the first rank reads them, each takes its
rows and sends the rest on. ``DistributedDataParallel`` averages the gradients.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from scpl.engine.channel import Outbox
from scpl.engine.messages import Mark, Message
from scpl.engine.ranks import Control
from scpl.engine.stage import Stage
from scpl.engine.timeline import Timeline
from scpl.engine.worker import CheckpointHook, Losses, Worker
from scpl.errors import LinkError, ScplError
from scpl.methods.base import CrossEntropy
from scpl.partition.values import Tree, tree_map
from scpl.seeding import derive_seed

__all__ = ["ReplicatedWorker", "shares"]


def shares(rows: int, num_ranks: int) -> list[int]:
    """How many of ``rows`` rows each rank gets; the earlier ranks take the extra ones."""
    base, extra = divmod(rows, num_ranks)
    return [base + (rank < extra) for rank in range(num_ranks)]


class ReplicatedWorker(Worker):
    """Trains a whole network on a share of each mini-batch.

    What a replica draws (dropout) depends on the seed, its rank and the step, so that a run can be
    continued from the checkpoint that the first rank writes.

    Args:
        stages: The network as one stage.
        outbox: Where the rows of later ranks go.
        on_checkpoint: Called on the first rank when a checkpoint's barrier reaches it.
        timeline: Where the worker records what it does when.
        control: The ranks.
        seed: Seed of what is drawn.
        clip_norm: Clip the norm of the averaged gradient to this.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        outbox: Outbox,
        on_checkpoint: CheckpointHook,
        timeline: Timeline,
        *,
        control: Control,
        seed: int,
        clip_norm: float | None,
    ) -> None:
        super().__init__(stages, outbox, on_checkpoint, timeline)
        (self._stage,) = stages
        objective = self._stage.objective
        assert isinstance(objective, CrossEntropy)
        self._mesh, self._seed, self._clip_norm = control.mesh, seed, clip_norm
        self._group = control.new_group()
        self._network = nn.Sequential(self._stage.body, objective.classifier)
        device = self._stage.device
        self._replica = DistributedDataParallel(
            self._network,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=self._group,
            gradient_as_bucket_view=True,
        )
        # Torch reads annotations of a hook, but not those that are strings; a lambda has none.
        self._replica.register_comm_hook(None, lambda state, bucket: self._average(bucket))
        self._gradients_ready = 0.0

    def _train(self, message: Message) -> Losses:
        """Take this rank's rows, send the others on, and learn together with all ranks."""
        stage, step = self._stage, message.step
        features, target, weight = self._own_rows(message)
        stage.set_mode(training=True)
        try:
            with stage.random.active():
                torch.manual_seed(derive_seed(self._seed, "replica", self._mesh.rank, step))
                with self.timeline.during("forward", 0, step):
                    with stage.autocast():
                        logits = self._replica(features).float()
                    loss = functional.cross_entropy(logits, target) * weight
                stage.guard.check(loss, logits, step)
                begin = time.perf_counter()
                loss.backward()  # type: ignore[no-untyped-call]
                self._record_backward(begin, time.perf_counter(), step)
        except ScplError:
            raise  # it says enough by itself
        except Exception as error:
            if _is_lost(error):
                raise LinkError(
                    "All replicas must stay connected",
                    f"Gradients of step {step} could not be averaged: {str(error).splitlines()[0]}",
                ) from error
            raise stage.explain(error, features, step) from error
        with self.timeline.during("update", 0, step):
            if self._clip_norm is not None:
                nn.utils.clip_grad_norm_(stage.parameters, self._clip_norm)
            stage.update()
        return ({"cross_entropy": loss.detach() / self._mesh.num_ranks},)

    def _own_rows(self, message: Message) -> tuple[Tree, Tensor, float]:
        """Split a batch between this rank and the later ones.

        Returns:
            This rank's rows, their target, and what to multiply the mean loss of the rows with, so
            that the average over the ranks is the mean over the batch.
        """
        assert message.target is not None
        rank, num_ranks = self._mesh.rank, self._mesh.num_ranks
        rows = int(message.note.get("rows", len(message.target)))
        own = shares(rows, num_ranks)[rank]
        if not self._mesh.is_last:
            left = sum(shares(rows, num_ranks)[rank + 1 :])
            self.bytes_sent += self._outbox.send(
                replace(
                    message,
                    features=tree_map(lambda t: t[-max(left, 1) :], message.features),
                    target=message.target[-max(left, 1) :],
                    note={**message.note, "rows": rows},
                    reports=self._losses,
                )
            )
        # Every rank takes part in the averaging; one without a row repeats one, with weight zero.
        taken = max(own, 1)
        features = tree_map(lambda t: t[:taken], message.features)
        return features, message.target[:taken], own * num_ranks / rows

    def _average(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Average a bucket of gradients, and count what a ring of ranks sends for it."""
        ranks = self._mesh.num_ranks
        self.bytes_sent += 2 * (ranks - 1) * bucket.buffer().nbytes // ranks
        self._gradients_ready = time.perf_counter()
        return allreduce_hook(self._group, bucket)

    def _record_backward(self, begin: float, end: float, step: int) -> None:
        """Once the last bucket is full, a rank only waits for the average."""
        self.timeline.add("backward", 0, step, begin, self._gradients_ready)
        self.timeline.add("wait", 0, step, self._gradients_ready, end)

    def _join(self, earlier: Losses, own: Losses) -> Losses:
        """Add up what the ranks know of their rows."""
        if not earlier:
            return own
        return tuple(
            {
                name: reduce(torch.add, [part[name] for part in (before, mine) if name in part])
                for name in before | mine
            }
            for before, mine in zip(earlier, own, strict=True)
        )

    def _evaluate(self, message: Message, *, pass_on: bool = True) -> None:
        """Evaluate this rank's rows; to keep all predictions the last rank makes them."""
        if self.counts.keep:
            if self._mesh.is_last:
                super()._evaluate(message)
            else:
                self._outbox.send(message)
            return
        sent = self.bytes_sent
        features, target, weight = self._own_rows(message)
        self.bytes_sent = sent  # of training only
        if weight > 0:
            super()._evaluate(replace(message, features=features, target=target), pass_on=False)

    def _pass_barrier(self, message: Message) -> None:
        """Evaluate with the buffers (BatchNorm) that are saved: those of the first rank."""
        super()._pass_barrier(message)  # first, because later ranks join only when they have it
        if message.mark is Mark.EVALUATION_BEGIN:
            for buffer in self._network.buffers():
                dist.broadcast(buffer, 0, group=self._group)

    def _save(self, message: Message) -> None:
        """All replicas are the same: one writes."""
        if self._mesh.is_first:
            super()._save(message)


def _is_lost(error: Exception) -> bool:
    """Whether it is of the connection and not of the network's layers."""
    known = (dist.DistError, ConnectionError)
    return isinstance(error, known) or any(word in str(error) for word in ("gloo", "Gloo", "NCCL"))
