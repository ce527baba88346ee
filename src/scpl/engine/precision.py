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
_SENT = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Precision:
    """In which types stages compute, and hand on what they computed.

    Attributes:
        compute: Type of the forward pass. ``bfloat16`` and ``float16`` compute under
            ``torch.autocast``, ``float16`` with a loss scaler in every stage; ``float32`` leaves
            everything in the types of the network (also of a float64 one). Losses are computed in
            at least float32.
        send_as: Type in which values that learn go on from stage to stage in training, to be read
            in their own type again: ``bfloat16`` halves what crosses a cut of a float32 network.
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
                "`send_as` must be torch.bfloat16, torch.float16 or None", f"Got {self.send_as!r}"
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
        The values, and beside them empty tensors of the types to read them in.
    """
    attached = tensors_of(output)
    learns = [tensor.requires_grad for tensor in attached]
    if not any(learns):
        learns[:1] = [tensor.is_floating_point() for tensor in attached[:1]]
    marks = iter(learns)

    def rounded(tensor: Tensor) -> Tensor:
        wider = tensor.is_floating_point() and tensor.dtype.itemsize > dtype.itemsize
        return tensor.to(dtype) if next(marks) and wider else tensor

    types = tree_map(lambda tensor: tensor.new_empty(0), detached)
    return {"values": tree_map(rounded, detached), "types": types}


def widened(received: Tree) -> Tree:
    """Read what `narrowed` rounded, in the types it had."""
    types = iter(tensors_of(received["types"]))
    return tree_map(lambda tensor: tensor.to(next(types).dtype), received["values"])
