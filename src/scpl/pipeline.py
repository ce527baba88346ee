"""The facade: train, evaluate, predict, checkpoint and export a partitioned network."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from scpl.checkpoint import CheckpointWriter, newest_complete, read_manifest, read_part
from scpl.errors import CheckpointError, DataError, InputError, NonFiniteError
from scpl.link import EndOfLine
from scpl.mesh import Mesh
from scpl.message import Kind, Mark, Message, tensors_of, tree_map
from scpl.methods.base import Method, Site
from scpl.objectives import Objective
from scpl.partition import Partition
from scpl.randomness import derive_seed
from scpl.scores import Scores
from scpl.stage import OptimizerFactory, SchedulerFactory, Stage, StageOptions
from scpl.worker import Report, Worker

__all__ = ["Pipeline"]

Batches: TypeAlias = Iterable[tuple[Any, Tensor]]


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
    ) -> None:
        self.parts = parts if method.cuts_gradients else parts.merged()
        self.method = method
        self.mesh = mesh or Mesh()
        self.device = torch.device(device)
        self.step = self.epoch = self.batch = 0
        if parts.num_outputs != method.num_classes:
            raise InputError(
                "The network must have one output per class",
                f"Got {parts.num_outputs} outputs for {method.num_classes} classes",
                "Build the network for this data set, or pass the right num_classes",
            )
        options = StageOptions(optimizer, scheduler, clip_norm, precision)
        self.stages = [
            self._build_stage(index, options, seed)
            for index in self.mesh.hosted(self.parts.num_stages)
        ]
        self._outbox = EndOfLine()
        self._worker = Worker(self.stages, self._outbox, self._write_part)
        self._folder = None if checkpoints is None else Path(checkpoints)
        self._writer = (
            CheckpointWriter(self._folder, self.parts.num_stages, keep) if self._folder else None
        )

    def train(self, loader: Batches) -> Iterator[Report]:
        """Train on every batch of ``loader`` once (one epoch).

        A loader with a method ``set_epoch`` is told the epoch first. After `restore` in the
        middle of an epoch, the batches that were already seen are skipped (by its method
        ``batches(start)`` if it has one).

        Args:
            loader: Yields ``(inputs, target)``; target holds class indices ``[N]``.

        Yields:
            One report per step.

        Raises:
            DataError: if there is no batch, or a target is not a class.
            NonFiniteError: if a loss is NaN or infinite.
            StageError: if the network's own code fails.
        """
        seen = self.batch
        for inputs, target in self._remaining(loader):
            seen += 1
            message = self._message(Kind.TRAIN, self.step + 1, inputs, target)
            report = self._handle(message)
            self.step, self.batch = self.step + 1, self.batch + 1
            if report is not None:
                yield report
        if not seen:
            raise DataError("Training needs at least one batch", "The loader gave none")
        self.epoch, self.batch = self.epoch + 1, 0
        self._worker.handle(Message(Kind.BARRIER, self.step, mark=Mark.EPOCH_END))

    def evaluate(self, loader: Batches) -> Scores:
        """Classify every batch of ``loader`` without learning.

        Args:
            loader: Yields ``(inputs, target)``.
        """
        self._infer(((inputs, target) for inputs, target in loader), keep=False)
        return Scores(self._worker.evaluation)

    def predict(self, inputs: Any) -> Tensor:
        """Compute logits.

        Args:
            inputs: One batch ``[N, ...]``, or an iterable of batches.

        Returns:
            Logits ``[N, C]`` of all rows, float32, on the CPU.
        """
        batches = [inputs] if isinstance(inputs, Tensor) else inputs
        self._infer(((batch, None) for batch in batches), keep=True)
        logits = self._worker.counts.logits
        if not logits:
            raise DataError("A prediction needs at least one batch", "Got none")
        return torch.cat([part.cpu() for part in logits])

    def checkpoint(self, **note: float | str) -> None:
        """Send a mark down the line; every stage saves itself where the mark reaches it.

        Writing goes on in the background.

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
        position = {"epoch": self.epoch, "batch": self.batch}
        self._worker.handle(
            Message(Kind.BARRIER, self.step, mark=Mark.CHECKPOINT, note={**note, **position})
        )

    def restore(self, step: int | None = None) -> dict[str, Any] | None:
        """Continue from a checkpoint.

        Args:
            step: Which one; the newest complete one by default.

        Returns:
            What the checkpoint says of itself: step, epoch, batch and the notes of `checkpoint`.
            None if there is none.

        Raises:
            CheckpointError: if it is damaged or of another network.
        """
        if self._folder is None:
            raise InputError("A folder for checkpoints must be given", "Got none")
        step = newest_complete(self._folder) if step is None else step
        if step is None:
            return None
        manifest = read_manifest(self._folder, step, self.stages[0].index)
        if manifest.get("num_stages") != self.parts.num_stages:
            raise CheckpointError(
                "A checkpoint must have as many stages as the network is cut into",
                f"Got {manifest.get('num_stages')} in {self._folder}, {self.parts.num_stages} here",
                "Resume with the configuration the run was started with",
            )
        for stage in self.stages:
            stage.load_state_dict(read_part(self._folder, step, stage.index))
        self.step, self.epoch, self.batch = step, manifest["epoch"], manifest["batch"]
        return manifest

    def export(self) -> nn.Module:
        """Return the user's module with the trained weights: a copy on the CPU, in eval mode.

        Its ``state_dict`` has exactly the keys of the module that was cut; heads and other parts
        of the objectives are left out.
        """
        return copy.deepcopy(self.parts.model).cpu().eval()

    def learning_rate(self) -> float:
        """The current learning rate of this rank's first stage that has an optimizer."""
        for stage in self.stages:
            if stage.optimizer is not None:
                return float(stage.optimizer.param_groups[0]["lr"])
        return 0.0

    def close(self) -> None:
        """Wait until everything is sent and written.

        Raises:
            CheckpointError: if a checkpoint could not be written.
        """
        self._outbox.close()
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
        self.close()

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

    def _message(self, kind: Kind, step: int, inputs: Any, target: Tensor | None) -> Message:
        """Check a batch and put it on the device."""
        if target is not None:
            self._check_target(target, len(tensors_of(inputs)[0]), step)
            target = target.to(self.device, torch.int64, non_blocking=True)
        features = tree_map(lambda t: t.to(self.device, non_blocking=True), inputs)
        return Message(kind, step, features, target)

    def _check_target(self, target: Tensor, rows: int, step: int) -> None:
        if target.ndim != 1 or len(target) != rows or target.is_floating_point():
            raise DataError(
                "A target must hold one class index per row",
                f"Got {tuple(target.shape)} {target.dtype} for {rows} rows in batch {step}",
            )
        low, high = (int(target.min()), int(target.max())) if rows else (0, 0)
        if low < 0 or high >= self.method.num_classes:
            raise DataError(
                f"Targets must lie in 0 .. {self.method.num_classes - 1}",
                f"Got {low if low < 0 else high} in batch {step}",
                "Check the labels, or the number of classes",
            )

    def _handle(self, message: Message) -> Report | None:
        try:
            return self._worker.handle(message)
        except NonFiniteError as error:
            for tensor in tensors_of(message.features):
                bad = tensor.numel() - int(tensor.isfinite().sum())
                if bad:
                    raise NonFiniteError(
                        "The data must be finite",
                        f"The batch of step {message.step} holds {bad} NaN or infinite values "
                        f"(found in the loss of stage 0)",
                        "Clean the data; earlier checkpoints are kept",
                    ) from error
            raise

    def _remaining(self, loader: Batches) -> Iterator[tuple[Any, Tensor]]:
        """The batches of this epoch that were not seen yet."""
        set_epoch = getattr(loader, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.epoch)
        batches = getattr(loader, "batches", None)
        if batches is not None:
            yield from batches(self.batch)
        else:
            yield from islice(iter(loader), self.batch, None)

    def _infer(self, batches: Iterable[tuple[Any, Tensor | None]], *, keep: bool) -> None:
        begin = Message(Kind.BARRIER, self.step, mark=Mark.EVALUATION_BEGIN, note={"keep": keep})
        self._worker.handle(begin)
        for index, (inputs, target) in enumerate(batches):
            self._worker.handle(self._message(Kind.EVAL, index, inputs, target))
        self._worker.handle(Message(Kind.BARRIER, self.step, mark=Mark.EVALUATION_END))

    def _write_part(self, stage: Stage, message: Message) -> None:
        """Save one stage when a checkpoint's barrier reaches it."""
        assert self._writer is not None
        state = stage.snapshot(message.step)
        self._writer.write(stage.index, message.step, state, dict(message.note))
