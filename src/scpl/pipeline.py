"""The facade: train, evaluate, predict, checkpoint and export a partitioned network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scpl.engine.batches import Batches, Source, blame_data, pair, remaining
from scpl.engine.build import assign, build_stages, build_worker
from scpl.engine.channel import open_links
from scpl.engine.checkpoint import CheckpointWriter, recover
from scpl.engine.export import ExitNetwork, export_exits, export_network, has_exits
from scpl.engine.mesh import Mesh
from scpl.engine.messages import Kind, Mark, Message
from scpl.engine.ranks import Control, connect
from scpl.engine.scores import Scores
from scpl.engine.stage import OptimizerFactory, SchedulerFactory, Stage, StageOptions
from scpl.engine.timeline import Timeline
from scpl.engine.worker import Line, Position, Report
from scpl.errors import DataError, InputError, NonFiniteError
from scpl.methods.base import Method
from scpl.partition import Partition

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
        silence: Seconds without a sign of life after which a rank counts as lost.

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
        silence: float = 30.0,
    ) -> None:
        self.parts = parts if method.layout == "stages" else parts.merged()
        self.method = method
        self.device = torch.device(device)
        self._owns_control = control is None
        self.control = control or connect(mesh or Mesh(), self.device, silence)
        self.mesh = self.control.mesh
        options = StageOptions(optimizer, scheduler, clip_norm, precision)
        hosted, self._owners = assign(method, self.mesh, self.parts)
        self.stages = build_stages(
            self.parts, method, options, hosted, seed=seed, device=self.device
        )
        self.timeline = Timeline(self.mesh.rank)
        self._source = Source(parts.num_outputs, self.device)
        inbox, outbox = open_links(self.control, self.timeline, hosted, depth, self.device)
        self._worker = build_worker(
            method, self.stages, outbox, self._write_part, self.timeline,
            control=self.control, options=options, seed=seed,
        )  # fmt: skip
        self._line = Line(self._worker, inbox, outbox)
        self._folder = None if checkpoints is None else Path(checkpoints)
        self._writer = (
            CheckpointWriter(self._folder, self.parts.num_stages, keep) if self._folder else None
        )

    def train(self, loader: Batches = ()) -> Iterator[Report]:
        """Train on every batch of ``loader`` once (one epoch).

        Only the first rank reads ``loader``. Another rank works on what it receives, and goes on
        to its next call as soon as its own part is done, so the line stays full between epochs.
        A loader with a method ``set_epoch`` is told the epoch; after `restore` in the middle of
        one, batches already seen are skipped (by ``batches(start)`` if the loader has it).
        Leaving the loop early ends the epoch.

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
            yield from self._line.follow_epoch()
            return
        try:
            for inputs, target in remaining(loader, self.epoch, self.batch):
                message = self._source.message(Kind.TRAIN, self.step + 1, inputs, target)
                try:
                    report = self._line.feed(message)
                except NonFiniteError as error:
                    blame_data(error, message)
                    raise
                if report is not None:
                    yield report
            if self.batch == 0:
                raise DataError("Training needs at least one batch", "The loader gave none")
        except GeneratorExit:
            self._line.end_epoch()
            raise
        self._line.end_epoch()

    def evaluate(self, loader: Batches = ()) -> Scores:
        """Classify every batch of ``loader`` without learning, as a part of the stream.

        Args:
            loader: Yields ``(inputs, target)``; read by the first rank only.
        """
        self._infer((pair(batch) for batch in loader), keep=False)
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
        logits = self._worker.counts.logits
        if self.mesh.is_last and not logits:
            raise DataError("A prediction needs at least one batch", "Got none")
        return torch.cat([part.cpu() for part in logits]) if logits else None

    def checkpoint(self, **note: float | str) -> None:
        """Send a mark down the line; every stage saves itself where the mark reaches it.

        Writing goes on in the background. On ranks but the first a call does nothing: they save
        when the mark arrives.

        Args:
            note: What else to remember; `restore` returns it.

        Raises:
            InputError: if the pipeline has no folder for checkpoints.
            CheckpointError: if an earlier one could not be written.
            NonFiniteError: if weights are not finite; earlier checkpoints are kept.
        """
        self._checkpoint_folder()
        if self.mesh.is_first:
            full = {**note, "epoch": self.epoch, "batch": self.batch}
            self._line.process(Message(Kind.BARRIER, self.step, mark=Mark.CHECKPOINT, note=full))

    def restore(self, step: int | None = None) -> dict[str, Any] | None:
        """Continue from a checkpoint, on any number of ranks; called on all of them.

        Args:
            step: Which one; default: the newest of which every rank can read its stages' parts.

        Returns:
            Its step, epoch, batch and the notes given to `checkpoint`; None if there is none.

        Raises:
            CheckpointError: if it is damaged or of another network.
        """
        folder = self._checkpoint_folder()
        if self._writer is not None:
            self._writer.wait()
        note = recover(self.stages, folder, self._owners, self.control, step)
        if note is not None:
            self._line.position = Position(note["step"], note["epoch"], note["batch"])
        return note

    def export(self) -> nn.Module:
        """Return the user's module with the trained weights: a copy on the CPU, in eval mode.

        Its ``state_dict`` has exactly the keys of the module that was cut; heads are left out. A
        method with a read-out of its own puts that in place of the user's, under keys that begin
        with ``exits``. With several ranks all must call it, and each gets all.
        """
        return export_network(self.parts, self.method, self.stages, self.control, self._owners)

    @property
    def has_exits(self) -> bool:
        """Whether there are several stages that all predict: an exit after each."""
        return has_exits(self.parts, self.method)

    def export_exits(self) -> ExitNetwork:
        """Return the network with an exit after every stage; else as `export`.

        Raises:
            InputError: if not every stage predicts (see `has_exits`).
        """
        return export_exits(self.parts, self.method, self.stages, self.control, self._owners)

    @property
    def step(self) -> int:
        """Training steps done on this rank."""
        return self._line.position.step

    @property
    def epoch(self) -> int:
        """Epochs finished on this rank."""
        return self._line.position.epoch

    @property
    def batch(self) -> int:
        """Mini-batches of the current epoch done on this rank."""
        return self._line.position.batch

    @property
    def bytes_per_step(self) -> float:
        """Bytes that this rank has sent to others per mini-batch of training, on average."""
        return self._worker.bytes_sent / max(self._worker.num_trained, 1)

    def on_checkpoint(self, hook: Callable[[], None]) -> None:
        """Have ``hook`` called when a checkpoint's mark arrives, before the state is saved."""
        self._line.before_checkpoint = hook

    def stop(self, reason: str) -> None:
        """End the run early: other ranks finish what is under way and raise Interrupted."""
        self._line.stop(reason)

    def close(self) -> None:
        """Wait until everything is sent and written, and part from the other ranks.

        Raises:
            CheckpointError: if a checkpoint could not be written.
        """
        self._line.close()
        self.abort()
        if self._owns_control:
            self.control.close()

    def abort(self) -> None:
        """Give up after an error: wait for nothing but the checkpoints that are being written."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self.abort()
            self.control.end_process(error)

    def _infer(self, batches: Iterable[tuple[Any, Tensor | None]], *, keep: bool) -> None:
        if not self.mesh.is_first:
            self._line.follow_evaluation()
            return
        process = self._line.process
        process(Message(Kind.BARRIER, self.step, mark=Mark.EVALUATION_BEGIN, note={"keep": keep}))
        for index, (inputs, target) in enumerate(batches):
            process(self._source.message(Kind.EVAL, index, inputs, target))
        process(Message(Kind.BARRIER, self.step, mark=Mark.EVALUATION_END))

    def _checkpoint_folder(self) -> Path:
        if self._folder is None:
            raise InputError("`checkpoints` must name a folder to save or restore", "Got none")
        return self._folder

    def _write_part(self, stage: Stage, message: Message) -> None:
        """Save one stage when a checkpoint's barrier reaches it."""
        assert self._writer is not None
        self._writer.write(
            stage.index, message.step, stage.snapshot(message.step), dict(message.note)
        )
