"""Back to a plain module: the trained network, or one with exits, the same on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scpl.engine.build import build_objective
from scpl.engine.ranks import Ranks
from scpl.engine.stage import Stage
from scpl.errors import InputError
from scpl.methods.base import Method, Objective, precise
from scpl.partition import Partition
from scpl.partition.pieces import MIXED, Dimensions
from scpl.partition.values import Tree, tensors_of, tree_map

__all__ = [
    "PREFIX",
    "EarlyExits",
    "ExitNetwork",
    "Sources",
    "build_exits",
    "export_exits",
    "export_network",
]

PREFIX = "exits"
"""Keys of what is not the user's own begin with this, and the number of a stage."""
Sources = dict[str, tuple[int, str]]
"""For each key of an exit its stage, and its key in the state of that stage's objective."""


def export_network(
    parts: Partition,
    method: Method,
    stages: Sequence[Stage],
    ranks: Ranks,
    owners: Sequence[int],
) -> nn.Module:
    """Return the network that predicts: a copy on the CPU, in eval mode; all ranks call it.

    Args:
        parts: The network that is trained.
        method: Says whether its own read-out predicts.
        stages: Those of this rank.
        ranks: The ranks.
        owners: For each stage the rank whose weights count.

    Returns:
        The user's module; or one with another read-out, if the method has one of its own.
    """
    copied = _copy(parts, ranks, owners)
    if not method.replaces_readout:
        return copied.model
    return _with_exits(copied, method, stages, ranks, owners, [parts.num_stages - 1])


def export_exits(
    parts: Partition,
    method: Method,
    stages: Sequence[Stage],
    ranks: Ranks,
    owners: Sequence[int],
) -> ExitNetwork:
    """Return the network with an exit after every stage; otherwise as `export_network`.

    Raises:
        InputError: if not every stage can predict under this method.
    """
    copied, every = _copy(parts, ranks, owners), range(parts.num_stages)
    return _with_exits(copied, method, stages, ranks, owners, every)


def has_exits(parts: Partition, method: Method) -> bool:
    """Whether there are several stages, and each can predict under this method."""
    objectives = _objectives(parts, method)
    exits = (each.exit_module(objectives[:stage]) for stage, each in enumerate(objectives))
    return parts.num_stages > 1 and all(each is not None for each in exits)


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
    objectives = _objectives(parts, method)
    owner = {
        id(value): (stage, key)
        for stage, objective in enumerate(objectives)
        for key, value in objective.state_dict(keep_vars=True).items()
    }
    exits: dict[int, nn.Module] = {}
    sources: Sources = {}
    for stage in stages:
        module = objectives[stage].exit_module(objectives[:stage])
        if module is None:
            raise InputError(
                f"Every stage must predict to be an early exit (method {method.name})",
                f"Stage {stage} does not",
                "Give every stage a classifier (scpl: `cross_entropy` above 0), or use a method "
                "that does, such as early-exit",
            )
        if module is parts.readout:
            exits[stage] = module
            continue
        for key, value in module.state_dict(keep_vars=True).items():
            sources[f"{PREFIX}.{stage}.{key}"] = owner[id(value)]
        exits[stage] = copy.deepcopy(module)  # exits may have modules in common; keys have not
    return ExitNetwork(parts, exits), sources


def _objectives(parts: Partition, method: Method) -> list[Objective]:
    """Build the objectives of all stages, for their structure."""
    return [build_objective(parts, method, stage, seed=0) for stage in range(parts.num_stages)]


def _copy(parts: Partition, ranks: Ranks, owners: Sequence[int]) -> Partition:
    """Copy the network with each layer's weights from the rank that trains it."""
    copied = copy.deepcopy(parts)
    copied.model.cpu().eval()
    for owner, body in zip((*owners, owners[-1]), (*copied.bodies, copied.readout), strict=True):
        for value in body.cpu().eval().state_dict().values():
            if isinstance(value, Tensor):
                ranks.broadcast(value, owner)
    return copied


def _with_exits(
    parts: Partition,
    method: Method,
    stages: Sequence[Stage],
    ranks: Ranks,
    owners: Sequence[int],
    wanted: Iterable[int],
) -> ExitNetwork:
    network, sources = build_exits(parts, method, wanted)
    state = network.cpu().state_dict()
    trained = {stage.index: stage.objective.state_dict() for stage in stages}
    for key, (stage, name) in sources.items():
        if stage in trained:
            state[key].copy_(trained[stage][name])
        ranks.broadcast(state[key], owners[stage])
    return network.eval()


class EarlyExits(NamedTuple):
    """What `ExitNetwork.leave_early` found.

    Attributes:
        logits: ``[N, C]``, at least float32, in the order of the inputs.
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
        self._parameters, self._buffers = model._parameters, model._buffers
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
        self._form, self._batch_dims, self._task = parts.form, parts.batch_dims, parts.task

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self._bodies)

    def train(self, mode: bool = True) -> ExitNetwork:
        """Set the mode of all stages."""
        super().train(mode)
        for part in self._parts:
            part.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExitNetwork:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for part in self._parts:
            part._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def _parts(self) -> list[nn.Module]:
        return [*self._bodies, *(each for each in self._exits if each is not None)]

    def forward(self, inputs: Any) -> Tensor:
        """Return the logits ``[N, C]`` of the last exit."""
        features: Tree = self._form.arrange(inputs)
        for body in self._bodies:
            features = body(features)
        reader = self._exits[-1]
        assert reader is not None
        logits: Tensor = reader(features)
        return logits

    def every_exit(self, inputs: Any) -> list[Tensor]:
        """Return the logits ``[N, C]`` of every exit, at least float32; all samples go to the end.

        Args:
            inputs: A batch, as the network takes it.
        """
        features: Tree = self._form.arrange(inputs)
        found = []
        for body, reader in zip(self._bodies, self._exits, strict=True):
            features = body(features)
            if reader is not None:
                found.append(precise(reader(features)))
        return found

    def leave_early(self, inputs: Any, threshold: float) -> EarlyExits:
        """Predict each sample at the first exit that is sure of it.

        After each stage with an exit, samples whose largest softmax probability reaches the
        threshold leave (of labels: whose every label has such a probability, to be there or not);
        the others go on, as a smaller batch. All leave at the last exit.

        Args:
            inputs: A batch: a tensor ``[N, ...]``, or a tree of tensors whose first dimension
                is the batch; so must be all features between stages.
            threshold: Probability that is sure enough, above 0 and at most 1.

        Raises:
            InputError: if the threshold is none, or the network predicts numbers.
        """
        if not 0 < threshold <= 1:
            raise InputError(
                "An exit threshold must be a probability, above 0 and at most 1", f"Got {threshold}"
            )
        features: Tree = self._form.arrange(inputs)
        found: list[tuple[Tensor, Tensor, int]] = []
        rows: Tensor | None = None  # of the samples that are still here
        for index, (body, reader) in enumerate(zip(self._bodies, self._exits, strict=True)):
            features = body(features)
            if reader is None:
                continue
            logits = precise(reader(features))
            if rows is None:
                rows = torch.arange(len(logits), device=logits.device)
            sure = self._task.confidence(logits) >= threshold
            if index == self.num_stages - 1:
                sure.fill_(True)
            found.append((rows[sure], logits[sure], index))
            rows = rows[~sure]
            if not len(rows):
                break
            features = _keep(features, ~sure, self._batch_dims[index])
        return _in_order(found)


def _keep(features: Tree, stays: Tensor, dims: Dimensions) -> Tree:
    """Take the samples that go on out of what a stage hands on."""
    if dims is None:
        return tree_map(lambda tensor: tensor[stays], features)
    if MIXED in dims:
        raise InputError(
            "To leave early, what crosses a cut must have a row per sample",
            "A value of this network mixes samples with another dimension",
            "Cut elsewhere, or use all stages",
        )
    rows = stays.nonzero().flatten()
    kept = tuple(
        value if dim is None else value.index_select(dim, rows)
        for value, dim in zip(tensors_of(features), dims, strict=True)
    )
    return kept[0] if len(kept) == 1 else kept


def _in_order(found: list[tuple[Tensor, Tensor, int]]) -> EarlyExits:
    """Put the samples that left together back into the order of the inputs."""
    order = torch.cat([rows for rows, _, _ in found]).argsort()
    logits = torch.cat([part for _, part, _ in found])
    stages = torch.cat([torch.full_like(rows, index) for rows, _, index in found])
    return EarlyExits(logits[order], stages[order])
