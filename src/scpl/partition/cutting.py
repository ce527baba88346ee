"""Cut a network into stages, and prove on an example that nothing changed.

A network can be cut where its forward pass is a *chain*: an ``nn.Sequential``, or a module whose
forward calls its named children one after the other. Nested ``nn.Sequential`` children are opened
where a cut lies inside them. The stages reference the user's own layers, so training them trains
the user's network, under its own ``state_dict`` keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from scpl.errors import PartitionError
from scpl.partition.balance import balanced_cuts, count_operations
from scpl.partition.chain import explain_unknown, open_chain
from scpl.partition.verify import check_agreement

__all__ = ["Partition", "split"]


@dataclass(frozen=True)
class Partition:
    """A network cut into stages.

    Attributes:
        model: The user's network.
        bodies: The layers of each stage, in order; the readout is in none of them.
        names: For each stage the dotted names of its layers in `model`.
        readout: The classifier at the end of the network, ``features -> logits [N, C]``.
        readout_names: The dotted names of the readout's layers.
        feature_shapes: For each stage the shape of one sample of what its objective sees.
        num_outputs: Number of logits C.
        costs: Floating-point operations of each stage's layers on the example.
    """

    model: nn.Module
    bodies: tuple[nn.Sequential, ...]
    names: tuple[tuple[str, ...], ...]
    readout: nn.Sequential
    readout_names: tuple[str, ...]
    feature_shapes: tuple[tuple[int, ...], ...]
    num_outputs: int
    costs: tuple[float, ...]

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return len(self.bodies)

    @property
    def cuts(self) -> tuple[str, ...]:
        """The names of the layers that the second and later stages begin with."""
        after = [*self.names[1:], self.readout_names]
        firsts = [name[0] if name else following[0] for name, following in pairwise(after)]
        return tuple(firsts)

    def merged(self) -> Partition:
        """The same network as one stage, for end-to-end training."""
        layers = [layer for body in self.bodies for layer in body]
        names = tuple(name for stage in self.names for name in stage)
        return Partition(
            self.model,
            (nn.Sequential(*layers),),
            (names,),
            self.readout,
            self.readout_names,
            self.feature_shapes[-1:],
            self.num_outputs,
            (sum(self.costs),),
        )


def split(
    model: nn.Module,
    before: Sequence[str] | None = None,
    *,
    num_stages: int | None = None,
    readout: str | None = None,
    example: Tensor,
) -> Partition:
    """Cut ``model`` into stages.

    Args:
        model: An ``nn.Sequential`` or a module that calls its named children in order.
        before: The layers that the second and later stages begin with, by dotted name.
        num_stages: Instead of `before`: cut into this many stages of about equal cost
            (floating-point operations, so that every rank finds the same cuts).
        readout: The layer at which the classifier begins. Default: the last layer that has
            parameters.
        example: A small batch ``[N, ...]``; the chained stages must give exactly the model's
            output on it.

    Returns:
        The stages; they share their layers with `model`.

    Raises:
        PartitionError: if the cuts cannot be made; all faults are reported at once.
    """
    if (before is None) == (num_stages is None):
        raise PartitionError(
            "split needs either `before` (names of layers) or `num_stages`",
            "Got both" if before is not None else "Got neither",
        )
    if before is not None and not isinstance(before, (str, list, tuple)):
        raise PartitionError(
            "`before` must be a list of layer names",
            f"Got {before!r}",
            "For a number of stages pass num_stages=...",
        )
    if isinstance(before, str):
        before = [before]
    if before is None:
        assert num_stages is not None
        before = balanced_cuts(model, num_stages, readout, example)
    chain = open_chain(model, [*before, *([readout] if readout else [])])
    names = [name for name, _ in chain]
    if readout and readout not in names:
        raise PartitionError(
            "readout must name a layer of the network",
            explain_unknown(model, names, readout),
            f"The layers are: {', '.join(names)}",
        )
    first_readout = names.index(readout) if readout else _default_readout(chain)
    starts = _check_cuts(model, names, list(before), first_readout)
    _refuse_shared_parameters(chain, [0, *starts, first_readout])

    edges = [0, *starts, first_readout]
    ranges = [slice(a, b) for a, b in pairwise(edges)]
    layers = [layer for _, layer in chain]
    bodies = tuple(nn.Sequential(*layers[part]) for part in ranges)
    head = nn.Sequential(*layers[first_readout:])
    shapes, num_outputs = check_agreement(model, bodies, head, example)
    operations = count_operations(model, example)
    return Partition(
        model,
        bodies,
        tuple(tuple(names[part]) for part in ranges),
        head,
        tuple(names[first_readout:]),
        shapes,
        num_outputs,
        tuple(sum(operations.get(name, 0.0) for name in names[part]) for part in ranges),
    )


def _default_readout(chain: Sequence[tuple[str, nn.Module]]) -> int:
    for index in range(len(chain) - 1, -1, -1):
        if any(True for _ in chain[index][1].parameters()):
            return index
    raise PartitionError("A network must have parameters to be trained", "Got none")


def _check_cuts(
    model: nn.Module, names: Sequence[str], before: list[str], first_readout: int
) -> list[int]:
    """Turn names into positions; collect every fault before raising."""
    faults: list[str] = []
    positions: list[int] = []
    for cut in before:
        if cut not in names:
            faults.append(explain_unknown(model, names, cut))
            continue
        position = names.index(cut)
        if position == 0:
            faults.append(f"{cut!r} is the first layer: the stage before it would be empty")
        elif position > first_readout:
            faults.append(
                f"{cut!r} lies inside the readout, which begins at {names[first_readout]!r}"
            )
        if before.count(cut) > 1 and f"{cut!r} is named twice" not in faults:
            faults.append(f"{cut!r} is named twice")
        if positions and position < positions[-1]:
            faults.append(
                f"{cut!r} comes before {names[positions[-1]]!r} in the network, "
                "but after it in the list"
            )
        positions.append(position)
    if faults:
        raise PartitionError(
            "Cuts must name layers of the network, in its order, each once",
            "Faults:\n" + "\n".join(f"  - {fault}" for fault in faults) + "\n",
            f"The layers are: {', '.join(names)}",
        )
    return positions


def _refuse_shared_parameters(chain: Sequence[tuple[str, nn.Module]], edges: Sequence[int]) -> None:
    """Two stages that share a parameter would each train it on their own."""
    owner: dict[int, tuple[int, str]] = {}
    for index, (name, layer) in enumerate(chain):
        part = sum(index >= edge for edge in edges)
        for key, parameter in layer.named_parameters():
            known = owner.setdefault(id(parameter), (part, f"{name}.{key}"))
            if known[0] != part:
                raise PartitionError(
                    "A parameter must belong to one stage",
                    f"{known[1]!r} and '{name}.{key}' are the same tensor in two stages",
                    "Move the cut, or give each layer its own copy",
                )
