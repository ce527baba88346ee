"""Cut a chain of layers: an ``nn.Sequential``, or a module that calls its children in order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from scpl.errors import PartitionError
from scpl.partition.balance import (
    TooFewLayers,
    all_cuts,
    balanced_cuts,
    chain_levels,
    count_operations,
)
from scpl.partition.inputs import Form
from scpl.partition.layers import (
    Chain,
    ChainBody,
    children,
    is_chain,
    last_with_parameters,
    summary_of,
)
from scpl.partition.pieces import Following, Pieces, find_logits, hint, refuse_shared
from scpl.partition.reading import Features, Reading, ReadThen
from scpl.partition.values import Tree

__all__ = ["chain_cuts", "cut_chain", "is_in_chain"]


def chain_cuts(
    model: nn.Module, num_stages: int, readout: str | None, example: Tree, *, every: bool
) -> list[str] | None:
    """Choose cuts between the layers of a chain; None if it has too few layers.

    Args:
        model: The network.
        num_stages: Number of stages wanted.
        readout: Where the classifier begins.
        example: A small batch.
        every: Return all places where it could be cut instead.
    """
    if every:
        levels = all_cuts(chain_levels(model, readout, example), num_stages)
        return next(iter(levels), None)
    try:
        return balanced_cuts(model, num_stages, readout, example)
    except TooFewLayers:
        return None


def is_in_chain(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether a chain can be cut before these layers: none lies inside of another kind of module.

    A name that does not exist at all is none of them, and will be explained.
    """
    chain, modules = dict(_open_chain(model, names)), dict(model.named_modules())
    return all(name in chain or name not in modules for name in names if name)


def cut_chain(
    model: nn.Module,
    example: Tree,
    before: Sequence[str],
    readout: str | None,
    features: Features | None,
) -> Pieces:
    """Cut a network whose forward pass calls its children one after the other.

    Nested ``nn.Sequential`` children are opened where a cut lies inside them.

    Args:
        model: The network.
        example: What its first layer takes.
        before: Names of layers.
        readout: Where the classifier begins.
        features: How objectives read what a stage hands on; default: as its last layer says.

    Raises:
        PartitionError: if it cannot be cut there.
    """
    chain = _open_chain(model, [*before, *([readout] if readout else [])])
    names = [name for name, _ in chain]
    if readout and readout not in names:
        raise PartitionError(
            "readout must name a layer of the network",
            _explain_unknown(model, names, readout),
            f"The layers are: {', '.join(names)}",
        )
    end = names.index(readout) if readout else last_with_parameters(chain)
    if end is None:
        raise PartitionError("A network must have parameters to be trained", "Got none")
    edges = [0, *_check_cuts(model, names, before, end), end, len(chain)]
    parts = [chain[a:b] for a, b in pairwise(edges)]
    _refuse_shared(parts)
    operations = count_operations(model, example)
    bodies = tuple(ChainBody(part) for part in parts[:-1])
    summaries = [summary_of(part) for part in parts[:-1]]
    readings = [Reading(features) if features else summary for summary in summaries]
    head: nn.Module = ChainBody(parts[-1])
    if summaries[-1]:  # the classifier reads what the objective reads
        head = ReadThen(summaries[-1], head)
    starts = [part[0][0] if part else following[0][0] for part, following in pairwise(parts)]
    return Pieces(
        bodies=bodies,
        readout=head,
        readings=tuple(readings),
        names=tuple(tuple(name for name, _ in part) for part in parts[:-1]),
        readout_names=tuple(names[end:]),
        cuts=tuple(starts[1:]),
        costs=tuple(sum(operations.get(name, 0.0) for name, _ in part) for part in parts[:-1]),
        form=Form.whole(),
        logits=lambda result: find_logits(result, None),
        batch_dims=(None,) * len(bodies),
        following=(*(_following(chain[at:end], features) for at in edges[1:-2]), None),
    )


def _following(rest: Chain, features: Features | None) -> Following | None:
    """Take the next layer that has matrices, and what follows it without any."""
    heavy = [i for i, (_, layer) in enumerate(rest) if any(p.ndim > 1 for p in layer.parameters())]
    unit = rest[: [*heavy, len(rest), len(rest)][1]]
    if not heavy or any(nn.parameter.is_lazy(p) for _, layer in unit for p in layer.parameters()):
        return None
    return Following(ChainBody(unit), Reading(features) if features else summary_of(unit))


def _check_cuts(
    model: nn.Module, names: Sequence[str], before: Sequence[str], first_readout: int
) -> list[int]:
    """Turn names into positions; collect every fault before raising."""
    faults: list[str] = []
    positions: list[int] = []
    for cut in before:
        if cut not in names:
            faults.append(_explain_unknown(model, names, cut))
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


def _refuse_shared(parts: Sequence[Chain]) -> None:
    uses: list[dict[int, str]] = []
    for part in parts:
        named = ((f"{n}.{key}", p) for n, layer in part for key, p in layer.named_parameters())
        uses.append({id(parameter): repr(name) for name, parameter in named})
    refuse_shared([*uses[:-2], uses[-2] | uses[-1]], "parameter")


def _open_chain(model: nn.Module, wanted: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """List the chain's layers by dotted name, opening a Sequential only if a cut lies inside."""
    chain: list[tuple[str, nn.Module]] = []

    def visit(prefix: str, module: nn.Module) -> None:
        for name, child in children(module):
            full = f"{prefix}{name}"
            inside = any(cut.startswith(f"{full}.") for cut in wanted)
            if inside and is_chain(child):
                visit(f"{full}.", child)
            else:
                chain.append((full, child))

    visit("", model)
    if not chain:
        raise PartitionError(
            "A network must have named layers to be cut",
            f"Got {type(model).__name__} without children",
        )
    return chain


def _explain_unknown(model: nn.Module, names: Sequence[str], cut: str) -> str:
    """Say why ``cut`` is not among the names of the chain, and what comes closest."""
    parts = cut.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        parent = ".".join(parts[:depth])
        if parent in names:
            module = model.get_submodule(parent)
            inner = [name for name, _ in children(module)]
            full = [f"{parent}.{name}" for name in inner]
            return f"there is no layer {cut!r} in {parent!r}{hint(cut, full)}"
    return f"there is no layer {cut!r}{hint(cut, names)}"
