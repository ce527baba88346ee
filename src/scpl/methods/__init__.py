"""The methods: one file each, with the objective that a stage gets from it.

Importing this package does not import torch: a method's file is loaded when its class is used.

May import: errors, heads, losses, partition, tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scpl.methods.al import AssociatedLearning
    from scpl.methods.base import Layout, Method, Site
    from scpl.methods.bp import (
        Backpropagation,
        CutBackpropagation,
        DataParallel,
        GPipe,
        MicroBatched,
        OneForwardOneBackward,
        WideBackpropagation,
        ZeroBubble,
    )
    from scpl.methods.dascpl import DASCPL
    from scpl.methods.deinforeg import DeInfoReg
    from scpl.methods.dgl import DGL
    from scpl.methods.early_exit import EarlyExit
    from scpl.methods.predsim import PredSim
    from scpl.methods.scpl import SCPL

__all__ = [
    "DASCPL",
    "DGL",
    "METHODS",
    "SCPL",
    "AssociatedLearning",
    "Backpropagation",
    "CutBackpropagation",
    "DataParallel",
    "DeInfoReg",
    "EarlyExit",
    "GPipe",
    "Layout",
    "Method",
    "MicroBatched",
    "OneForwardOneBackward",
    "PredSim",
    "Site",
    "WideBackpropagation",
    "ZeroBubble",
]


class Methods(Mapping[str, "type[Method]"]):
    """The known methods by name; a class is loaded when it is looked up.

    Args:
        homes: Where each class is: ``module:Class``.
    """

    def __init__(self, homes: dict[str, str]) -> None:
        self.homes = homes

    def __getitem__(self, name: str) -> type[Method]:
        module, _, wanted = self.homes[name].partition(":")
        method: type[Method] = getattr(import_module(module), wanted)
        return method

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)

    def __contains__(self, name: object) -> bool:
        return name in self.homes  # without loading it


METHODS = Methods(
    {
        "scpl": "scpl.methods.scpl:SCPL",
        "early-exit": "scpl.methods.early_exit:EarlyExit",
        "al": "scpl.methods.al:AssociatedLearning",
        "predsim": "scpl.methods.predsim:PredSim",
        "deinforeg": "scpl.methods.deinforeg:DeInfoReg",
        "dascpl": "scpl.methods.dascpl:DASCPL",
        "dgl": "scpl.methods.dgl:DGL",
        "bp": "scpl.methods.bp:Backpropagation",
        "bp-wide": "scpl.methods.bp:WideBackpropagation",
        "bp-cut": "scpl.methods.bp:CutBackpropagation",
        "gpipe": "scpl.methods.bp:GPipe",
        "1f1b": "scpl.methods.bp:OneForwardOneBackward",
        "zero-bubble": "scpl.methods.bp:ZeroBubble",
        "ddp": "scpl.methods.bp:DataParallel",
    }
)
"""Every method. A new one is its own file, and a line here."""

_OTHERS = {
    "Layout": "scpl.methods.base",
    "Method": "scpl.methods.base",
    "MicroBatched": "scpl.methods.bp",
    "Site": "scpl.methods.base",
}


def __getattr__(name: str) -> Any:
    homes = dict(home.split(":")[::-1] for home in METHODS.homes.values()) | _OTHERS
    if name in homes:
        return getattr(import_module(homes[name]), name)
    raise AttributeError(f"module 'scpl.methods' has no attribute {name!r}")
