"""Put together what partition and method give: a rank's stages, and a network with exits."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from scpl.errors import InputError
from scpl.exits import PREFIX, ExitNetwork
from scpl.methods.base import Method, Site
from scpl.objectives import Objective
from scpl.partition import Partition
from scpl.randomness import RandomState, derive_seed
from scpl.stage import Stage, StageOptions

__all__ = ["Sources", "build_exits", "build_stages"]

Sources = dict[str, tuple[int, str]]
"""For each key of an exit its stage, and its key in the state of that stage's objective."""


def build_stages(
    parts: Partition,
    method: Method,
    options: StageOptions,
    hosted: Iterable[int],
    *,
    seed: int,
    device: torch.device,
) -> list[Stage]:
    """Build the stages that one rank hosts.

    What a stage draws depends on the seed and its index, not on which others are built here.

    Args:
        parts: The partitioned network.
        method: Which objective each stage gets.
        options: How stages learn.
        hosted: Which stages to build.
        seed: Seed of the objectives' parameters and of the stages' random state.
        device: Where they compute.
    """
    _check_factory("optimizer", options.optimizer)
    return [
        Stage(
            index,
            parts.bodies[index],
            parts.names[index],
            _build_objective(parts, method, index, seed),
            options,
            seed=derive_seed(seed, "stage", index),
            device=device,
        )
        for index in hosted
    ]


def _check_factory(name: str, value: object) -> None:
    """Catch the commonest slip: an optimizer instead of a way to build one."""
    if not callable(value):
        raise InputError(
            f"`{name}` must be a function of a stage's parameters",
            f"Got a {type(value).__name__}",
            "Pass for instance lambda params: torch.optim.Adam(params, lr=1e-3)",
        )


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
    objectives = [_build_objective(parts, method, k, seed=0) for k in range(parts.num_stages)]
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


def _build_objective(parts: Partition, method: Method, index: int, seed: int) -> Objective:
    is_last = index == parts.num_stages - 1
    readout = parts.readout if is_last else None
    site = Site(index, parts.num_stages, parts.feature_shapes[index], readout)
    with RandomState(derive_seed(seed, "objective", index), torch.device("cpu")).active():
        return method.objective(site)
