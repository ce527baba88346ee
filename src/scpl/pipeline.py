"""The facade: train, evaluate, predict, checkpoint and export a partitioned network."""

from __future__ import annotations

import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scpl.engine.batches import Batches, Source, blame_data, pair, remaining
from scpl.engine.build import assign, build_stages, build_trainer
from scpl.engine.channel import open_channels
from scpl.engine.checkpoint import Checkpoints, CheckpointWriter, recover
from scpl.engine.export import ExitNetwork, export_exits, export_network, has_exits
from scpl.engine.messages import CheckpointMark, EpochEnds, EvaluationBegins, EvaluationEnds
from scpl.engine.precision import Precision
from scpl.engine.ranks import Ranks, connect, local_cuda
from scpl.engine.scores import Scores
from scpl.engine.stage import OptimizerFactory, SchedulerFactory, StageOptions
from scpl.engine.timeline import Timeline
from scpl.engine.worker import Position, Report, Worker
from scpl.errors import DataError, InputError, NonFiniteError
from scpl.methods.base import Method
from scpl.partition import Partition

__all__ = ["Pipeline"]


class Pipeline:
    """Trains the stages of a network, each from its own objective.

    Every rank runs the same script; under ``torchrun`` the ranks are found in the environment,
    under ``python`` there is one. A rank goes on to its next call when its own part is done, so
    the stream stays full between epochs.

    As a context manager (recommended) a pipeline closes itself at the end of the block. If an
    error leaves the block and there are several ranks, the other ones are told the cause and
    **this process ends** with status 1 (or that of a ``SystemExit``): it has threads that wait for
    messages which will not come.

    Args:
        parts: The network, cut by `scpl.split`. It says what is to be predicted.
        method: Which objective each stage gets.
        optimizer: Builds one stage's optimizer from the parameters that it trains, a list that also
            knows its ``stage``, their ``names`` and how to make ``groups`` (`StageParameters`).
        scheduler: Builds the schedule of one stage's optimizer; stepped once per mini-batch.
        clip_norm: Clip the gradient norm of every stage to this.
        precision: ``torch.bfloat16`` or ``torch.float16`` compute forward passes in mixed
            precision; a `Precision` also says in which type values go on to the next stage.
        cuda_graphs: On a CUDA device, record the work of every stage once and replay it: launching
            it from Python takes longer than a short step does. All that a stage does must run on
            the device; a step of another shape than most runs as it is. A fused Adam then reads its
            learning rate in float32. What your own code counts or decides in Python stays as it was
            when the step was recorded. ``"auto"``: where that can be done; elsewhere, and where
            recording fails (which is told), steps run as they are.
        seed: Seed of the objectives' parameters and of every stage's random state.
        checkpoints: Where checkpoints go, and when they are made; a folder, or `Checkpoints`.
        ranks: The other ranks and this one's device, from `scpl.connect`. Default: the ranks of the
            environment; the device of the network's parameters (on CUDA that of ``LOCAL_RANK``).

    Attributes:
        parts: The network, as it is trained: end-to-end methods on one device join all stages.
        stages: Those that this rank hosts.
        ranks: The ranks.
        timeline: What this rank did when.

    Raises:
        InputError: if method, network and ranks do not fit together.
    """

    def __init__(
        self,
        parts: Partition,
        method: Method,
        optimizer: OptimizerFactory,
        *,
        scheduler: SchedulerFactory | None = None,
        clip_norm: float | None = None,
        precision: torch.dtype | Precision = torch.float32,
        cuda_graphs: bool | Literal["auto"] = False,
        seed: int = 0,
        checkpoints: Checkpoints | Path | str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.parts = parts if method.layout == "stages" else parts.merged()
        self.method = method
        self._owns_ranks = ranks is None
        self.ranks = ranks or connect(_device_of(parts.model))
        self.mesh, self.device = self.ranks.mesh, self.ranks.device
        options = StageOptions(
            optimizer, scheduler, clip_norm, Precision.of(precision), cuda_graphs
        )
        hosted, self._owners = assign(method, self.mesh, self.parts)
        self.stages = build_stages(
            self.parts, method, options, hosted, seed=seed, device=self.device
        )
        self.timeline = Timeline(self.mesh.rank)
        self._source = Source(self.parts.num_outputs, self.parts.task, self.device, self.parts.form)
        if isinstance(checkpoints, (str, Path)):
            checkpoints = Checkpoints(checkpoints)
        self._checkpoints = checkpoints
        self._run = (checkpoints.run if checkpoints else None) or uuid.uuid4().hex
        self._attempt = uuid.uuid4().hex
        self._writer = CheckpointWriter(checkpoints, self.parts.num_stages) if checkpoints else None
        inbox, outbox = open_channels(
            self.ranks, self.timeline, hosted, self.parts.batch_dims,
            narrows=options.precision.send_as is not None,
        )  # fmt: skip
        trainer = build_trainer(
            method, self.stages, outbox, self.timeline,
            ranks=self.ranks, options=options, task=self.parts.task, seed=seed,
        )  # fmt: skip
        predicts = self.stages[-1].index == self.parts.num_stages - 1
        self._worker = Worker(
            trainer, inbox, outbox, self._writer, self.parts.task, predicts=predicts
        )

    def train(
        self, loader: Batches = (), on_step: Callable[[Report], object] | None = None
    ) -> None:
        """Train on every batch of ``loader`` once (one epoch).

        Only the first rank reads ``loader``. A loader with a method ``set_epoch`` is told the
        epoch; after `restore` in the middle of one, batches already seen are skipped (by
        ``batches(start)`` if the loader has it).

        Args:
            loader: Yields ``(inputs, target)``; target holds class indices ``[N]``, or what else
                the task of `parts` takes.
            on_step: Called with the report of each step as soon as it is known on this rank. The
                last rank's reports hold the losses of all stages. An exception ends the epoch.

        Raises:
            DataError: if there is no batch, or a target is none of the task.
            NonFiniteError: if a loss is NaN or infinite.
            StageError: if the network's own code fails.
            Interrupted: on other ranks, if the first one ended the run early.
        """
        self._worker.on_report = on_step or (lambda report: None)
        for _ in self._epoch(loader):
            pass

    def steps(self, loader: Batches = ()) -> Iterator[Report]:
        """Train like `train`, one step for each iteration. Leaving the loop early ends the epoch.

        Yields:
            The report of each step.
        """
        reports: deque[Report] = deque()
        self._worker.on_report = reports.append
        epoch = self._epoch(loader)
        try:
            for _ in epoch:
                while reports:
                    yield reports.popleft()
        except GeneratorExit:
            # The caller has seen enough. The first rank ends the epoch; another one must learn
            # what is on its way.
            if self.mesh.is_first:
                self._end_epoch()
            else:
                for _ in epoch:
                    pass
            raise

    def evaluate(self, loader: Batches = ()) -> Scores:
        """Classify every batch of ``loader`` without learning, as a part of the stream.

        Args:
            loader: Yields ``(inputs, target)``; read by the first rank only.
        """
        self._infer((pair(batch) for batch in loader), keep_logits=False)
        parts = self.parts
        return Scores(self._worker.evaluation, parts.num_stages, self.ranks, parts.task)

    def predict(self, inputs: Any) -> Tensor | None:
        """Compute logits.

        Args:
            inputs: One batch (a tensor ``[N, ...]`` or a mapping), or an iterable of batches; read
                by the first rank.

        Returns:
            On the last rank (or the only one) the logits ``[N, C]`` of all samples, at least
            float32, on the CPU; None elsewhere. Numbers are standardised in them;
            `scpl.Regression.values` gives those of the targets.
        """
        batches = [inputs] if isinstance(inputs, (Tensor, Mapping)) else inputs
        self._infer(((batch, None) for batch in batches), keep_logits=True)
        logits = self._worker.counts.logits
        if self.mesh.is_last and not logits:
            raise DataError("A prediction needs at least one batch", "Got none")
        return torch.cat([part.cpu() for part in logits]) if logits else None

    def checkpoint(self, **note: float | str) -> None:
        """Have every stage save itself, exactly here in the stream.

        Writing goes on in the background. On ranks but the first a call does nothing: they save
        when the mark arrives.

        Args:
            note: What else to remember; `restore` returns it. ``best_step`` is the step of another
                checkpoint (or this one), which is then kept as long as this one.

        Raises:
            InputError: if the pipeline has no folder for checkpoints.
            CheckpointError: if an earlier one could not be written.
            NonFiniteError: if weights are not finite; earlier checkpoints are kept.
        """
        self._checkpoint_settings()
        if self.mesh.is_first:
            self._source.look()
            place = self.step, self.epoch, self.batch
            # A step may be saved twice, before an epoch ends and after: parts of both are no whole.
            attempt = f"{self._attempt}-{self.epoch}-{self.batch}"
            self._worker.process(CheckpointMark(*place, note, (), self._run, attempt))

    def restore(self, step: int | None = None) -> dict[str, Any] | None:
        """Continue from a checkpoint, on any number of ranks; called on all of them.

        Args:
            step: Which one; default: the newest of which every rank can read its stages' parts.

        Returns:
            Its step, epoch, batch and the notes given to `checkpoint`; None if there is none, or
            not even the first was finished. `Checkpoints.tell` hears on the last rank why newer
            ones are not used.

        Raises:
            CheckpointError: if there are some but none is intact, or it is of another network.
        """
        checkpoints = self._checkpoint_settings()
        if self.step:  # else there is nothing under way
            # What was asked of all ranks before is done before: a mark saves what is there now.
            self.evaluate(())
        if self._writer is not None:
            self._writer.wait()
        note = recover(self.stages, checkpoints, self._owners, self.ranks, step)
        if note is not None:
            self._run, self._attempt = note["run"], uuid.uuid4().hex
            self._worker.position = Position(note["step"], note["epoch"], note["batch"])
        return note

    def export(self) -> nn.Module:
        """Return the user's module with the trained weights: a copy on the CPU, in eval mode.

        Its ``state_dict`` has exactly the keys of the module that was cut; heads are left out. A
        method with a readout of its own puts that in place of the user's, under keys that begin
        with ``exits``. With several ranks all must call it, and each gets all.
        """
        return export_network(self.parts, self.method, self.stages, self.ranks, self._owners)

    @property
    def has_exits(self) -> bool:
        """Whether there are several stages that all predict: an exit after each."""
        return has_exits(self.parts, self.method)

    def export_exits(self) -> ExitNetwork:
        """Return the network with an exit after every stage; else as `export`.

        Raises:
            InputError: if not every stage predicts (see `has_exits`).
        """
        return export_exits(self.parts, self.method, self.stages, self.ranks, self._owners)

    @property
    def step(self) -> int:
        """Training steps done on this rank."""
        return self._worker.position.step

    @property
    def epoch(self) -> int:
        """Epochs finished on this rank."""
        return self._worker.position.epoch

    @property
    def batch(self) -> int:
        """Mini-batches of the current epoch done on this rank."""
        return self._worker.position.batch

    @property
    def bytes_per_step(self) -> float:
        """Bytes that this rank has sent to others per mini-batch of training, on average."""
        return self._worker.bytes_per_step

    def stop(self, reason: str, signal: int = 0) -> None:
        """End the run early: other ranks finish what is under way and raise Interrupted.

        Args:
            reason: Why, for people.
            signal: Number of the signal that asked for it, if one did.
        """
        self._worker.stop(reason, signal)

    def close(self) -> None:
        """Wait until everything is sent and written, and part from the other ranks.

        Raises:
            CheckpointError: if a checkpoint could not be written.
        """
        self._worker.close()
        self._finish_writing()
        if self._owns_ranks:
            self.ranks.close()

    def abort(self) -> None:
        """Give up after an error: wait for nothing but the checkpoints that are being written."""
        self._finish_writing()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self.abort()
            self.ranks.end_process(error)

    def _epoch(self, loader: Batches) -> Iterator[None]:
        """Train for an epoch; yields after each message."""
        worker = self._worker
        if not self.mesh.is_first:
            yield from worker.follow(EpochEnds)
            return
        for batch in remaining(loader, self.epoch, self.batch):
            message = self._source.to_train(self.step + 1, batch)
            try:
                worker.process(message)
            except NonFiniteError as error:
                blame_data(error, message)
                raise
            if self._checkpoints is not None and self._checkpoints.is_due(self.step):
                self.checkpoint(**self._checkpoints.note())
            yield
        if self.batch == 0:
            raise DataError("Training needs at least one batch", "The loader gave none")
        self._end_epoch()

    def _finish_writing(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _end_epoch(self) -> None:
        self._source.look()
        if not self._worker.stopped:
            self._worker.process(EpochEnds(self.step))

    def _infer(self, batches: Iterable[tuple[Any, Tensor | None]], *, keep_logits: bool) -> None:
        worker = self._worker
        if not self.mesh.is_first:
            for _ in worker.follow(EvaluationEnds):
                pass
            return
        worker.process(EvaluationBegins(self.step, keep_logits))
        first = 0
        for index, (inputs, target) in enumerate(batches):
            batch = self._source.to_evaluate(index, inputs, target, first)
            first += 0 if batch.target is None else len(batch.target)
            worker.process(batch)
        self._source.look()
        worker.process(EvaluationEnds(self.step))

    def _checkpoint_settings(self) -> Checkpoints:
        if self._checkpoints is None:
            raise InputError("`checkpoints` must name a folder to save or restore", "Got none")
        return self._checkpoints


def _device_of(model: nn.Module) -> torch.device:
    """Where a network's parameters are; of several CUDA devices each local rank takes its own."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return local_cuda() if device.type == "cuda" and "LOCAL_RANK" in os.environ else device
