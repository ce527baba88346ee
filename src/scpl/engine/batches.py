"""Where batches come from: a loader's batches become checked messages, on the first rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from scpl.engine.messages import EvalBatch, TrainBatch
from scpl.engine.transfer import LOOK_EVERY, answers_at_once, numbers, upload
from scpl.errors import DataError, NonFiniteError
from scpl.partition.inputs import LABELS, Form, without_labels
from scpl.partition.values import Tree, tensors_of, tree_map
from scpl.tasks import Task

__all__ = ["Batches", "Source"]

Batches: TypeAlias = Iterable[tuple[Any, Tensor]]


class Source:
    """Makes checked messages of batches.

    Targets that lie on an accelerator already are looked at later, many at a time; until then
    classes that do not exist count as the nearest one (`Task.mend`).

    Args:
        num_outputs: Of the network.
        task: What they mean, and so what a target is.
        device: Where the first stage computes.
        form: How the parts of a batch are arranged for the network.
    """

    def __init__(self, num_outputs: int, task: Task, device: torch.device, form: Form) -> None:
        self._form = form
        self._num_outputs, self._task = num_outputs, task
        self._device = device
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []  # batch, lowest and highest value

    def to_train(self, step: int, batch: Any) -> TrainBatch:
        """Check ``(inputs, target)``, and put it on the device.

        Raises:
            DataError: if it is no such pair, or the target is not what the task takes.
        """
        inputs, target = pair(batch)
        features = self._inputs(inputs, step)
        return TrainBatch(step, features, self._target(features, target, step))

    def to_evaluate(
        self, index: int, inputs: Any, target: Tensor | None, first: int = 0
    ) -> EvalBatch:
        """Check a batch, with or without a target, and put it on the device.

        Args:
            index: Which batch of the evaluation.
            inputs: As a loader gives them.
            target: As a loader gives it.
            first: Place of its first sample in the evaluation.

        Raises:
            DataError: if the target is not what the task takes.
        """
        features = self._inputs(inputs, index)
        wanted = None if target is None else self._target(features, target, index)
        return EvalBatch(index, features, wanted, first=first)

    def look(self) -> None:
        """Look at the targets that were not looked at yet (one sync).

        Raises:
            DataError: naming the first batch whose target holds what it cannot.
        """
        waiting, self._unchecked = self._unchecked, []
        found = iter(numbers([t for _, low, high in waiting for t in (low, high)]))
        for (step, _, _), low, high in zip(waiting, found, found, strict=True):
            self._check_values(low, high, step)

    def _inputs(self, inputs: Any, step: int) -> Tree:
        inputs = self._form.arrange(inputs)
        tensors = tensors_of(inputs)
        if not tensors or tensors[0].ndim == 0:
            raise DataError(
                "Inputs must be tensors whose first dimension is the batch",
                f"Batch {step} holds {'a tensor without dimensions' if tensors else 'none'}",
            )
        return tree_map(lambda tensor: upload(tensor, self._device), inputs)

    def _target(self, inputs: Any, target: Tensor, step: int) -> Tensor:
        self._check_target(target, len(tensors_of(inputs)[0]), step)
        target = self._task.prepare(target)
        if answers_at_once(target.device) or answers_at_once(self._device):
            low, high = target.aminmax()
            self._check_values(float(low), float(high), step)
            return upload(target, self._device)
        target = upload(target, self._device)
        self._unchecked.append((step, *target.aminmax()))
        if len(self._unchecked) >= LOOK_EVERY:
            self.look()
        return self._task.mend(target, self._num_outputs)

    def _check_target(self, target: Tensor, rows: int, step: int) -> None:
        if not isinstance(target, Tensor):
            raise DataError(
                f"A target must be a tensor with a {self._task.noun} per row",
                f"Got {type(target).__name__} in batch {step}",
            )
        self._task.check_target(target, rows, self._num_outputs, f"batch {step}")
        if rows == 0:
            raise DataError("A batch must hold at least one row", f"Batch {step} holds none")

    def _check_values(self, low: float, high: float, step: int) -> None:
        self._task.check_values(low, high, self._num_outputs, f"batch {step}")


def remaining(loader: Batches, epoch: int, seen: int) -> Iterator[Any]:
    """The batches of an epoch after the first ``seen`` ones."""
    set_epoch = getattr(loader, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    batches = getattr(loader, "batches", None)
    return iter(batches(seen) if batches is not None else islice(iter(loader), seen, None))


def pair(batch: Any) -> tuple[Any, Tensor]:
    """Take a batch apart: ``(inputs, target)``, or a mapping with ``labels``.

    Raises:
        DataError: if it is neither.
    """
    if isinstance(batch, Mapping) and any(name in batch for name in LABELS):
        return without_labels(batch), next(batch[name] for name in LABELS if name in batch)
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise DataError(
            "A batch must be a pair (inputs, target), or a mapping with labels",
            f"Got {type(batch).__name__}{size}",
        )
    return batch[0], batch[1]


def blame_data(error: NonFiniteError, message: TrainBatch) -> None:
    """Raise another error if the batch itself was not finite.

    Raises:
        NonFiniteError: naming the batch.
    """
    for tensor in tensors_of(message.features):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise NonFiniteError(
                "The data must be finite",
                f"The batch of step {message.step} holds {bad} NaN or infinite values",
                "Clean the data; earlier checkpoints are kept",
            ) from error
