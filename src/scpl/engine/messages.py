"""What crosses a cut: a small frozen value with a header that can explain its differences.

Traffic goes one way, down the line. Four kinds of message exist; everything a later stage needs
(targets, masks, the losses of earlier stages) travels with the batch, so only the first stage's
rank reads data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from scpl.errors import InputError
from scpl.partition.values import TensorSpec, Tree

__all__ = [
    "OBSERVED",
    "Kind",
    "Mark",
    "Message",
    "decode",
    "encode",
]

OBSERVED = "observed:"
"""Prefix of the names in a message's reports that are no terms of a loss."""


class Kind(IntEnum):
    """The four kinds of message."""

    TRAIN = 0
    EVAL = 1
    BARRIER = 2
    STOP = 3


class Mark(IntEnum):
    """What a barrier stands for."""

    EPOCH_END = 0
    EVALUATION_BEGIN = 1
    EVALUATION_END = 2
    CHECKPOINT = 3


@dataclass(frozen=True)
class Message:
    """One message of the stream.

    Attributes:
        kind: What the receiving stage must do.
        step: The training step (train), the batch of the evaluation (eval), or the number of
            training steps before this point of the stream (barrier).
        features: The detached output of the stage before; the network's input at the start.
        target: Class indices ``[N]``; absent when only predictions are wanted.
        carry: What an objective hands to the objective of the next stage, else None: with a
            batch that is learnt from, and with the mark at which an evaluation begins.
        reports: One dict of scalar tensors per earlier stage. On train messages and barriers:
            the losses of the *previous* step (a message leaves before its own loss exists), and
            what the objectives observed, under names with the prefix `OBSERVED`.
            On the end of an evaluation: its counts.
        mark: What a barrier stands for.
        note: Small JSON values, e.g. the path of a checkpoint.
    """

    kind: Kind
    step: int
    features: Tree = None
    target: Tensor | None = None
    carry: Tree = None
    reports: tuple[dict[str, Tensor], ...] = ()
    mark: Mark | None = None
    note: Mapping[str, Any] = field(default_factory=dict)


def encode(message: Message) -> tuple[bytes, list[Tensor]]:
    """Split a message into a self-describing header and its tensors, without pickling.

    Returns:
        The header (JSON) and the tensors in the order the header lists them.
    """
    tensors: list[Tensor] = []

    def place(tensor: Tensor) -> dict[str, Any]:
        spec = TensorSpec.of(tensor)
        tensors.append(tensor)
        return {"t": [str(spec.dtype).removeprefix("torch."), *spec.shape]}

    body = [message.features, message.target, message.carry, list(message.reports)]
    header = {
        "kind": int(message.kind),
        "step": message.step,
        "mark": None if message.mark is None else int(message.mark),
        "note": dict(message.note),
        "body": [_skeleton(item, place) for item in body],
    }
    return json.dumps(header, separators=(",", ":")).encode(), tensors


def decode(header: bytes) -> tuple[list[TensorSpec], Callable[[list[Tensor]], Message]]:
    """Read a header.

    Returns:
        What tensors follow, and a function that turns them into the message.

    Raises:
        InputError: if the header is damaged.
    """
    try:
        fields = json.loads(header)
        specs: list[TensorSpec] = []
        features, target, carry, reports = fields["body"]
        for item in fields["body"]:
            _collect_specs(item, specs)
        kind, mark = Kind(fields["kind"]), fields["mark"]
        mark = None if mark is None else Mark(mark)
        step, note = int(fields["step"]), dict(fields["note"])
        _expect(isinstance(reports, list), "reports")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            "A message between stages must begin with a readable header",
            f"Got {len(header)} bytes that are none ({error})",
            "Run the same version of scpl on every rank",
        ) from error

    def build(tensors: list[Tensor]) -> Message:
        waiting = iter(tensors)
        filled = [_fill(item, waiting) for item in (features, target, carry, reports)]
        return Message(kind, step, filled[0], filled[1], filled[2], tuple(filled[3]), mark, note)

    return specs, build


def _skeleton(tree: Tree, place: Callable[[Tensor], dict[str, Any]]) -> Any:
    """Describe a tree in JSON: tensors {"t"}, tuples {"u"}, dicts {"d"}, lists as lists."""
    if isinstance(tree, Tensor):
        return place(tree)
    if tree is None:
        return None
    if isinstance(tree, tuple):
        return {"u": [_skeleton(item, place) for item in tree]}
    if isinstance(tree, list):
        return [_skeleton(item, place) for item in tree]
    return {"d": {key: _skeleton(item, place) for key, item in tree.items()}}


def _collect_specs(skeleton: Any, specs: list[TensorSpec]) -> None:
    if skeleton is None:
        return
    if isinstance(skeleton, list):
        for item in skeleton:
            _collect_specs(item, specs)
        return
    _expect(isinstance(skeleton, dict) and len(skeleton) == 1, "a tree")
    ((tag, inner),) = skeleton.items()
    if tag == "t":
        name, *shape = inner
        dtype = getattr(torch, name)
        _expect(isinstance(dtype, torch.dtype), "a type")
        _expect(all(type(size) is int and size >= 0 for size in shape), "a shape")
        specs.append(TensorSpec(tuple(shape), dtype))
    else:
        _expect((tag, type(inner)) in (("u", list), ("d", dict)), "a tree")
        _collect_specs(inner if tag == "u" else list(inner.values()), specs)


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} was expected")


def _fill(skeleton: Any, tensors: Any) -> Tree:
    if skeleton is None:
        return None
    if isinstance(skeleton, list):
        return [_fill(item, tensors) for item in skeleton]
    if "t" in skeleton:
        return next(tensors)
    if "u" in skeleton:
        return tuple(_fill(item, tensors) for item in skeleton["u"])
    return {key: _fill(item, tensors) for key, item in skeleton["d"].items()}
