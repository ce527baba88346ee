"""Back to a plain module: the trained network, or one with exits, the same on every rank."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

from torch import nn

from scpl.assembly import build_objective
from scpl.control import Control
from scpl.errors import InputError
from scpl.exits import PREFIX, ExitNetwork
from scpl.methods.base import Method
from scpl.partition import Partition
from scpl.stage import Stage

__all__ = ["Sources", "build_exits", "export_exits", "export_network"]

Sources = dict[str, tuple[int, str]]
"""For each key of an exit its stage, and its key in the state of that stage's objective."""


def export_network(
    parts: Partition,
    method: Method,
    stages: Sequence[Stage],
    control: Control,
    owners: Sequence[int],
) -> nn.Module:
    """Return the network that predicts: a copy on the CPU, in eval mode; all ranks call it.

    Args:
        parts: The network that is trained.
        method: Says whether its own read-out predicts.
        stages: Those of this rank.
        control: The tie between the ranks.
        owners: For each stage the rank whose weights count.

    Returns:
        The user's module; or one with another read-out, if the method has one of its own.
    """
    copied = _copy(parts, control, owners)
    if not method.replaces_readout:
        return copied.model
    return _with_exits(copied, method, stages, control, owners, [parts.num_stages - 1])


def export_exits(
    parts: Partition,
    method: Method,
    stages: Sequence[Stage],
    control: Control,
    owners: Sequence[int],
) -> ExitNetwork:
    """Return the network with an exit after every stage; otherwise as `export_network`.

    Raises:
        InputError: if not every stage can predict under this method.
    """
    if not method.has_exits:
        raise InputError(
            "Only a method whose stages all predict has early exits",
            f"Got {method.name}",
            "Train with early-exit, dascpl, dgl, predsim, deinforeg or al",
        )
    copied, every = _copy(parts, control, owners), range(parts.num_stages)
    return _with_exits(copied, method, stages, control, owners, every)


def build_exits(
    parts: Partition, method: Method, stages: Iterable[int]
) -> tuple[ExitNetwork, Sources]:
    """Build the structure of a network with exits; all ranks build the same.

    Args:
        parts: The partitioned network; its layers become part of the result.
        method: Whose objectives know how to read logits out of the features.
        stages: Which of them get an exit: the last one, at least.

    Returns:
        The network, its exits with weights of no meaning, and where their weights are to be found.

    Raises:
        InputError: if an objective cannot predict.
    """
    objectives = [build_objective(parts, method, k, seed=0) for k in range(parts.num_stages)]
    owner = {
        id(value): (stage, key)
        for stage, objective in enumerate(objectives)
        for key, value in objective.state_dict(keep_vars=True).items()
    }
    exits: dict[int, nn.Module] = {}
    sources: Sources = {}
    for stage in stages:
        reader = objectives[stage].reader(objectives[:stage])
        if reader is None:
            raise InputError(
                f"Every stage must predict to be an exit (method {method.name})",
                f"Got none from stage {stage}",
                "Implement `reader` of its objective",
            )
        if reader is parts.readout:
            exits[stage] = reader
            continue
        for key, value in reader.state_dict(keep_vars=True).items():
            sources[f"{PREFIX}.{stage}.{key}"] = owner[id(value)]
        exits[stage] = copy.deepcopy(reader)  # exits may have modules in common; keys have not
    return ExitNetwork(parts, exits), sources


def _copy(parts: Partition, control: Control, owners: Sequence[int]) -> Partition:
    """Copy the network with each layer's weights from the rank that trains it."""
    copied = copy.deepcopy(parts)
    model = copied.model.cpu().eval()
    names = [*parts.names[:-1], (*parts.names[-1], *parts.readout_names)]
    for owner, layers in zip(owners, names, strict=True):
        for name in layers:
            for value in model.get_submodule(name).state_dict().values():
                control.broadcast(value, owner)
    return copied


def _with_exits(
    parts: Partition,
    method: Method,
    stages: Sequence[Stage],
    control: Control,
    owners: Sequence[int],
    wanted: Iterable[int],
) -> ExitNetwork:
    network, sources = build_exits(parts, method, wanted)
    state = network.cpu().state_dict()
    trained = {stage.index: stage.objective.state_dict() for stage in stages}
    for key, (stage, name) in sources.items():
        if stage in trained:
            state[key].copy_(trained[stage][name])
        control.broadcast(state[key], owners[stage])
    return network.eval()
