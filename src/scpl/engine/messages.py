"""What travels between ranks: one small frozen class per kind of message, and the codec for all.

Traffic goes one way, from the first rank to the last. Everything a later stage needs (targets,
masks, the losses of earlier stages) travels with the batch, so only the first rank reads data.
Marks are messages without data: every stage acts on a mark where it meets it, which is the same
point of the stream for all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from scpl.errors import InputError
from scpl.partition.values import TensorSpec, Tree, tensors_of

__all__ = [
    "CheckpointMark",
    "EpochEnds",
    "EvalBatch",
    "EvaluationBegins",
    "EvaluationEnds",
    "LocalLoss",
    "Losses",
    "Message",
    "ScheduledBatch",
    "Stop",
    "TrainBatch",
    "decode",
    "encode",
    "without_earlier",
]


@dataclass(frozen=True)
class LocalLoss:
    """What the objective of one stage came to in one step: detached scalars by name.

    Attributes:
        terms: Terms of the loss; the stage minimised their sum.
        observed: What the objective noticed beside its loss.
    """

    terms: Mapping[str, Tensor] = field(default_factory=dict)
    observed: Mapping[str, Tensor] = field(default_factory=dict)


Losses: TypeAlias = tuple[LocalLoss, ...]
"""The losses of stage 0, 1, ...; a rank knows its own stages' and those of all stages before."""


_KINDS: dict[str, type[Message]] = {}
"""Every kind of message by its name, which is what travels."""


@dataclass(frozen=True)
class Message:
    """Something that travels in the stream.

    Attributes:
        step: The training step of a batch; else the number of training steps before this point.
    """

    step: int

    def __init_subclass__(cls) -> None:
        _KINDS[cls.__name__] = cls


@dataclass(frozen=True)
class TrainBatch(Message):
    """Forward; send the detached result on at once; then local loss, backward, step.

    Attributes:
        features: The detached output of the stage before; the network's input at the start.
        target: As `Task.prepare` made it.
        carry: What the objective of the stage before hands to that of the next.
        losses: Of all earlier stages in the *previous* step: a batch leaves before its own loss
            exists.
        whole_size: Samples of the whole mini-batch, where `target` holds only those that are left
            for this and later replicas.
    """

    features: Tree
    target: Tensor
    carry: Tree = None
    losses: Losses = ()
    whole_size: int | None = None

    @property
    def rows(self) -> int:
        """Samples of the whole mini-batch."""
        return self.whole_size or len(self.target)


@dataclass(frozen=True)
class ScheduledBatch(TrainBatch):
    """A batch whose features are moved by a schedule of ``torch.distributed.pipelining``.

    Attributes:
        specs: The features that the rank before is going to send, of one micro-batch.
    """

    specs: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True)
class EvalBatch(Message):
    """Forward without gradients, pass on, count.

    Attributes:
        features: The output of the stage before; the network's input at the start.
        target: As for a training batch; None where only predictions are wanted.
        whole_size: As for a training batch.
        first: Place of its first sample in the evaluation.
    """

    features: Tree
    target: Tensor | None
    whole_size: int | None = None
    first: int = 0

    @property
    def rows(self) -> int:
        """Samples of the whole mini-batch."""
        if self.whole_size is not None:
            return self.whole_size
        return len(tensors_of(self.features)[0] if self.target is None else self.target)


@dataclass(frozen=True)
class EvaluationBegins(Message):
    """Mark: batches of an evaluation follow.

    Attributes:
        keep_logits: Whether the last rank keeps what it predicts.
        shared: What the objectives of earlier stages tell the next one for its predictions.
        losses: Of all earlier stages in the last step.
    """

    keep_logits: bool = False
    shared: Tree = None
    losses: Losses = ()


@dataclass(frozen=True)
class EvaluationEnds(Message):
    """Mark: the evaluation is over.

    Attributes:
        counts: Of every earlier stage: sums and counts by name, nothing where it cannot predict.
    """

    counts: tuple[Mapping[str, Tensor], ...] = ()


@dataclass(frozen=True)
class EpochEnds(Message):
    """Mark: the training data were seen once.

    Attributes:
        losses: Of all earlier stages in the last step.
    """

    losses: Losses = ()


@dataclass(frozen=True)
class CheckpointMark(Message):
    """Mark: every stage saves itself, as it is here.

    Attributes:
        epoch: Epochs finished.
        batch: Mini-batches of the current epoch done.
        note: What the caller wants to find again: numbers and text by name.
        losses: Of all earlier stages in the last step.
        run: The name of the run.
        attempt: The name of this mark, in this start of it: parts of two do not make a checkpoint.
    """

    epoch: int
    batch: int
    note: Mapping[str, Any] = field(default_factory=dict)
    losses: Losses = ()
    run: str = ""
    attempt: str = ""


@dataclass(frozen=True)
class Stop(Message):
    """The last message of all.

    Attributes:
        reason: Why the stream ends early; empty at a good end.
        signal: Number of the signal that asked for it, if one did.
    """

    reason: str = ""
    signal: int = 0


def without_earlier(message: Message) -> Message:
    """The same mark as it is where the stream begins: no stage has added anything to it."""
    added: dict[str, Any] = {"losses": (), "counts": (), "shared": None}
    known = {each.name for each in fields(message)}
    return replace(message, **{name: value for name, value in added.items() if name in known})


def encode(message: Message) -> tuple[bytes, list[Tensor]]:
    """Split a message into a self-describing header and its tensors, without pickling.

    Returns:
        The header (JSON) and the tensors in the order in which the header names them.
    """
    tensors: list[Tensor] = []
    values = [_describe(getattr(message, each.name), tensors) for each in fields(message)]
    header = {"kind": type(message).__name__, "values": values}
    return json.dumps(header, separators=(",", ":")).encode(), tensors


def decode(header: bytes) -> tuple[list[TensorSpec], Callable[[list[Tensor]], Message]]:
    """Read a header.

    Returns:
        Which tensors follow, and a function that makes the message of them.

    Raises:
        InputError: if the header is damaged.
    """
    try:
        plain = json.loads(header)
        kind, values = _KINDS[plain["kind"]], plain["values"]
        specs: list[TensorSpec] = []
        for value in values:
            _collect(value, specs)
        if len(values) != len(fields(kind)) or type(values[0]) is not int:
            raise ValueError(f"{kind.__name__} has other fields")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            "A message between ranks must begin with a readable header",
            f"Got {len(header)} bytes that are none ({error})",
            "Run the same version of scpl on every rank",
        ) from error

    def build(tensors: list[Tensor]) -> Message:
        waiting = iter(tensors)
        return kind(*(_restore(value, waiting) for value in values))

    return specs, build


def _describe(value: Any, tensors: list[Tensor]) -> Any:
    """Write a value in JSON: what JSON does not know is a dictionary with one key that says what.

    "t": tensor, "u": tuple, "d": dictionary, "s": form of a tensor, "l": local loss.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"t": _plain(TensorSpec.of(value))}
    if isinstance(value, tuple):
        return {"u": [_describe(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_describe(item, tensors) for item in value]
    if isinstance(value, Mapping):
        return {"d": {key: _describe(item, tensors) for key, item in value.items()}}
    if isinstance(value, TensorSpec):
        return {"s": _plain(value)}
    if isinstance(value, LocalLoss):
        return {"l": [_describe(value.terms, tensors), _describe(value.observed, tensors)]}
    return value


def _plain(spec: TensorSpec) -> list[Any]:
    return [str(spec.dtype).removeprefix("torch."), spec.channels_last, *spec.shape]


def _spec(plain: list[Any]) -> TensorSpec:
    name, channels_last, *shape = plain
    dtype = getattr(torch, name)
    if (
        not isinstance(dtype, torch.dtype)
        or any(type(n) is not int or n < 0 for n in shape)
        or type(channels_last) is not bool
        or (channels_last and len(shape) != 4)
    ):
        raise ValueError(f"{plain} describes no tensor")
    return TensorSpec(tuple(shape), dtype, channels_last)


def _collect(plain: Any, specs: list[TensorSpec]) -> None:
    """List the tensors of a described value, and check it."""
    if isinstance(plain, list):
        for item in plain:
            _collect(item, specs)
    elif isinstance(plain, dict):
        ((tag, inner),) = plain.items()
        if tag in ("t", "s"):
            spec = _spec(inner)
            specs += [spec] if tag == "t" else []
        elif (tag, type(inner)) in (("u", list), ("l", list), ("d", dict)):
            _collect(list(inner.values()) if tag == "d" else inner, specs)
        else:
            raise ValueError(f"{tag!r} is unknown")


def _restore(plain: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(plain, list):
        return [_restore(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((tag, inner),) = plain.items()
    if tag == "t":
        return next(tensors)
    if tag == "s":
        return _spec(inner)
    if tag == "d":
        return {key: _restore(item, tensors) for key, item in inner.items()}
    items = [_restore(item, tensors) for item in inner]
    return LocalLoss(*items) if tag == "l" else tuple(items)
