"""In which types stages compute, and hand on what they computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from scpl.errors import InputError
from scpl.partition.values import Tree, tensors_of, tree_map

__all__ = ["Precision", "narrowed", "widened"]

_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
_SENT = (torch.bfloat16, torch.float16, torch.int8)
_LARGEST = 127  # of int8, and of its negative numbers as well


@dataclass(frozen=True)
class Precision:
    """In which types stages compute, and hand on what they computed.

    Attributes:
        compute: Type of the forward pass. ``bfloat16`` and ``float16`` compute under
            ``torch.autocast``, ``float16`` with a loss scaler in every stage; ``float32`` leaves
            everything in the types of the network (also of a float64 one). Losses are computed in
            at least float32.
        send_as: Type in which values that learn go on from stage to stage in training, to be read
            in their own type again: ``bfloat16`` halves what crosses a cut of a float32 network,
            and ``int8`` quarters it: a row (the features of a token, a map of an image) is divided
            by its largest absolute value and rounded to 255 steps.
            Masks, ids and other values without a gradient go on as they are; so does everything
            in evaluation, which predicts what the exported network predicts. Between two stages of
            one rank values are rounded as well, so the numbers do not depend on the ranks. None:
            all go on as they are.

    Raises:
        InputError: for other types.
    """

    compute: torch.dtype = torch.float32
    send_as: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.compute not in _COMPUTED:
            raise InputError(
                "`precision` must be torch.float32, torch.bfloat16, torch.float16 or an "
                "scpl.Precision",
                f"Got {self.compute!r}",
                "A float64 network computes in float64 with torch.float32, which means no autocast",
            )
        if self.send_as is not None and self.send_as not in _SENT:
            raise InputError(
                "`send_as` must be torch.bfloat16, torch.float16, torch.int8 or None",
                f"Got {self.send_as!r}",
            )

    @classmethod
    def of(cls, precision: torch.dtype | Precision) -> Precision:
        """Read what a user gave: the type of the forward pass alone, or all of it."""
        return precision if isinstance(precision, Precision) else cls(precision)

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Compute in this precision."""
        if self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.compute)


def narrowed(output: Tree, detached: Tree, dtype: torch.dtype) -> Tree:
    """Round the values that learn to a narrower type.

    Values without a gradient may be masks, whose largest numbers have no equal in other types.
    Where nothing has a gradient, because the stage is frozen, the first value is rounded: what an
    objective reads comes first.

    Args:
        output: What a stage computed, attached.
        detached: The same, detached.
        dtype: The narrower type.

    Returns:
        The values, and beside each what to read it with: an empty tensor of its type, or what its
        rows are multiplied by, in its type.
    """
    attached = tensors_of(output)
    learns = [tensor.requires_grad for tensor in attached]
    if not any(learns):
        learns[:1] = [tensor.is_floating_point() for tensor in attached[:1]]
    marks = iter(learns)

    scales: list[Tensor] = []

    def rounded(tensor: Tensor) -> Tensor:
        wider = tensor.is_floating_point() and tensor.dtype.itemsize > dtype.itemsize
        narrow, scale = tensor, tensor.new_empty(0)
        if next(marks) and wider:
            if dtype != torch.int8:
                narrow = tensor.to(dtype)
            elif tensor.ndim > 1:
                narrow, scale = _quantised(tensor)
        scales.append(scale)
        return narrow

    values = tree_map(rounded, detached)
    waiting = iter(scales)
    return {"values": values, "read": tree_map(lambda tensor: next(waiting), detached)}


def widened(received: Tree) -> Tree:
    """Read what `narrowed` rounded, in the types it had."""
    scales = iter(tensors_of(received["read"]))

    def read(tensor: Tensor) -> Tensor:
        scale = next(scales)
        value = tensor.to(scale.dtype)
        return value * scale if scale.ndim > 1 else value

    return tree_map(read, received["values"])


def _quantised(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to int8; returns them, and what they are multiplied by.

    A row is the last dimension; of maps ``[N, C, H, W]``, where that may be short, a whole map.
    What is not finite makes its row NaN.
    """
    row = (2, 3) if tensor.ndim == 4 else (-1,)
    scale = tensor.abs().amax(row, keepdim=True) / _LARGEST
    steps = tensor / torch.where(scale > 0, scale, 1)
    return steps.round().nan_to_num(0).to(torch.int8), scale
