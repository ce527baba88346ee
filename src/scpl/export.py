"""Back to a plain module: the trained network, or one with exits, the same on every rank."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

from torch import nn

from scpl.assembly import build_exits
from scpl.control import Control
from scpl.errors import InputError
from scpl.exits import ExitNetwork
from scpl.methods.base import Method
from scpl.partition import Partition
from scpl.stage import Stage

__all__ = ["export_exits", "export_network"]


def export_network(
    parts: Partition, method: Method, stages: Sequence[Stage], control: Control
) -> nn.Module:
    """Return the network that predicts: a copy on the CPU, in eval mode; all ranks call it.

    Args:
        parts: The network that is trained.
        method: Says whether its own read-out predicts.
        stages: Those of this rank.
        control: The tie between the ranks.

    Returns:
        The user's module; or one with another read-out, if the method has one of its own.
    """
    copied = _copy(parts, control)
    if not method.replaces_readout:
        return copied.model
    return _with_exits(copied, method, stages, control, [parts.num_stages - 1])


def export_exits(
    parts: Partition, method: Method, stages: Sequence[Stage], control: Control
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
    return _with_exits(_copy(parts, control), method, stages, control, range(parts.num_stages))


def _copy(parts: Partition, control: Control) -> Partition:
    """Copy the network with each layer's weights from the rank that trains it."""
    copied = copy.deepcopy(parts)
    model = copied.model.cpu().eval()
    names = [*parts.names[:-1], (*parts.names[-1], *parts.readout_names)]
    owners = control.mesh.owners(parts.num_stages)
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
    wanted: Iterable[int],
) -> ExitNetwork:
    network, sources = build_exits(parts, method, wanted)
    state = network.cpu().state_dict()
    trained = {stage.index: stage.objective.state_dict() for stage in stages}
    owners = control.mesh.owners(parts.num_stages)
    for key, (stage, name) in sources.items():
        if stage in trained:
            state[key].copy_(trained[stage][name])
        control.broadcast(state[key], owners[stage])
    return network.eval()
