"""The saved state of a stage: how it is copied, what is wrong with it, how two of them differ."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["broken_values", "copy_to_cpu", "differences"]

State = Mapping[str, Any]


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


def broken_values(state: State, parameters: set[str]) -> list[str]:
    """Name what is NaN, and the parameters that are infinite (a mask may well be)."""
    return [
        name
        for name, value in state.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and (~value.isfinite() if name in parameters else value.isnan()).any()
    ]


def differences(mine: State, other: State) -> list[str]:
    """List everything that keeps a stage from continuing from a saved state."""
    return [
        *_layers(mine["layers"], other["layers"]),
        *_tensors("", mine["body"], other["body"]),
        *_tensors("objective.", mine["objective"], other["objective"]),
        *_optimizers(mine["optimizer"], other["optimizer"]),
    ]


def _layers(mine: list[str], other: list[str]) -> Iterator[str]:
    """Layers without parameters leave no other trace."""
    if mine != other:
        yield f"the layers are {', '.join(other)} there and {', '.join(mine)} here"


def _tensors(prefix: str, mine: State, other: State) -> Iterator[str]:
    yield from (f"{prefix}{key} is missing" for key in mine if key not in other)
    yield from (f"{prefix}{key} is unknown here" for key in other if key not in mine)
    for key, value in mine.items():
        if isinstance(value, Tensor) and key in other and other[key].shape != value.shape:
            yield f"{prefix}{key} is {tuple(other[key].shape)} there and {tuple(value.shape)} here"


def _optimizers(mine: State | None, other: State | None) -> Iterator[str]:
    if mine is None or other is None:
        if mine is not other:
            yield f"{_article(other)} optimizer there and {_article(mine)} optimizer here"
        return
    here, there = mine["param_groups"], other["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (there, here)]
    if sizes[0] != sizes[1]:
        yield f"the optimizer trains {sizes[0]} tensors there and {sizes[1]} here"
    elif any(one.keys() - saved.keys() for one, saved in zip(here, there, strict=True)):
        yield "the optimizer is of another kind"


def _article(optimizer: State | None) -> str:
    return "no" if optimizer is None else "an"
