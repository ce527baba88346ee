"""Cut a network into stages, and prove on an example that nothing changed.

A network can be cut where its forward pass is a *chain*: an ``nn.Sequential``, or a module whose
forward calls its named children one after the other. Nested ``nn.Sequential`` children are opened
where a cut lies inside them. The stages reference the user's own layers, so training them trains
the user's network, under its own ``state_dict`` keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from scpl.errors import PartitionError
from scpl.partition.balance import balanced_cuts, count_operations
from scpl.partition.layers import (
    Chain,
    Summary,
    children,
    is_chain,
    last_with_parameters,
    summary_of,
    undisturbed,
)
from scpl.partition.values import TensorSpec, Tree, tensors_of, tree_map

__all__ = ["Partition", "split"]

_EXAMPLE = "Check the shape of the example against the network's first layer"
_CHAIN = "The network's layers must accept the example batch one after the other"
_ADVICE = (
    "Its forward does more than call its children in order: make such steps layers "
    "(torch.flatten -> nn.Flatten, a residual sum -> a block module)"
)
_READS_SUMMARY = (
    "The readout must read what the last layer before it says of its output (`summarize`)"
)
_POOL = (
    "Make the summary a layer of the network before the readout (as `pool` in the text networks "
    "of scpl.models), or name a later layer as readout"
)


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
        return tuple(name[0] if name else following[0] for name, following in pairwise(after))

    def merged(self) -> Partition:
        """The same network as one stage, for end-to-end training."""
        layers = [layer for body in self.bodies for layer in body]
        return replace(
            self,
            bodies=(nn.Sequential(*layers),),
            names=(tuple(name for stage in self.names for name in stage),),
            feature_shapes=self.feature_shapes[-1:],
            costs=(sum(self.costs),),
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
    chain = _open_chain(model, [*before, *([readout] if readout else [])])
    names = [name for name, _ in chain]
    if readout and readout not in names:
        raise PartitionError(
            "readout must name a layer of the network",
            _explain_unknown(model, names, readout),
            f"The layers are: {', '.join(names)}",
        )
    first_readout = names.index(readout) if readout else last_with_parameters(chain)
    if first_readout is None:
        raise PartitionError("A network must have parameters to be trained", "Got none")
    edges = [0, *_check_cuts(model, names, before, first_readout), first_readout]
    _refuse_shared_parameters(chain, edges)

    ranges = [slice(a, b) for a, b in pairwise(edges)]
    layers = [layer for _, layer in chain]
    bodies = tuple(nn.Sequential(*layers[stage]) for stage in ranges)
    head = nn.Sequential(*layers[first_readout:])
    shapes, num_outputs = _check_equality(model, bodies, head, example)
    operations = count_operations(model, example)
    return Partition(
        model,
        bodies,
        tuple(tuple(names[stage]) for stage in ranges),
        head,
        tuple(names[first_readout:]),
        shapes,
        num_outputs,
        tuple(sum(operations.get(name, 0.0) for name in names[stage]) for stage in ranges),
    )


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


def _refuse_shared_parameters(chain: Chain, edges: Sequence[int]) -> None:
    """Two stages that share a parameter would each train it on their own."""
    owner: dict[int, tuple[int, str]] = {}
    for index, (name, layer) in enumerate(chain):
        stage = sum(index >= edge for edge in edges)
        for key, parameter in layer.named_parameters():
            known = owner.setdefault(id(parameter), (stage, f"{name}.{key}"))
            if known[0] != stage:
                raise PartitionError(
                    "A parameter must belong to one stage",
                    f"{known[1]!r} and '{name}.{key}' are the same tensor in two stages",
                    "Move the cut, or give each layer its own copy",
                )


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
            if parts[depth] in inner and not is_chain(module):
                return (
                    f"{cut!r} lies inside {parent!r}, a {type(module).__name__}: only a "
                    "plain nn.Sequential can be cut inside"
                )
            full = [
                f"{parent}.{name}" for name in difflib.get_close_matches(parts[depth], inner, 1)
            ]
            return f"there is no layer {cut!r} in {parent!r}" + _hint(full)
    return f"there is no layer {cut!r}" + _hint(difflib.get_close_matches(cut, names, 1))


def _hint(close: Sequence[str]) -> str:
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_equality(
    model: nn.Module, bodies: Sequence[nn.Sequential], readout: nn.Sequential, example: Tensor
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Check that the stages compute on ``example`` exactly what the network does.

    Returns:
        For each stage the shape of one sample of what its objective sees, and the number of logits.

    Raises:
        PartitionError: if the network or a stage does not accept the example, or they differ.
    """
    shapes: list[tuple[int, ...]] = []
    with undisturbed(model, example):
        expected = _run(model, example, "The network must accept the example batch", _EXAMPLE)
        features: Tree = _fresh(example)
        seen, rule, fix = features, f"{_CHAIN} (readout)", _ADVICE
        for index, body in enumerate(bodies):
            features = _run(body, features, f"{_CHAIN} (stage {index})", _ADVICE)
            summary = summary_of(body)
            seen = _summarise(summary, features, index) if summary else features
            shapes.append(_sample_shape(seen, index))
        if summary_of(bodies[-1]):
            rule, fix = _READS_SUMMARY, _POOL
        found = _run(readout, seen, rule, fix)
    if not _same(expected, found):
        raise PartitionError(
            "The chained layers must give exactly the network's output on the example",
            f"{type(model).__name__}.forward gives {_describe(expected)}, "
            f"its layers in order give {_describe(found)}",
            _ADVICE,
        )
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise PartitionError("The network must end in logits [N, C]", f"Got {_describe(found)}")
    return tuple(shapes), found.shape[1]


def _run(module: nn.Module, inputs: Tensor, rule: str, fix: str) -> Tensor:
    try:
        result: Tensor = module(_fresh(inputs))
    except Exception as error:
        raise PartitionError(
            rule,
            f"On {_describe(inputs)} it raised {type(error).__name__}: {error}",
            fix,
        ) from error
    return result


def _fresh(tree: Tensor) -> Tensor:
    """Copy, because a first layer that works in place would change the caller's tensor."""
    copied: Tensor = tree_map(Tensor.clone, tree)
    return copied


def _summarise(summary: Summary, features: Tensor, index: int) -> Tensor:
    try:
        seen = summary(features)
    except Exception as error:
        raise PartitionError(
            f"A layer must be able to summarise its own output (stage {index})",
            f"On {_describe(features)} `summarize` raised {type(error).__name__}: {error}",
        ) from error
    num_samples = len(tensors_of(features)[0])
    if not isinstance(seen, Tensor) or seen.ndim < 2 or len(seen) != num_samples:
        raise PartitionError(
            f"A summary must be one tensor with a row per sample (stage {index})",
            f"Got {_describe(seen)} for {num_samples} samples",
        )
    return seen


def _sample_shape(features: Tensor, index: int) -> tuple[int, ...]:
    for tensor in tensors_of(features):
        return tuple(tensor.shape[1:])
    raise PartitionError("A stage must hand on a tensor", f"Stage {index} hands on none")


def _same(expected: Tensor, found: Tensor) -> bool:
    one, other = tensors_of(expected), tensors_of(found)
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(one, other, strict=True)
    )


def _describe(tree: Tensor) -> str:
    return " and ".join(str(TensorSpec.of(tensor)) for tensor in tensors_of(tree)) or "nothing"
