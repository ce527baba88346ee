"""The methods: one file each, with the objective that a stage gets from it.

May import: errors, heads, losses, partition.
"""

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
from scpl.methods.scpl import SCPL, HeadFactory

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
    "HeadFactory",
    "Layout",
    "Method",
    "MicroBatched",
    "OneForwardOneBackward",
    "PredSim",
    "Site",
    "WideBackpropagation",
    "ZeroBubble",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        SCPL,
        EarlyExit,
        AssociatedLearning,
        PredSim,
        DeInfoReg,
        DASCPL,
        DGL,
        Backpropagation,
        WideBackpropagation,
        CutBackpropagation,
        GPipe,
        OneForwardOneBackward,
        ZeroBubble,
        DataParallel,
    )
}
