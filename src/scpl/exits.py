"""A plain network that can predict after several stages, and let sure samples leave early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scpl.errors import InputError
from scpl.message import Tree, tree_map
from scpl.partition import Partition
from scpl.summary import summary_of

__all__ = ["PREFIX", "EarlyExits", "ExitNetwork"]

PREFIX = "exits"
"""Keys of what is not the user's own begin with this, and the number of a stage."""


class EarlyExits(NamedTuple):
    """What `ExitNetwork.leave_early` found.

    Attributes:
        logits: ``[N, C]``, float32, in the order of the inputs.
        stages: The stage at which each sample left, ``[N]``.
    """

    logits: Tensor
    stages: Tensor


class ExitNetwork(nn.Module):
    """The layers of a network under their own keys, with a way to logits after some stages.

    Called like the network itself it predicts with the last exit. It is a module like any other:
    it can be moved, copied, saved and loaded.

    Args:
        parts: The network, cut into stages. Its layers become part of this module. Its read-out
            does too, unless the last exit is another module.
        exits: For some stages, the last one among them, the module from features to logits.
    """

    def __init__(self, parts: Partition, exits: Mapping[int, nn.Module]) -> None:
        super().__init__()
        model, last = parts.model, parts.num_stages - 1
        # Not by add_module: the user's names must not be refused because a method is called alike.
        self._parameters.update(model._parameters)
        self._buffers.update(model._buffers)
        self._non_persistent_buffers_set.update(model._non_persistent_buffers_set)
        self._modules.update(model._modules)
        if PREFIX in self._modules:
            raise InputError(
                f"A network with early exits must have no layer called {PREFIX!r}",
                f"Got {type(model).__name__} with one",
                "Rename it",
            )
        own = {str(k): module for k, module in exits.items() if module is not parts.readout}
        self._modules[PREFIX] = nn.ModuleDict(own)
        if exits[last] is not parts.readout:
            for name in parts.readout_names:
                parent, _, leaf = name.rpartition(".")
                del (model.get_submodule(parent) if parent else self)._modules[leaf]
        self._bodies = parts.bodies  # in a tuple, so that layers have no second key
        self._exits = tuple(exits.get(index) for index in range(parts.num_stages))

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self._bodies)

    def forward(self, inputs: Any) -> Tensor:
        """Return the logits ``[N, C]`` of the last exit."""
        features: Tree = inputs
        for body in self._bodies:
            features = body(features)
        reader = self._exits[-1]
        assert reader is not None
        logits: Tensor = reader(_seen(self._bodies[-1], features))
        return logits

    def leave_early(self, inputs: Any, threshold: float) -> EarlyExits:
        """Predict each sample at the first exit that is sure of it.

        After each stage with an exit, samples whose largest softmax probability reaches the
        threshold leave; the others go on, as a smaller batch. All leave at the last exit.

        Args:
            inputs: A batch: a tensor ``[N, ...]``, or a tree of tensors whose first dimension
                is the batch; so must be all features between stages.
            threshold: Probability that is sure enough, above 0 and at most 1.

        Raises:
            InputError: if the threshold is none.
        """
        if not 0 < threshold <= 1:
            raise InputError(
                "An exit threshold must be a probability, above 0 and at most 1", f"Got {threshold}"
            )
        features: Tree = inputs
        found: list[tuple[Tensor, Tensor, int]] = []
        rows: Tensor | None = None  # of the samples that are still here
        for index, (body, reader) in enumerate(zip(self._bodies, self._exits, strict=True)):
            features = body(features)
            if reader is None:
                continue
            logits = reader(_seen(body, features)).float()
            if rows is None:
                rows = torch.arange(len(logits), device=logits.device)
            sure = logits.softmax(dim=1).amax(dim=1) >= threshold
            if index == self.num_stages - 1:
                sure.fill_(True)
            found.append((rows[sure], logits[sure], index))
            rows = rows[~sure]
            if not len(rows):
                break
            features = _keep(features, ~sure)
        return _in_order(found)


def _seen(body: nn.Sequential, features: Tree) -> Tree:
    """Return what an exit reads of a stage's output: the same as its objective does."""
    summary = summary_of(body)
    return summary(features) if summary else features


def _keep(features: Tree, stays: Tensor) -> Tree:
    return tree_map(lambda tensor: tensor[stays], features)


def _in_order(found: list[tuple[Tensor, Tensor, int]]) -> EarlyExits:
    """Put the samples that left together back into the order of the inputs."""
    order = torch.cat([rows for rows, _, _ in found]).argsort()
    logits = torch.cat([part for _, part, _ in found])
    stages = torch.cat([torch.full_like(rows, index) for rows, _, index in found])
    return EarlyExits(logits[order], stages[order])
