"""The pieces that a network is cut into, however that is done."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from torch import Tensor, fx, nn

from scpl.errors import PartitionError
from scpl.partition.inputs import Form
from scpl.partition.values import Tree, tree_map

__all__ = [
    "MIXED",
    "Dimensions",
    "Following",
    "OwnCopy",
    "Pieces",
    "Read",
    "find_logits",
    "hint",
    "refuse_shared",
    "tied_names",
]

Read: TypeAlias = Callable[[Tree], Tensor]
Dimensions: TypeAlias = "tuple[int | None, ...] | None"
MIXED = -1


@final
class OwnCopy(nn.Module):
    """A copy of layers with weights of its own, read as one tensor with a row per sample.

    Args:
        body: What is copied.
        reading: How its result is read; None: as it is.
    """

    def __init__(self, body: nn.Module, reading: Read | None) -> None:
        super().__init__()
        self.body = copy.deepcopy(body)
        self.reading = reading

    def forward(self, values: Tree) -> Tensor:
        """Compute ``[N, ...]`` of what comes in."""
        result = self.body(values)
        features: Tensor = result if self.reading is None else self.reading(result)
        return features


@dataclass(frozen=True)
class Following:
    """The layers that follow a cut, up to the next place where one could cut as well.

    Of a Transformer that is the attention or the feed-forward part of the next layer.

    Attributes:
        body: Takes what the stage before hands on. It holds the network's own parameters, so it is
            for copying: `own_copy`.
        reading: How what it computes is read.
        shape: Of one sample of that.
    """

    body: nn.Module
    reading: Read | None
    shape: tuple[int, ...] = ()

    def own_copy(self) -> OwnCopy:
        """Copy the layers as they are now."""
        return OwnCopy(self.body, self.reading)


@dataclass(frozen=True)
class Pieces:
    """What cutting a network gives.

    Attributes:
        bodies: For each stage a module from what comes in to what the stage hands on. It holds the
            network's own parameters and buffers under their own keys.
        readout: From what the last stage hands on to logits.
        readings: For each stage how its objective reads what it hands on; None: as it is.
        names: For each stage the dotted names of its layers.
        readout_names: The dotted names of the classifier's layers.
        cuts: The layers that the second and later stages begin with.
        costs: Floating-point operations of each stage's layers, or what it was measured to cost.
        form: How a batch becomes the network's arguments.
        logits: Finds the logits in what the network returns.
        batch_dims: For each stage and each value that it hands on, in evaluation mode, the
            dimension that is the batch (None: it has none; MIXED: it cannot be told apart). Of a
            chain it is the first one everywhere.
        following: For each stage the layers behind its end; None for the last one, and where they
            cannot be had alone.
    """

    bodies: tuple[nn.Module, ...]
    readout: nn.Module
    readings: tuple[Read | None, ...]
    names: tuple[tuple[str, ...], ...]
    readout_names: tuple[str, ...]
    cuts: tuple[str, ...]
    costs: tuple[float, ...]
    form: Form
    logits: Callable[[Any], Any]
    batch_dims: tuple[Dimensions, ...]
    following: tuple[Following | None, ...]

    def run(self, values: Tree) -> Tensor:
        """Compute logits of an arranged batch, stage by stage.

        Each stage gets copies, as if it had received them.
        """
        for body in self.bodies:
            values = tree_map(Tensor.clone, body(values))
        logits: Tensor = self.readout(values)
        return logits


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """List all names of each parameter and buffer, by its identity."""
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
    return names


def refuse_shared(uses: Sequence[dict[int, str]], kind: str) -> None:
    """Two stages that share a tensor would each change it on their own.

    Args:
        uses: For each stage the tensors it uses, by identity, and what to call each.
        kind: What they are.

    Raises:
        PartitionError: naming each that is used in several stages.
    """
    faults: list[str] = []
    owner: dict[int, tuple[int, str]] = {}
    for stage, tensors in enumerate(uses):
        for identity, name in tensors.items():
            first, known = owner.setdefault(identity, (stage, name))
            if first != stage:
                same = f"{known} and {name} are the same tensor"
                same = same if name != known else f"{name} is used"
                faults.append(f"{same} in stages {first} and {stage}")
    if faults:
        raise PartitionError(
            f"A {kind} must belong to one stage",
            "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else ""),
            "Move the cut, or give each layer its own copy",
        )


def hint(wanted: str, known: Sequence[str]) -> str:
    """Ask whether another name was meant."""
    close = difflib.get_close_matches(wanted, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def find_logits(result: Any, output: str | int | None) -> Any:
    """Find the logits in what a network returns.

    Args:
        result: A tensor, or a tuple, list or mapping (of ``transformers``: with ``logits``).
        output: The key or place of the logits. Default: the only output, or ``logits``.

    Raises:
        PartitionError: if that does not say which.
    """
    if isinstance(result, (Tensor, fx.Node)) and output is None:
        return result
    if isinstance(result, Mapping):
        known: dict[Any, Any] = dict(result)
    elif isinstance(result, (tuple, list)):
        known = dict(enumerate(result))
    else:
        known = {}
    key = output
    if key is None:
        key = (
            "logits" if "logits" in known else next(iter(known), None) if len(known) == 1 else None
        )
    if key not in known or not isinstance(known[key], (Tensor, fx.Node)):
        raise PartitionError(
            "`output` must say which output of the network holds the logits",
            f"Got {output!r} for {', '.join(map(repr, known)) or type(result).__name__}",
            "Pass its key or its number",
        )
    return known[key]
