"""Build a rank's stages: bodies from the partition, objectives from the method."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from scpl.errors import InputError
from scpl.methods.base import Method, Site
from scpl.objectives import Objective
from scpl.partition import Partition
from scpl.randomness import RandomState, derive_seed
from scpl.stage import Stage, StageOptions

__all__ = ["build_stages"]


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


def _build_objective(parts: Partition, method: Method, index: int, seed: int) -> Objective:
    is_last = index == parts.num_stages - 1
    readout = parts.readout if is_last else None
    site = Site(index, parts.num_stages, parts.feature_shapes[index], readout)
    with RandomState(derive_seed(seed, "objective", index), torch.device("cpu")).active():
        return method.objective(site)
