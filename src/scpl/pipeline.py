"""The facade: train, evaluate, predict, checkpoint and export a partitioned network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from scpl.checkpoint import CheckpointWriter, intact_steps, read_manifest, read_part
from scpl.control import Control, connect
from scpl.errors import DataError, InputError, Interrupted, NonFiniteError
from scpl.link import open_links
from scpl.mesh import Mesh
from scpl.message import Kind, Mark, Message
from scpl.methods.base import Method, Site
from scpl.objectives import Objective
from scpl.partition import Partition
from scpl.randomness import derive_seed
from scpl.scores import Scores
from scpl.source import Batches, Source, blame_data, remaining
from scpl.stage import OptimizerFactory, SchedulerFactory, Stage, StageOptions
from scpl.timeline import Timeline
from scpl.worker import Report, Worker

__all__ = ["Pipeline"]


class Pipeline:
    """Trains the stages of a network, each from its own objective.

    Args:
        parts: The network, cut by `scpl.split`.
        method: Which objective each stage gets.
        optimizer: Builds one stage's optimizer from its parameters.
        scheduler: Builds the schedule of one stage's optimizer; stepped once per mini-batch.
        clip_norm: Clip the gradient norm of every stage to this.
        precision: ``torch.bfloat16`` computes forward passes in mixed precision.
        device: Where this rank computes.
        seed: Seed of the objectives' parameters and of every stage's random state.
        checkpoints: Folder for checkpoints.
        keep: How many checkpoints to keep.
        mesh: Which rank hosts which stages; default: all of them here.
        control: The tie between the ranks, if it exists already; default: made from `mesh`.
        depth: Messages in flight on each link, at least 2.

    Raises:
        InputError: if method, network and mesh do not fit together.
    """

    def __init__(
        self,
        parts: Partition,
        method: Method,
        optimizer: OptimizerFactory,
        *,
        scheduler: SchedulerFactory | None = None,
        clip_norm: float | None = None,
        precision: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        checkpoints: Path | str | None = None,
        keep: int = 2,
        mesh: Mesh | None = None,
        control: Control | None = None,
        depth: int = 2,
    ) -> None:
        self.parts = parts if method.cuts_gradients else parts.merged()
        self.method = method
        self.device = torch.device(device)
        self.control = control or connect(mesh or Mesh(), self.device)
        self.mesh = self.control.mesh
        self.step = self.epoch = self.batch = 0
        if parts.num_outputs != method.num_classes:
            raise InputError(
                "The network must have one output per class",
                f"Got {parts.num_outputs} outputs for {method.num_classes} classes",
                "Build the network for this data set, or pass the right num_classes",
            )
        options = StageOptions(optimizer, scheduler, clip_norm, precision)
        hosted = self.mesh.hosted(self.parts.num_stages)
        self.stages = [self._build_stage(index, options, seed) for index in hosted]
        self.timeline = Timeline(self.mesh.rank)
        self.before_checkpoint: Callable[[], None] = lambda: None
        """Called when a checkpoint's mark arrives, before the state is saved."""
        self._inbox, self._outbox = open_links(
            self.control, self.timeline, hosted, depth, self.device
        )
        self._source = Source(method.num_classes, self.device)
        self._worker = Worker(self.stages, self._outbox, self._write_part, self.timeline)
        self._stopped = False
        self._folder = None if checkpoints is None else Path(checkpoints)
        self._writer = (
            CheckpointWriter(self._folder, self.parts.num_stages, keep) if self._folder else None
        )

    def train(self, loader: Batches = ()) -> Iterator[Report]:
        """Train on every batch of ``loader`` once (one epoch).

        Only the first rank reads ``loader``; another rank ignores it, works on what it receives,
        and goes on to its next call as soon as its own part is done, so that the line stays full
        from epoch to epoch.

        A loader with a method ``set_epoch`` is told the epoch first. After `restore` in the
        middle of an epoch, the batches that were already seen are skipped (by its method
        ``batches(start)`` if it has one). Leaving the loop early ends the epoch.

        Args:
            loader: Yields ``(inputs, target)``; target holds class indices ``[N]``.

        Yields:
            One report per step. The last rank's reports hold the losses of all stages.

        Raises:
            DataError: if there is no batch, or a target is not a class.
            NonFiniteError: if a loss is NaN or infinite.
            StageError: if the network's own code fails.
            Interrupted: on other ranks, if the first one ended the run early.
        """
        if not self.mesh.is_first:
            yield from self._train_on_received()
            return
        try:
            for inputs, target in remaining(loader, self.epoch, self.batch):
                message = self._source.message(Kind.TRAIN, self.step + 1, inputs, target)
                try:
                    self._worker.handle(message)
                except NonFiniteError as error:
                    raise blame_data(error, message) from error
                self._advance(message)
                report = self._worker.complete(Message(Kind.BARRIER, self.step))
                if report is not None:
                    yield report
            if self.batch == 0:
                raise DataError("Training needs at least one batch", "The loader gave none")
        except GeneratorExit:
            self._end_epoch()
            raise
        self._end_epoch()

    def evaluate(self, loader: Batches = ()) -> Scores:
        """Classify every batch of ``loader`` without learning.

        It is a part of the stream: a rank returns when its own part is done, and the result can
        be read when the last rank has it.

        Args:
            loader: Yields ``(inputs, target)``; read by the first rank only.
        """
        self._infer(((inputs, target) for inputs, target in loader), keep=False)
        return Scores(self._worker.evaluation, self.parts.num_stages, self.control)

    def predict(self, inputs: Any) -> Tensor | None:
        """Compute logits.

        Args:
            inputs: One batch ``[N, ...]``, or an iterable of batches; read by the first rank.

        Returns:
            On the last rank (or the only one) the logits ``[N, C]`` of all rows, float32, on the
            CPU; None elsewhere.
        """
        batches = [inputs] if isinstance(inputs, Tensor) else inputs
        self._infer(((batch, None) for batch in batches), keep=True)
        if not self.mesh.is_last:
            return None
        logits = self._worker.counts.logits
        if not logits:
            raise DataError("A prediction needs at least one batch", "Got none")
        return torch.cat([part.cpu() for part in logits])

    def checkpoint(self, **note: float | str) -> None:
        """Send a mark down the line; every stage saves itself where the mark reaches it.

        The line does not stop: writing goes on in the background. Called on the first rank; on
        others it does nothing, for they save when the mark arrives.

        Args:
            note: What else to remember; `restore` returns it.

        Raises:
            InputError: if the pipeline has no folder for checkpoints.
            CheckpointError: if an earlier one could not be written.
            NonFiniteError: if weights are not finite; earlier checkpoints are kept.
        """
        if self._writer is None:
            raise InputError(
                "A folder for checkpoints must be given",
                "Got none",
                "Pass checkpoints='some/folder' to Pipeline",
            )
        if self.mesh.is_first:
            self.before_checkpoint()
            position = {"epoch": self.epoch, "batch": self.batch}
            self._worker.handle(
                Message(Kind.BARRIER, self.step, mark=Mark.CHECKPOINT, note={**note, **position})
            )

    def restore(self, step: int | None = None) -> dict[str, Any] | None:
        """Continue from a checkpoint, on any number of ranks; called on all of them.

        Args:
            step: Which one; by default the newest one of which every rank can read the parts of
                its stages, from a shared disk or its own.

        Returns:
            What the checkpoint says of itself: step, epoch, batch and the notes of `checkpoint`.
            None if there is none.

        Raises:
            CheckpointError: if it is damaged or of another network.
        """
        if self._folder is None:
            raise InputError("A folder for checkpoints must be given", "Got none")
        indices = [stage.index for stage in self.stages]
        readable = intact_steps(self._folder, indices, self.parts.num_stages)
        agreed = set(readable).intersection(*self.control.exchange("restore", readable))
        step = max(agreed, default=None) if step is None else step
        if step is None:
            return None
        manifest = read_manifest(self._folder, step, indices[0])
        for stage in self.stages:
            stage.load_state_dict(read_part(self._folder, step, stage.index))
        self.step, self.epoch, self.batch = step, manifest["epoch"], manifest["batch"]
        return manifest

    def export(self) -> nn.Module:
        """Return the user's module with the trained weights: a copy on the CPU, in eval mode.

        Its ``state_dict`` has exactly the keys of the module that was cut; heads and other parts
        of the objectives are left out. With several ranks all must call it, and each gets all.
        """
        model = copy.deepcopy(self.parts.model).cpu().eval()
        owners = self.mesh.owners(self.parts.num_stages)
        names = [*self.parts.names[:-1], (*self.parts.names[-1], *self.parts.readout_names)]
        for owner, layers in zip(owners, names, strict=True):
            for name in layers:
                for value in model.get_submodule(name).state_dict().values():
                    self.control.broadcast(value, owner)
        return model

    def learning_rate(self) -> float:
        """The current learning rate of this rank's first stage that has an optimizer."""
        for stage in self.stages:
            if stage.optimizer is not None:
                return float(stage.optimizer.param_groups[0]["lr"])
        return 0.0

    def stop(self, reason: str) -> None:
        """End the run early: every rank finishes what is under way and raises Interrupted."""
        self._worker.handle(Message(Kind.STOP, self.step, note={"last": True, "reason": reason}))
        self._stopped = True

    def close(self) -> None:
        """Wait until everything is sent and written.

        Raises:
            CheckpointError: if a checkpoint could not be written.
        """
        if self.mesh.is_first and not self._stopped:
            self.stop("")
        while not self._stopped:
            self._receive()
        self._outbox.close()
        if self._writer is not None:
            self._writer.close()

    def abort(self) -> None:
        """Give up after an error: wait for nothing but the checkpoints that are being written."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def _build_stage(self, index: int, options: StageOptions, seed: int) -> Stage:
        parts = self.parts
        is_last = index == parts.num_stages - 1
        site = Site(
            index,
            parts.num_stages,
            parts.feature_shapes[index],
            parts.readout if is_last else None,
        )
        objective = self._build_objective(site, derive_seed(seed, "objective", index))
        return Stage(
            index,
            parts.bodies[index],
            parts.names[index],
            objective,
            options,
            seed=derive_seed(seed, "stage", index),
            device=self.device,
        )

    def _build_objective(self, site: Site, seed: int) -> Objective:
        """Build an objective whose parameters depend on seed and stage, on nothing else."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.method.objective(site)

    def _train_on_received(self) -> Iterator[Report]:
        """The epoch as a later rank sees it: it lasts until its end mark arrives."""
        ended = False
        while not ended:
            message = self._next()
            report = self._worker.complete(message)
            if report is not None:
                try:
                    yield report
                except GeneratorExit:
                    # The caller has seen enough, but the batches on their way must be learned.
                    self._process(message)
                    while message.mark is not Mark.EPOCH_END:
                        message = self._next()
                        self._worker.complete(message)
                        self._process(message)
                    raise
            self._process(message)
            ended = message.mark is Mark.EPOCH_END

    def _next(self) -> Message:
        """Receive; a stop that comes early ends the run here, too."""
        assert self._inbox is not None
        message = self._inbox.receive()
        if message.kind is Kind.STOP:
            self._stopped = True
            self._worker.handle(message)
            raise Interrupted("The first rank ended the run", str(message.note.get("reason", "")))
        return message

    def _receive(self) -> None:
        """Take and do whatever comes, until the line stops."""
        try:
            message = self._next()
        except Interrupted:
            return
        self._worker.complete(message)
        self._process(message)

    def _process(self, message: Message) -> None:
        if message.mark is Mark.CHECKPOINT:
            self.before_checkpoint()
        self._worker.handle(message)
        self._advance(message)

    def _advance(self, message: Message) -> None:
        """Count where in the data the run stands."""
        if message.kind is Kind.TRAIN:
            self.step, self.batch = message.step, self.batch + 1
        elif message.mark is Mark.EPOCH_END:
            self.epoch, self.batch = self.epoch + 1, 0

    def _end_epoch(self) -> None:
        if self._stopped:
            return
        message = Message(Kind.BARRIER, self.step, mark=Mark.EPOCH_END)
        self._worker.handle(message)
        self._advance(message)

    def _infer(self, batches: Iterable[tuple[Any, Tensor | None]], *, keep: bool) -> None:
        if not self.mesh.is_first:
            mark = None
            while mark is not Mark.EVALUATION_END:
                message = self._next()
                self._worker.complete(message)
                self._process(message)
                mark = message.mark
            return
        handle = self._worker.handle
        handle(Message(Kind.BARRIER, self.step, mark=Mark.EVALUATION_BEGIN, note={"keep": keep}))
        for index, (inputs, target) in enumerate(batches):
            handle(self._source.message(Kind.EVAL, index, inputs, target))
        handle(Message(Kind.BARRIER, self.step, mark=Mark.EVALUATION_END))

    def _write_part(self, stage: Stage, message: Message) -> None:
        """Save one stage when a checkpoint's barrier reaches it."""
        assert self._writer is not None
        state = stage.snapshot(message.step)
        self._writer.write(stage.index, message.step, state, dict(message.note))
