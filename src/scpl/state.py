"""Saved state: copies of it, and how two of them differ."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["broken_values", "copy_to_cpu", "differences", "optimizer_differences"]


def copy_to_cpu(state: Any) -> Any:
    """Deep-copy nested dicts and lists, with every tensor cloned to the CPU.

    Numbers of other libraries (``lr=numpy.float64(0.1)``) become Python's own: a checkpoint is
    read with ``weights_only``, which knows no others.
    """
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copy_to_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copy_to_cpu(value) for value in state)
    if isinstance(state, float):
        return float(state)
    return copy.deepcopy(state)


def broken_values(state: dict[str, Any], parameters: set[str]) -> list[str]:
    """Name what is NaN, and the parameters that are infinite (a mask may well be)."""
    return [
        name
        for name, value in state.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and (~value.isfinite() if name in parameters else value.isnan()).any()
    ]


def differences(prefix: str, mine: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """List the names and shapes in which two states of a module differ."""
    faults = [f"{prefix}{key} is missing" for key in mine if key not in other]
    faults += [f"{prefix}{key} is unknown here" for key in other if key not in mine]
    faults += [
        f"{prefix}{key} is {tuple(other[key].shape)} there and {tuple(value.shape)} here"
        for key, value in mine.items()
        if isinstance(value, Tensor) and key in other and other[key].shape != value.shape
    ]
    return faults


def optimizer_differences(mine: Optimizer | None, other: dict[str, Any] | None) -> list[str]:
    """List how an optimizer differs from a saved one: kind, settings by name, parameters."""
    if mine is None or other is None:
        there, here = ("no" if one is None else "an" for one in (other, mine))
        return [] if there == here else [f"{there} optimizer there and {here} optimizer here"]
    faults = []
    groups = mine.state_dict()["param_groups"]
    saved = other["param_groups"]
    sizes = [[len(group["params"]) for group in part] for part in (saved, groups)]
    if sizes[0] != sizes[1]:
        faults.append(f"the optimizer trains {sizes[0]} tensors there and {sizes[1]} here")
    elif any(here.keys() - there.keys() for here, there in zip(groups, saved, strict=True)):
        faults.append("the optimizer is of another kind")
    return faults
