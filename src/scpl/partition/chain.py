"""Chains: modules whose forward pass is their children, one after the other."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from scpl.errors import PartitionError

__all__ = ["children", "explain_unknown", "is_chain", "open_chain"]


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the named children; unlike ``named_children`` a layer that is used twice comes twice."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def is_chain(module: nn.Module) -> bool:
    """Whether the forward pass is, for certain, the children one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def open_chain(model: nn.Module, wanted: Sequence[str]) -> list[tuple[str, nn.Module]]:
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


def explain_unknown(model: nn.Module, names: Sequence[str], cut: str) -> str:
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
            close = difflib.get_close_matches(parts[depth], inner, n=1)
            hint = f"; did you mean '{parent}.{close[0]}'?" if close else ""
            return f"there is no layer {cut!r} in {parent!r}{hint}"
    close = difflib.get_close_matches(cut, names, n=1)
    return f"there is no layer {cut!r}" + (f"; did you mean {close[0]!r}?" if close else "")
