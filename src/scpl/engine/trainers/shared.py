"""The stream where stages have replicas: each works on its share of every mini-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scpl.engine.channel import Distributor
from scpl.engine.messages import EvalBatch, LocalLoss, Losses, TrainBatch
from scpl.engine.ranks import ManyRanks
from scpl.engine.scores import Counts
from scpl.engine.shares import Share, connected
from scpl.engine.stage import Stage
from scpl.engine.timeline import Timeline
from scpl.engine.trainers.base import Trainer
from scpl.errors import InputError, ScplError
from scpl.methods.base import Objective
from scpl.partition.values import Tree
from scpl.seeding import derive_seed

__all__ = ["SharedStreamTrainer"]

Batch = TypeVar("Batch", TrainBatch, EvalBatch)
Computed: TypeAlias = "tuple[Tensor | None, LocalLoss, Tree]"


@final
class SharedStreamTrainer(Trainer):
    """Trains stages that learn from local objectives, together with other replicas of them.

    A stage computes the layers and heads of this rank's rows, and the objective of the whole
    mini-batch (see `Share`). BatchNorm is of the rows that a replica has; the running statistics
    that count are those of the first one. What a replica draws (dropout) depends on the seed, the
    stage, the replica and the step, so that a run goes on from what the first replica saved.

    Args:
        stages: Consecutive stages, in order.
        outbox: Where messages go on.
        timeline: Where it records what it does when.
        ranks: The ranks.
        seed: Seed of what is drawn.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        outbox: Distributor,
        timeline: Timeline,
        *,
        ranks: ManyRanks,
        seed: int,
    ) -> None:
        super().__init__(stages, outbox, timeline)
        self._distributor, self._seed = outbox, seed
        self._is_first, mesh = ranks.mesh.is_first, ranks.mesh
        self._share: Share | None = None
        self._replicas: list[Callable[[Callable[[], Computed]], Computed]]
        self._replicas = [_alone for _ in stages]
        self._averaged_bytes = 0  # of gradients, which a ring of ranks sends in each step
        if ranks.siblings is None:
            return
        self.saves = mesh.replica == 0  # all replicas are the same
        self._share = Share(mesh.replica, mesh.num_replicas, ranks.siblings, staged=ranks.staged)
        for place, stage in enumerate(stages):
            for module in stage.objective.modules():
                if isinstance(module, Objective):
                    module.whole = self._share.whole
            if stage.optimizer is not None:
                gradients = sum(p.nbytes for p in stage.parameters if p.requires_grad)
                others = mesh.num_replicas - 1
                self._averaged_bytes += 2 * others * gradients // mesh.num_replicas
                self._replicas[place] = DistributedDataParallel(
                    _Learner(stage),
                    device_ids=[stage.device] if stage.device.type == "cuda" else None,
                    process_group=ranks.siblings,
                    gradient_as_bucket_view=True,
                )

    def train(self, batch: TrainBatch, earlier: Losses) -> Losses:
        """Forward, send on, learn: for each stage of this rank in turn, from a share of the rows.

        Objectives get the whole target, and hand on what is of the whole mini-batch.
        """
        batch, step = self._take_share(batch), batch.step
        features, carry = batch.features, batch.carry
        losses: list[LocalLoss] = []
        for stage, replica in zip(self.stages, self._replicas, strict=True):
            features = stage.take(features)

            def compute(
                stage: Stage = stage, features: Tree = features, carry: Tree = carry
            ) -> Computed:
                with self.timeline.during("forward", stage.index, step):
                    output = stage.forward(features)
                    onward = stage.hand_on(batch.target, carry)
                if stage is self.stages[-1]:
                    on = replace(batch, features=output, carry=onward, losses=earlier)
                    self.bytes_sent += self.outbox.send(on)
                with self.timeline.during("learn", stage.index, step), self._made_whole(stage):
                    found, loss = stage.compute_loss(batch.target, carry)
                return loss, found, (output, onward)

            with stage.naming_errors(features, step), connected("Gradients"), stage.random.active():
                if self._share is not None:
                    place = stage.index, self._share.index, step
                    torch.manual_seed(derive_seed(self._seed, "replica", *place))
                loss, found, (features, carry) = replica(compute)
                with self.timeline.during("learn", stage.index, step):
                    stage.descend_from(loss, features, step)
            losses.append(found)
        if self._share is not None:
            self.bytes_sent += self._share.bytes_sent + self._averaged_bytes
            self._share.bytes_sent = 0
        return tuple(losses)

    def evaluate(self, batch: EvalBatch, counts: Counts) -> None:
        """Predict for a share of the rows; every replica counts what all of them predict."""
        super().evaluate(self._take_share(batch), counts)
        if self._share is not None:
            self._share.bytes_sent = 0  # what is counted is sent for training

    def prepare_evaluation(self) -> None:
        """Evaluate with the buffers (BatchNorm) that are saved: those of the first replica."""
        if self._share is not None:
            first = dist.get_global_rank(self._share.group, 0)
            for stage in self.stages:
                for buffer in (*stage.body.buffers(), *stage.objective.buffers()):
                    dist.broadcast(buffer, first, group=self._share.group)

    @contextmanager
    def _made_whole(self, stage: Stage) -> Iterator[None]:
        """Notice an objective that learns from a share of the rows as if they were all.

        Raises:
            InputError: if it never made anything whole.
        """
        share = self._share
        if share is None or stage.optimizer is None:
            yield
            return
        before = share.times_gathered
        try:
            yield
        except ScplError:
            raise
        except Exception as error:  # of sizes that do not match, perhaps
            if share.times_gathered > before:
                raise
            raise RuntimeError(
                f"{error} (before the objective called `self.whole(...)`: until then its features "
                f"are of {len(share.held)} of the {share.rows} samples that the target has)"
            ) from error
        if share.times_gathered == before:
            raise InputError(
                "An objective of a stage with replicas must compute its loss of all rows: what it "
                "makes of the features goes through `self.whole(...)` before it meets the target",
                f"That of stage {stage.index} ({type(stage.objective).__name__}) never called it",
                "Call it (see `scpl.methods.base.Objective.whole`), or leave `replicas` out",
            )

    def _take_share(self, batch: Batch) -> Batch:
        """Know which rows are worked on; the first rank gives the other replicas theirs."""
        if self._share is None:
            return batch
        self._share.rows = batch.rows
        if not self._is_first:
            return batch
        batch = replace(batch, whole_size=batch.rows)
        sent = self._distributor.share_out(batch)
        self.bytes_sent += sent if isinstance(batch, TrainBatch) else 0
        return self._distributor.own_share(batch)


class _Learner(nn.Module):
    """All that a stage learns with, as `DistributedDataParallel` wants it: in one module.

    Its forward pass is whatever the trainer does up to the loss: gradients are averaged from the
    moment when they are there.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.body, self.objective = stage.body, stage.objective

    def forward(self, compute: Callable[[], Computed]) -> Computed:
        return compute()


def _alone(compute: Callable[[], Computed]) -> Computed:
    """A stage with no other replicas, or with nothing to learn."""
    return compute()
